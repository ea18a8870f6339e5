"""Which file is written where: what is a result, what is in the way; and what restore.py keeps of the files people have."""

import os
import subprocess
import sys
from pathlib import Path

import mutate
import numpy as np
import pytest
import torch
from made import DISPLAY_P3, SRGB, file_of, noise, rgb_profile
from PIL import ExifTags, Image

import restore
from plumbing import files, pictures
from plumbing.targets import plan

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def run(monkeypatch):
    """restore.py's main in this process, with a network of 32 px that adds a tint -> exit code."""
    tint = torch.tensor([0.2, 0.0, -0.1]).view(3, 1, 1)
    monkeypatch.setattr(restore, "load_model", lambda *_: (lambda y: 0.5 * y + 0.25 + tint * y.mean(), 32))
    return lambda *args: restore.main(restore.parse_args([*map(str, args), "--device", "cpu", "--color-fix", "none"]))


def put(path, data=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data or file_of(noise(40, 32)))
    return path


def names(pairs):
    return [(path.name, target.name) for path, target in pairs]


# --- whose files are whose --------------------------------------------------------------------------------------------


def test_plan_puts_results_beside_the_pictures_and_skips_earlier_results(tmp_path):
    for name in ("a.png", "b/c.JPG"):
        put(tmp_path / name)
    for name in ("a_restored.png", "a_compare.png"):
        pictures.write_result(tmp_path / name, torch.zeros(3, 4, 4))
    assert plan([tmp_path]) == (
        [(tmp_path / "a.png", tmp_path / "a_restored.png"), (tmp_path / "b/c.JPG", tmp_path / "b/c_restored.png")], []
    )  # fmt: skip
    pairs, _ = plan([tmp_path, tmp_path / "a.png"], tmp_path / "out")  # given twice, done once
    assert [t for _, t in pairs] == [tmp_path / "out/a_restored.png", tmp_path / "out/b/c_restored.png"]


def test_plan_never_lets_two_pictures_or_an_input_be_overwritten(tmp_path):
    for name in ("a.png", "a.jpg", "b.png", "b_restored.png", "c.png", "c_compare.png"):
        (tmp_path / name).touch()
    pairs, errors = plan([tmp_path / "a.jpg", tmp_path / "a.png"])
    assert [p.name for p, _ in pairs] == ["a.jpg"] and "a.png" in errors[0]
    pairs, errors = plan([tmp_path / "b.png", tmp_path / "b_restored.png"])
    assert [p.name for p, _ in pairs] == ["b_restored.png"] and "b.png" in errors[0]
    pairs, errors = plan([tmp_path / "c.png", tmp_path / "c_compare.png"], compare=True)
    assert [p.name for p, _ in pairs] == ["c_compare.png"] and "c.png" in errors[0]
    pairs, errors = plan([tmp_path / "a.png"], tmp_path / "a.png")
    assert not pairs and "a.png" in errors[0]


def test_plan_wants_a_folder_for_several_pictures(tmp_path):
    for name in ("a.png", "b.png", "notes.txt"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match="expected a folder"):
        plan([tmp_path], tmp_path / "out.png")
    with pytest.raises(ValueError, match="expected a folder"):
        plan([tmp_path / "a.png"], tmp_path / "notes.txt")


def test_our_results_are_left_out_and_made_again(tmp_path, run):
    put(tmp_path / "x.png")
    assert run(tmp_path, "--compare") == 0
    first = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert sorted(first) == ["x.png", "x_compare.png", "x_restored.png"]
    assert run(tmp_path, "--compare") == 0 and {p.name: p.read_bytes() for p in tmp_path.iterdir()} == first
    (tmp_path / "x.png").unlink()
    assert run(tmp_path) == 1  # nothing is left to restore
    assert plan([tmp_path / "x_restored.png"])[0]  # but by name it is


@pytest.mark.parametrize("name", ["x_restored.png", "x_compare.png"])
def test_somebody_elses_result_is_named_once_and_kept(tmp_path, run, capsys, name):
    put(tmp_path / "x.png")
    theirs = put(tmp_path / name, file_of(noise(seed=1)))
    before = theirs.read_bytes()
    assert run(tmp_path, "--compare") == 1
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and name in err and "--overwrite" in err
    assert theirs.read_bytes() == before and len(list(tmp_path.iterdir())) == 2
    assert run(tmp_path, "--compare", "-o", tmp_path / "out") == 0
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and f"{name} is named like a result" in err
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["x_compare.png", "x_restored.png"]
    if name == "x_restored.png":
        assert run(tmp_path / "x.png", "-o", theirs) == 0 and theirs.read_bytes() != before
        theirs.write_bytes(before)
    assert run(tmp_path, "--compare", "--overwrite") == 0 and theirs.read_bytes() != before


def test_a_picture_that_is_only_named_like_a_result_is_restored(tmp_path):
    put(tmp_path / "family_restored.png")
    assert names(plan([tmp_path])[0]) == [("family_restored.png", "family_restored_restored.png")]


def test_a_picture_that_is_named_by_an_ending_alone_is_restored(tmp_path):
    put(tmp_path / "_restored.png")
    assert plan([tmp_path]) == ([(tmp_path / "_restored.png", tmp_path / "_restored_restored.png")], [])


def test_names_that_differ_in_case_only_clash(tmp_path):
    for name in ("a/x.png", "a/X.jpg", "b/y.png", "b/Y_RESTORED.PNG"):
        put(tmp_path / name)
    pairs, errors = plan([tmp_path / "a"])
    assert len(pairs) == 1 and "for both" in errors[0]
    pairs, errors = plan([tmp_path / "b/y.png", tmp_path / "b/Y_RESTORED.PNG"])
    assert names(pairs) == [("Y_RESTORED.PNG", "Y_RESTORED_restored.png")] and "itself an input" in errors[0]


@pytest.mark.parametrize("suffix", [".jfif", ".jpe", ".webp"])
def test_out_is_a_file_by_any_suffix_that_is_written(tmp_path, run, suffix):
    assert run(put(tmp_path / "x.png"), "-o", tmp_path / f"y{suffix}") == 0
    assert (tmp_path / f"y{suffix}").is_file()
    for other in (".tif", ".heic", ".gif"):
        with pytest.raises(ValueError, match="choose another suffix"):
            plan([tmp_path / "x.png"], tmp_path / f"y{other}")


def test_a_file_that_links_to_itself_is_named_and_the_others_are_done(tmp_path, run, capsys):
    put(tmp_path / "in" / "x.png")
    put(tmp_path / "elsewhere" / "y.tif", file_of(noise(), "TIFF"))
    put(tmp_path / "in" / "z.gif")
    (tmp_path / "in" / "loop.png").symlink_to("loop.png")
    (tmp_path / "in" / "more").symlink_to(tmp_path / "elsewhere")
    assert run(tmp_path / "in", "-o", tmp_path / "out") == 1
    out = sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.png"))
    assert out == ["more/y_restored.png", "x_restored.png"]
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 2 and "left out 1 other files (1 .gif)" in err[0] and "loop.png" in err[1]
    (tmp_path / "in" / "loop.png").unlink()
    assert run(tmp_path / "in", "-o", tmp_path / "out") == 0  # a picture of a kind that is not read is no fault


# --- what results keep ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "LA", "I;16"])
@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_gray_stays_gray(tmp_path, run, mode, suffix):
    gray = noise(40, 32)[..., 0]
    image = Image.fromarray(gray.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(gray).convert(mode)
    assert run(put(tmp_path / "x.png", file_of(image)), "-o", tmp_path / f"y{suffix}") == 0
    pixels = np.asarray(Image.open(tmp_path / f"y{suffix}").convert("RGB")).astype(int)
    assert (pixels.max(2) - pixels.min(2)).max() == 0 and pixels.std() > 10


def test_a_tint_is_kept(tmp_path, run):
    sepia = (noise(40, 32)[..., :1] * np.array([1.0, 0.9, 0.75])).astype(np.uint8)
    run(put(tmp_path / "x.png", file_of(sepia)), "-o", tmp_path / "y.png")
    assert not pictures.is_gray(pictures.read_image(tmp_path / "y.png"))


def test_a_cut_out_and_its_date_are_kept(tmp_path, run):
    exif = Image.Exif()
    exif[ExifTags.Base.DateTime] = "2020:01:02 03:04:05"
    pixels = np.concatenate([noise(10, 8), noise(10, 8, seed=1)[..., :1]], 2)
    x = put(tmp_path / "x.png", file_of(pixels, exif=exif))
    for choice, kept in (("basic", {ExifTags.Base.DateTime: "2020:01:02 03:04:05"}), ("none", {})):
        assert run(x, "-o", tmp_path / "y.png", "--metadata", choice) == 0
        with Image.open(tmp_path / "y.png") as image:
            assert image.mode == "RGBA" and image.size == (26, 32) and dict(image.getexif()) == kept
            alpha = torch.from_numpy(np.asarray(image)[..., 3] / 255).float()
        enlarged = pictures.resize(pictures.read_picture(x).alpha, (32, 26))[0]
        assert (alpha - enlarged).abs().max() < 1 / 255


def test_a_picture_with_a_profile_is_restored_like_the_srgb_one(tmp_path, run):
    r, g, b = SRGB
    swapped = file_of(noise(40, 32)[..., [1, 0, 2]], icc_profile=rgb_profile((g, r, b)))
    assert run(put(tmp_path / "a.png"), put(tmp_path / "b.png", swapped), "-o", tmp_path) == 0
    ours, theirs = (pictures.read_image(tmp_path / f"{name}_restored.png") for name in "ab")
    assert (ours - theirs).abs().max() <= 2 / 255
    put(tmp_path / "b.png", file_of(noise(40, 32), icc_profile=rgb_profile(DISPLAY_P3)))
    assert run(tmp_path / "b.png") == 0  # other colours: the check above can fail
    assert (ours - pictures.read_image(tmp_path / "b_restored.png")).abs().max() > 2 / 255


def test_how_much_detail_a_large_result_has_is_said(tmp_path, run, capsys):
    run(put(tmp_path / "large.png"), put(tmp_path / "small.png", file_of(noise())), "-o", tmp_path / "out")
    large, small = capsys.readouterr().out.splitlines()
    assert large.endswith("; 32 px of detail, enlarged to 32 x 40") and "px of detail" not in small


def test_mutated_files_are_all_restored_or_named(tmp_path, run, capsys):
    data = dict(mutate.mutated(40, seed=1))
    for name, content in data.items():
        put(tmp_path / "in" / name, content)
    assert run(tmp_path / "in", "-o", tmp_path / "out") == 1
    done = {p.name.removesuffix("_restored.png") for p in (tmp_path / "out").iterdir()}
    err = capsys.readouterr().err
    for name in data:
        read = Path(name).suffix in files.READ
        assert (Path(name).stem in done) != (read and f"{name}, which cannot be decoded" in err) or not read
        assert Path(name).stem in done or not name.startswith("harmless")
    assert "Traceback" not in err


@pytest.mark.parametrize("ending", ["2>&1 >&-", "| head -0", "> /dev/full"])
def test_output_that_nobody_reads_is_no_failure(tmp_path, ending):
    if "full" in ending and not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from plumbing import commands; import time; "
    code += "commands.begin(lambda: None, ''); commands.say('a'); time.sleep(0.2); commands.say('b'); commands.say('c')"
    command = f'set -o pipefail; "{sys.executable}" -c "{code}" {ending}'
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert result.returncode == 0 and len(result.stderr.splitlines()) == ("full" in ending), result
