"""The same code on a GPU: what it gives beside the CPU, in bf16 beside float32, twice, and after a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import cache
import restore
import train
from evaluation.speed import as_graph
from plumbing.devices import choose_device, prepare
from plumbing.pictures import read_image, write_image
from plumbing.presets import locate
from plumbing.published import load_vae
from plumbing.runs import steps_in
from student import Student
from teacher import PMRF

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
ROOT = Path(__file__).resolve().parent.parent


def psnr(a, b):
    return -10 * torch.log10((a.double().cpu() - b.double().cpu()).square().mean()).item()


@pytest.fixture(scope="module")
def faces():
    """Degraded portraits at the tiny preset's size, (B, 3, S, S)."""
    size = Student.load("tiny", merge=True).image_size
    found = sorted((ROOT / "samples" / "degraded").rglob("*.png"))[:4]
    return torch.stack([restore.to_square(read_image(path), size) for path in found])


@pytest.fixture(scope="module", params=["student", "teacher"])
def runs(request, faces):
    """What a method makes of the faces: on the CPU in float32, on the GPU in float32 (TF32) and in bf16, there twice."""
    results = {}
    for name, device, precision in (("cpu", "cpu", "fp32"), ("fp32", "cuda", "fp32"), ("bf16", "cuda", "bf16")):
        device = choose_device(device)
        if request.param == "student":
            run = prepare(Student.load("tiny", merge=True), device, precision)
        else:
            run = prepare(PMRF.from_pretrained(locate("tiny/teacher")), device, precision).restore
        with torch.inference_mode():
            results[name] = run(faces.to(device)).clamp(0, 1).cpu()
            results[f"{name} again"] = run(faces.to(device)).clamp(0, 1).cpu()
    return results


def test_restoring_on_a_gpu_gives_what_the_cpu_gives(runs):
    assert psnr(runs["fp32"], runs["cpu"]) > 50


def test_restoring_in_bf16_stays_within_45_db_of_float32(runs):
    assert psnr(runs["bf16"], runs["fp32"]) > 45


def test_restoring_twice_gives_the_same_bytes(runs):
    for name in ("fp32", "bf16"):
        assert torch.equal(runs[name], runs[f"{name} again"])


def test_a_cuda_graph_of_the_student_gives_its_bytes(faces):
    """Which also shows that nothing in it waits for the GPU: that cannot be recorded."""
    student, out = prepare(Student.load("tiny", merge=True), choose_device("cuda"), "bf16"), []
    y = faces[:1].cuda()
    with torch.inference_mode():
        replay = as_graph(lambda: out.append(student(y)))
        y.copy_(faces[1:2])
        replay()
        assert torch.equal(out[-1], student(faces[1:2].cuda()))


# --- the offline pass -----------------------------------------------------------------------------------------------------


def make_cache(small_config, root, out, device, precision="fp32"):
    data = root / "faces"
    if not data.exists():
        data.mkdir()
        for i in range(8):
            small = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(i))
            x = torch.nn.functional.interpolate(small, size=64, mode="bicubic")[0].clamp(0, 1)
            write_image(data / f"{i}.png", x)
    device, names = choose_device(device), sorted(p.name for p in data.iterdir())
    pmrf = prepare(PMRF.from_pretrained(small_config["teacher"]), device, precision)
    vae = prepare(load_vae(small_config), device, "fp32")
    options = (small_config["preset"], 64, 0, 5, ["difface"], 1, 4, precision)
    settings = cache.settings_for(pmrf, vae, data, names, *options)
    cache.build(pmrf, vae, data, names, root / out, settings, workers=4)
    return root / out


@pytest.fixture(scope="module")
def small_cache(small_config, tmp_path_factory):
    return make_cache(small_config, tmp_path_factory.mktemp("cache"), "cache", "cuda")


def columns(folder):
    data = cache.CacheDataset(folder)
    return [torch.stack([data[i][name] for i in range(len(data))]) for name in ("y", "x_target", "z_lq", "z_target")]


def test_a_cache_made_twice_has_the_same_bytes_and_those_of_the_cpu_within_rounding(small_config, small_cache):
    root = small_cache.parent
    again = make_cache(small_config, root, "again", "cuda")
    for shard in small_cache.glob("shard_*"):
        assert shard.read_bytes() == (again / shard.name).read_bytes()
    (y, x, z_y, z), (y_cpu, x_cpu, z_y_cpu, z_cpu) = (
        columns(folder) for folder in (small_cache, make_cache(small_config, root, "cpu", "cpu"))
    )
    assert torch.equal(y, y_cpu)  # degraded on the CPU in both
    assert (x - x_cpu).abs().mean() < 0.1 / 255 and (z_y - z_y_cpu).abs().mean() < 5e-3 * z_y_cpu.std()
    x_bf16 = columns(make_cache(small_config, root, "bf16", "cuda", "bf16"))[1]
    assert 0 < (x_bf16 - x).abs().mean() < 0.5 / 255


# --- the two stages -------------------------------------------------------------------------------------------------------


def arguments(small_cache, out, *more, stage="A"):
    common = ["--stage", stage, "--cache", str(small_cache), "--out", str(out), "--batch", "4", "--log-every", "1"]
    return [*common, "--sgcl-every", "2", *map(str, more)]


def run_here(*argv):
    assert train.main(train.parse_args(list(argv))) == 0


def losses(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return torch.tensor([[line["raw"][k] for k in ("lat", "lpips", "l1", "sgcl")] for line in lines])


def test_both_stages_make_the_steps_of_the_cpu_and_stay_close_in_bf16(small_cache, tmp_path, monkeypatch):
    more = {"A": ("--steps", 4), "B": ("--steps", 4, "--init", tmp_path / "fp32_A")}
    for stage in "AB":
        for precision in ("fp32", "bf16"):
            out = tmp_path / f"{precision}_{stage}"
            run_here(*arguments(small_cache, out, *more[stage], "--precision", precision, stage=stage))
        with monkeypatch.context() as m:
            m.setattr(torch.cuda, "is_available", lambda: False)
            run_here(*arguments(small_cache, tmp_path / f"cpu_{stage}", *more[stage], stage=stage))
        cpu, fp32, bf16 = (losses(tmp_path / f"{name}_{stage}") for name in ("cpu", "fp32", "bf16"))
        torch.testing.assert_close(fp32, cpu, rtol=0.02, atol=1e-4)
        torch.testing.assert_close(bf16, fp32, rtol=0.1, atol=1e-3)


@pytest.mark.parametrize("stage", ["A", "B"])
def test_a_step_that_does_not_log_never_waits_for_the_gpu(small_cache, tmp_path, stage):
    run_here(*arguments(small_cache, tmp_path / "a", "--steps", 1))
    more = ("--init", str(tmp_path / "a")) if stage == "B" else ()
    run = train.Run(train.parse_args(arguments(small_cache, tmp_path / "run", *more, stage=stage)))
    batch = next(iter(torch.utils.data.DataLoader(run.data, batch_size=4)))
    try:
        for step in (1, 2, 3, 4):  # SGCL in the even ones
            on_gpu = {k: v if k == "index" else v.to(run.device) for k, v in batch.items()}
            torch.cuda.set_sync_debug_mode("default" if step < 3 else "error")  # what is made once may wait
            with run.autocast():
                terms = train.objective(run.one_step, run.student, run.teacher, run.lpips_fn, on_gpu, step, run.args)
            train.total_loss(terms, dict.fromkeys(terms, 1.0)).backward()
            torch.nn.utils.clip_grad_norm_(run.trained.values(), 1.0)
            run.optimizer.step()
            run.optimizer.zero_grad()
            train.update_ema(run.ema, run.trained, step)
            torch.cuda.set_sync_debug_mode("default")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert set(terms) == {"lat", "lpips", "l1", "sgcl"}


def test_a_killed_run_goes_on(small_cache, tmp_path):
    """kill -9 in the middle, then the same command: the losses are those of an unbroken run within a GPU's rounding."""
    more = ("--steps", 20, "--save-every", 2, "--precision", "fp32", "--lr", "2e-5")
    run_here(*arguments(small_cache, tmp_path / "whole", *more))
    killed = tmp_path / "killed"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    argv = [sys.executable, "train.py", *arguments(small_cache, killed, *more)]
    process = subprocess.Popen(argv, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    while process.poll() is None and not steps_in(killed):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < len(steps_in(killed)) and steps_in(killed)[-1].name < "step-000020"
    run_here(*arguments(small_cache, killed, "--resume", *more))
    assert len(losses(killed)) == 20
    torch.testing.assert_close(losses(killed), losses(tmp_path / "whole"), rtol=1e-2, atol=1e-4)
