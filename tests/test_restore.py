"""restore.py: colour corrections against reference numbers, picture geometry, and what a user can do to the command."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import restore
from plumbing import commands, devices, pictures
from plumbing.presets import PRESETS

ROOT = Path(__file__).resolve().parent.parent
DEGRADED = ROOT / "samples" / "degraded"
HOPPER = DEGRADED / "light" / "hopper.png"
SIZE = PRESETS["tiny"]["image_size"]
GOLDEN = load_file(Path(__file__).parent / "golden" / "restore_color_fix.safetensors")  # InterLCM's colour corrections
MODELS = {}


@pytest.fixture(autouse=True)
def script(monkeypatch):
    """Faults begin with the script's name, as on the command line."""
    monkeypatch.setattr(commands, "SCRIPT", "restore.py")


@pytest.fixture(autouse=True)
def keep_models(monkeypatch):
    """Each model is loaded once for all tests."""
    load = restore.load_model
    monkeypatch.setattr(restore, "load_model", lambda *a: MODELS[a] if a in MODELS else MODELS.setdefault(a, load(*a)))


def run(*args):
    """restore.py's main in this process -> exit code."""
    return restore.main(restore.parse_args([str(a) for a in (*args, "--device", "cpu")]))


def shell(*args):
    return subprocess.run([sys.executable, ROOT / "restore.py", *map(str, args)], capture_output=True, text=True)


def size(path):
    with Image.open(path) as image:
        return image.size


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def identity(size, x, color_fix="none"):
    """What restore.py makes of x with a network that changes nothing."""
    return restore.restore(lambda y: y, size, [x], color_fix)[0]


# --- colour corrections


def test_wavelet_color_fix_equals_the_reference():
    x = restore.wavelet_color_fix(GOLDEN["content"], GOLDEN["style"])
    assert (x - GOLDEN["wavelet"]).abs().max() < 1e-5


def test_adain_color_fix_equals_the_reference():
    x = restore.adain_color_fix(GOLDEN["content"], GOLDEN["style"])
    assert (x - GOLDEN["adain"]).abs().max() < 1e-5


def test_wavelet_color_fix_takes_colour_from_the_style_and_detail_from_the_content():
    detail = torch.rand(1, 3, 64, 64)
    x = restore.wavelet_color_fix(detail + 0.3, detail - 0.1)  # the two differ in colour alone
    assert torch.allclose(x, detail - 0.1, atol=1e-6)


def test_color_fixes_want_pictures_of_one_shape():
    for fix in (restore.wavelet_color_fix, restore.adain_color_fix):
        with pytest.raises(ValueError, match="one shape"):
            fix(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 9))


def test_a_cold_restoration_imports_no_training_package(tmp_path):
    """The whole command, then a look at what it has imported. Whoever imports restore.py keeps diffusers as it is."""
    argv = ["restore.py", str(DEGRADED / "medium" / "collins.png"), "-o", str(tmp_path / "x.png"), "--device", "cpu"]
    code = f"""import runpy, sys
sys.argv = {argv}
try:
    runpy.run_path("restore.py", run_name="__main__")
except SystemExit as e:
    assert e.code == 0
found = {{"peft", "transformers", "accelerate", "scipy"}} & {{name.split(".")[0] for name in sys.modules}}
sys.exit(f"imported {{found}}" if found else 0)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x.png").is_file() and "peft" not in done.stderr + done.stdout


# --- geometry


def test_a_picture_of_the_networks_size_goes_through_unchanged():
    x = torch.rand(3, 32, 32)
    assert torch.equal(identity(32, x), x)


@pytest.mark.parametrize(
    "h, w, out", [(96, 64, (96, 64)), (20, 10, (32, 16)), (1, 1, (32, 32)), (1, 500, (1, 500)), (33, 32, (33, 32))]
)
def test_the_result_has_the_inputs_shape_and_a_long_side_of_at_least_s(h, w, out):
    x = identity(32, torch.rand(3, h, w))
    assert tuple(x.shape) == (3, *out) and x.min() >= 0 and x.max() <= 1


def test_a_face_is_never_squashed_and_comes_back_in_its_place():
    y, x = torch.meshgrid(torch.arange(120.0), torch.arange(80.0), indexing="ij")
    disc = ((y - 50) ** 2 + (x - 30) ** 2 < 20**2).float().expand(3, -1, -1)
    square = restore.to_square(disc, 60)
    inside = square[0, :, 10:50] > 0.5  # 80 of 120 px become 40 of 60, with 10 of padding on either side
    assert abs(inside.any(0).sum() - inside.any(1).sum()) <= 1  # as wide as high
    assert (identity(60, disc) - disc).abs().mean() < 0.03


def test_padding_mirrors_the_picture():
    x = torch.rand(3, 8, 4)
    square = restore.to_square(x, 8)
    assert torch.equal(square[:, :, 2:6], x)
    assert torch.equal(square[:, :, :2], x[:, :, :2].flip(2)) and torch.equal(square[:, :, 6:], x[:, :, 2:].flip(2))


# --- the command, with the weights in tiny/


def test_restores_a_sample_beside_it_and_leaves_it_alone(tmp_path, capsys):
    picture = tmp_path / "face.png"
    picture.write_bytes((DEGRADED / "medium" / "collins.png").read_bytes())
    before = digest(picture)
    assert run(picture, "--compare") == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["face.png", "face_compare.png", "face_restored.png"]
    assert digest(picture) == before and size(tmp_path / "face_restored.png") == (512, 512)
    both = pictures.read_image(tmp_path / "face_compare.png")
    assert torch.equal(both[:, :, :512], pictures.read_image(picture))
    assert torch.equal(both[:, :, 512:], pictures.read_image(tmp_path / "face_restored.png"))
    assert "face.png 512x512 -> " in capsys.readouterr().out


def test_the_student_sees_the_picture_and_keeps_its_colours(tmp_path):
    """Nearer to the clean face in low frequencies than a picture of the mean colour, and not just the input again."""
    y = pictures.read_image(DEGRADED / "medium" / "hopper.png")
    run(DEGRADED / "medium" / "hopper.png", "-o", tmp_path / "x.png")
    x_hat, x = (
        restore.low_pass(pictures.read_image(p)[None]) for p in (tmp_path / "x.png", ROOT / "samples/clean/hopper.png")
    )
    assert (x_hat - x).square().mean() < 0.1 * (x - x.mean((2, 3), keepdim=True)).square().mean()
    assert (pictures.read_image(tmp_path / "x.png") - y).abs().mean() > 0.005


def test_same_bytes_out_whatever_the_batch_the_cores_and_the_company(tmp_path, monkeypatch):
    for cores, source, out in ((3, DEGRADED, "all"), (2, DEGRADED / "light", "few"), (1, HOPPER, "one.png")):
        monkeypatch.setattr(devices, "cores_a_process", lambda cores=cores: cores)
        assert run(source, "-o", tmp_path / out, "--batch", 4) == 0
    everything = sorted(p.relative_to(tmp_path / "all").as_posix() for p in (tmp_path / "all").rglob("*.png"))
    assert everything == [f"{l}/{n}_restored.png" for l in ("heavy", "light", "medium") for n in ("collins", "hopper")]
    first = digest(tmp_path / "all" / "light" / "hopper_restored.png")
    assert first == digest(tmp_path / "few" / "hopper_restored.png") == digest(tmp_path / "one.png")


def test_teacher_depends_on_its_seed_and_the_posterior_mean_does_not_have_one(tmp_path):
    picture = DEGRADED / "medium" / "hopper.png"
    for name, options in {"a": [0], "b": [1], "c": [0]}.items():
        assert (
            run(picture, "-o", tmp_path / f"{name}.png", "--method", "teacher", "--steps", 2, "--seed", *options) == 0
        )
    assert digest(tmp_path / "a.png") == digest(tmp_path / "c.png") != digest(tmp_path / "b.png")
    assert run(picture, "-o", tmp_path / "m.png", "--method", "mmse") == 0
    assert digest(tmp_path / "m.png") != digest(tmp_path / "a.png")


def test_color_fix_changes_the_result_and_wavelet_is_the_students_default(tmp_path):
    picture = DEGRADED / "heavy" / "hopper.png"
    for fix in ("wavelet", "adain", "none"):
        run(picture, "-o", tmp_path / f"{fix}.png", "--color-fix", fix)
    assert len({digest(p) for p in tmp_path.iterdir()}) == 3
    run(picture, "-o", tmp_path / "default.png")
    assert digest(tmp_path / "default.png") == digest(tmp_path / "wavelet.png")
    for fix in ([], ["--color-fix", "none"]):  # the teacher's own colours
        run(picture, "-o", tmp_path / f"mmse{len(fix)}.png", "--method", "mmse", *fix)
    assert digest(tmp_path / "mmse0.png") == digest(tmp_path / "mmse2.png")


def test_odd_pictures_are_restored_and_broken_ones_named(tmp_path, capsys):
    face = Image.open(HOPPER)
    pictures = {
        "gray.png": face.convert("L"), "palette.png": face.convert("P"), "wide.jpg": face.crop((0, 100, 512, 300)),
        "alpha.webp": face.convert("RGBA"), "small.png": face.resize((40, 50)), "dot.png": face.resize((1, 1)),
        "big.jpg": face.resize((1050, 1250)), "thread.png": face.resize((2, 900)),
    }  # fmt: skip
    for name, image in pictures.items():
        image.save(tmp_path / name)
    data = (tmp_path / "gray.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.jpg").write_text("not a picture")
    (tmp_path / "empty.png").touch()
    before = {p: digest(p) for p in tmp_path.iterdir()}

    assert run(tmp_path, tmp_path / "nowhere.png", "-o", tmp_path / "out") == 1
    streams = capsys.readouterr()
    assert len(streams.err.splitlines()) == 4 and len(streams.out.splitlines()) == 8
    for name in ("cut.png", "text.jpg", "empty.png", "nowhere.png"):
        assert name in streams.err
    assert {p: digest(p) for p in before} == before
    sizes = {p.name.replace("_restored.png", ""): size(p) for p in (tmp_path / "out").iterdir()}
    assert sizes == {
        "gray": (512, 512), "palette": (512, 512), "wide": (512, 200), "alpha": (512, 512), "small": (round(0.8 * SIZE), SIZE),
        "dot": (SIZE, SIZE), "big": (1050, 1250), "thread": (2, 900),
    }  # fmt: skip


def test_a_result_that_cannot_be_written_is_named_and_the_others_are_done(tmp_path, capsys):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes((HOPPER).read_bytes())
    (tmp_path / "a_restored.png").mkdir()  # in the way
    assert run(tmp_path) == 1
    assert "a_restored.png" in capsys.readouterr().err and (tmp_path / "b_restored.png").is_file()
    assert not list(tmp_path.glob(".*"))  # no temporary file is left


def test_a_folder_without_pictures_is_an_error(tmp_path, capsys):
    assert run(tmp_path) == 1
    assert "expected pictures" in capsys.readouterr().err


# --- the command from outside


def test_help_answers_within_a_second():
    start = time.perf_counter()
    result = shell("-h")
    assert time.perf_counter() - start < 1 and result.returncode == 0 and "--color-fix" in result.stdout


@pytest.mark.parametrize(
    "args",
    [[], ["a.png", "--color-fix", "blue"], ["a.png", "--batch", "0"], ["a.png", "--steps", "5"],
     ["a.png", "--method", "mmse", "--seed", "1"], ["a.png", "--method", "teacher", "--seed", "-1"]],
)  # fmt: skip
def test_wrong_arguments_end_with_2(args):
    result = shell(*args)
    assert result.returncode == 2 and "restore.py: error: " in result.stderr and "Traceback" not in result.stderr


def test_what_can_only_be_seen_later_ends_with_one_line_and_2(tmp_path, capsys):
    picture = HOPPER
    for args in ([picture, "--checkpoint", tmp_path / "none"], [DEGRADED, "-o", tmp_path / "out.png"]):
        assert run(*args) == 2
        error = capsys.readouterr().err
        assert error.startswith("restore.py: expected") and len(error.splitlines()) == 1
        assert not list(tmp_path.iterdir())


def test_an_output_that_is_no_folder_or_picture_is_refused(tmp_path, capsys):
    picture = HOPPER
    assert run(picture, "-o", tmp_path / "x.gif") == 2 and "-o" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert run(picture, "-o", tmp_path / "file" / "x") == 1  # found when it is to be written, and named
    error = capsys.readouterr().err
    assert error.startswith("restore.py: expected a folder to write to") and len(error.splitlines()) == 1


def test_too_little_memory_is_named_and_the_others_are_done(tmp_path, monkeypatch, capsys):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes((HOPPER).read_bytes())
    work, calls = restore.restore, []

    def once(*args, **settings):
        calls.append(args)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")
        return work(*args, **settings)

    monkeypatch.setattr(restore, "restore", once)
    assert run(tmp_path) == 1
    error = capsys.readouterr().err
    assert "enough memory" in error and "a.png" in error and "--batch" in error and len(error.splitlines()) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png", "b_restored.png"]

    def load(*_):
        raise MemoryError

    monkeypatch.setattr(restore, "load_model", load)
    assert run(tmp_path / "a.png") == 2 and "enough memory for this command" in capsys.readouterr().err


def test_a_model_that_gives_nan_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(restore, "load_model", lambda *_: (lambda y: y * float("nan"), 128))
    assert run(HOPPER, "-o", tmp_path / "x.png") == 1
    assert "NaN" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("when", ["while torch is imported", "later"])
def test_ctrl_c_ends_with_one_line_and_130(tmp_path, start_script, when):
    command = [DEGRADED, "-o", tmp_path / "out", "--method", "teacher", "--steps", 5000]
    if when == "later":
        process = start_script("restore.py", *command, err=tmp_path / "err")
        time.sleep(1)
        os.kill(process.pid, signal.SIGINT)
        process.join(60)
        code, error = process.exitcode, (tmp_path / "err").read_text()
    else:
        command = list(map(str, [sys.executable, ROOT / "restore.py", *command]))
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        time.sleep(0.7)
        process.send_signal(signal.SIGINT)
        error, code = process.communicate()[1], process.returncode
    assert code == 130 and error == "\nrestore.py: interrupted; what is written is whole\n"
    assert {p.name for p in tmp_path.iterdir()} <= {"err"}
