"""The two stages: what moves and what must not, Eq. 6 end to end, resuming, several processes, and bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import cache
import train
from checkpoint import steps_in
from images import write_image
from run import Batches, Run
from student import Student, load_vae
from teacher import PMRF

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def small_cache(small_config, tmp_path_factory):
    """Eight random pictures through the whole offline pass, two teacher steps."""
    root = tmp_path_factory.mktemp("cache")
    (root / "faces").mkdir()
    for i in range(8):
        small = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(i))
        write_image(
            root / "faces" / f"{i}.png", torch.nn.functional.interpolate(small, size=64, mode="bicubic")[0].clamp(0, 1)
        )
    names = sorted(p.name for p in (root / "faces").iterdir())
    pmrf, vae = PMRF.from_pretrained(small_config["teacher"]), load_vae(small_config)
    settings = cache.settings_for(pmrf, vae, root / "faces", names, small_config["preset"], 64, 0, 2, "difface", 1, 4)
    cache.build(pmrf, vae, root / "faces", names, root / "cache", settings)
    return root / "cache"


def arguments(small_cache, out, *more, stage="A"):
    return ["--stage", stage, "--cache", str(small_cache), "--out", str(out), "--batch", "4", *more]


def run_here(*argv):
    assert train.main(train.parse_args(list(map(str, argv)))) == 0


def weights(run):
    """All safetensors of a run's newest checkpoint, by file name: EMA, raw weights, moments."""
    step = steps_in(run)[-1]
    files = sorted(step.rglob("*.safetensors"))
    return {f"{f.relative_to(step)}:{k}": v for f in files for k, v in load_file(f).items()}


def log(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def stage_a(small_cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "stage_a"
    run_here(*arguments(small_cache, out, "--steps", "12", "--save-every", "4", "--sgcl-every", "2"))
    return out


def test_eq6_terms_are_logged_raw_and_weighted_and_add_up(stage_a):
    lines = log(stage_a)
    assert [line["step"] for line in lines] == list(range(1, 13))
    for line in lines:
        assert line["loss"] == pytest.approx(sum(line["weighted"].values()))
        lambdas = {"lat": 1.0, "lpips": 0.5, "l1": 1.0, "sgcl": 2 * 0.1}  # SGCL in every second step, twice as strong
        assert line["weighted"] == pytest.approx({k: lambdas[k] * v for k, v in line["raw"].items()})
        assert (line["raw"]["sgcl"] > 0) == (line["step"] % 2 == 0)
    assert np.mean([line["raw"]["lat"] for line in lines[-4:]]) < np.mean([line["raw"]["lat"] for line in lines[:4]])
    assert lines[0]["lr"] == pytest.approx(1e-3) and lines[6]["lr"] == pytest.approx(5e-4)  # cosine


def test_checkpoints_the_last_two_are_kept_and_a_grid_is_drawn(stage_a):
    assert sorted(p.name for p in stage_a.iterdir() if p.is_dir()) == ["step-000008", "step-000012"]
    assert steps_in(stage_a)[-1].name == "step-000012" and (stage_a / "grid.png").stat().st_size > 1000
    assert {p.suffix for p in stage_a.rglob("*") if p.is_file()} == {".json", ".jsonl", ".png", ".safetensors"}


def changed(argv):
    """Trains in this process and returns the names of the student's tensors that moved, and those that the stage trains."""
    run = Run(train.parse_args(list(map(str, argv))))
    run.args.out.mkdir()
    before = {k: v.clone() for k, v in run.student.state_dict().items()}
    train.optimize(run, 0)
    return {k for k, v in run.student.state_dict().items() if not torch.equal(v, before[k])}, set(run.trained)


def test_stage_a_then_b_move_only_what_sec4_says(small_cache, stage_a, tmp_path):
    """Everything frozen is the same to the bit after training; of what is trained, every tensor has moved."""
    moved, trained = changed(arguments(small_cache, tmp_path / "a", "--steps", "4"))
    assert moved == trained and {k.split(".")[0] for k in moved} == {"visual_encoder", "spatial_encoder", "adapter"}
    moved, trained = changed(arguments(small_cache, tmp_path / "b", "--init", stage_a, "--steps", "4", stage="B"))
    assert moved == trained and all("lora_" in k or k.startswith("adapter.") for k in moved)
    assert {k.split(".")[0] for k in moved} == {"unet", "adapter"}


def test_frozen_parts_have_no_gradient_and_no_optimizer_state(small_cache, tmp_path):
    args = train.parse_args(arguments(small_cache, tmp_path, "--steps", "1"))
    run = Run(args)
    (tmp_path).mkdir(exist_ok=True)
    clear = run.optimizer.zero_grad
    run.optimizer.zero_grad = lambda: None  # keep the gradients to look at
    train.optimize(run, 0)
    names = {n for n, p in run.student.named_parameters() if p.grad is not None}
    assert names == set(run.trained)
    assert {id(p) for p in run.optimizer.state} == {id(p) for p in run.trained.values()}
    assert not [p for p in run.teacher.parameters() if p.grad is not None]
    run.optimizer.zero_grad = clear
    train.optimize(run, 0)
    assert not [n for n, p in run.student.named_parameters() if p.grad is not None]  # none goes over into the next step


def test_ema_of_the_trained_parameters_by_hand():
    p = torch.nn.Parameter(torch.zeros(3))
    ema, expected = {"p": torch.zeros(3)}, 0.0
    for step in range(1, 30):
        p.data.fill_(step)
        train.update_ema(ema, {"p": p}, step)
        decay = min(0.999, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert ema["p"].numpy() == pytest.approx(expected, rel=1e-5)


def test_batches_depend_on_seed_and_step_alone():
    whole = list(Batches(10, 4, 0, 0, 9))
    assert whole[3:] == list(Batches(10, 4, 0, 3, 9))  # a resumed sampler goes on where it was
    assert sorted(sum(whole, [])[:10]) == list(range(10))  # an epoch sees each picture once
    halves = [list(Batches(10, 4, 0, 0, 9, rank, 2)) for rank in (0, 1)]
    assert [a + b for a, b in zip(*halves, strict=True)] == whole
    quarters = list(Batches(10, 4, 0, 0, 9, accumulate=2))
    assert [a + b for a, b in zip(quarters[::2], quarters[1::2], strict=True)] == whole
    assert list(Batches(10, 4, 1, 0, 9)) != whole


def gap(a, b, kind):
    """The largest deviation of two runs' tensors of a kind: "weight", "exp_avg", ..."""
    return max((a[k] - b[k]).abs().max().item() for k in a if f":{kind}." in k)


def test_accumulation_and_recomputation_give_the_same_gradient(small_cache, tmp_path):
    """After one step AdamW's first moment is a tenth of the gradient."""
    for name, more in (("one", []), ("two", ["--accumulate", "2"]), ("again", ["--checkpointing"])):
        run_here(*arguments(small_cache, tmp_path / name, "--steps", "1", "--sgcl-every", "1", *more))
    one = weights(tmp_path / "one")
    assert max(v.abs().max().item() for k, v in one.items() if ":exp_avg." in k) > 1e-3
    assert gap(one, weights(tmp_path / "two"), "exp_avg") < 1e-6
    assert gap(one, weights(tmp_path / "again"), "exp_avg") < 1e-6


def test_bf16_keeps_weights_losses_ema_and_latents_in_float32(small_cache, tmp_path, monkeypatch):
    """Only products are in bf16: close to the float32 step, not equal to it, and LPIPS is the very same function."""
    kinds, lpips_inputs = {}, []

    def spy(terms, *_):
        kinds.update({name: value.dtype for name, value in terms.items()})

    monkeypatch.setattr(train, "check_finite", spy)
    real = train.losses.lpips_loss
    monkeypatch.setattr(
        train.losses, "lpips_loss", lambda f, a, b: (lpips_inputs.append((f, a.detach(), b)), real(f, a, b))[1]
    )
    for name in ("fp32", "bf16"):
        run_here(
            *arguments(small_cache, tmp_path / name, "--steps", "1", "--sgcl-every", "1", "--precision", name),
        )
    assert kinds == dict.fromkeys(("lat", "lpips", "l1", "sgcl"), torch.float32)
    lpips_fn, x_hat, x_target = lpips_inputs[-1]
    assert x_hat.dtype == torch.float32 and x_hat.to(torch.bfloat16).ne(x_hat).any()  # (x + 1) / 2 is in float32
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert real(lpips_fn, x_hat, x_target).item() == log(tmp_path / "bf16")[0]["raw"]["lpips"]
    assert real(lpips_fn, x_hat, x_target).item() == pytest.approx(log(tmp_path / "bf16")[0]["raw"]["lpips"], rel=1e-6)
    one, half = weights(tmp_path / "fp32"), weights(tmp_path / "bf16")
    assert {v.dtype for v in half.values()} == {torch.float32}
    a, b = (torch.cat([w[k].flatten() for k in sorted(w) if ":exp_avg." in k]) for w in (one, half))
    assert 0.95 < torch.cosine_similarity(a, b, dim=0) and 0 < (a - b).norm() / a.norm() < 0.3


def command(*argv, **env):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | env
    return subprocess.Popen(
        [sys.executable, *map(str, argv)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_killed_run_goes_on_to_the_same_bits(small_cache, tmp_path):
    """kill -9 in the middle, then the same command: weights, EMA and moments equal those of an unbroken run."""
    torch.set_num_threads(1)
    try:
        more = ("--steps", "10", "--save-every", "2", "--lambda-lpips", "0", "--sgcl-every", "2")
        run_here(*arguments(small_cache, tmp_path / "whole", *more))
        killed = tmp_path / "killed"
        process = command("train.py", *arguments(small_cache, killed, *more))
        while process.poll() is None and len(steps_in(killed)) < 1:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert steps_in(killed) and steps_in(killed)[-1].name < "step-000010"
        with open(killed / "log.jsonl", "a") as f:  # steps after the last checkpoint, the last line cut
            f.write('{"step": 9, "weighted": {}}\n{"step": 10, "we')
        run_here(*arguments(small_cache, killed, "--resume", *more))
    finally:
        torch.set_num_threads(2)
    a, b = weights(tmp_path / "whole"), weights(killed)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert log(tmp_path / "whole") == log(killed)


def test_two_processes_make_the_steps_of_one(small_cache, tmp_path):
    """At the paper's rate: AdamW turns rounding in a gradient of nothing into a whole step, so a high rate would show it."""
    more = ("--steps", "4", "--sgcl-every", "1", "--lr", "2e-5")
    run_here(*arguments(small_cache, tmp_path / "one", *more))
    process = command(
        "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29533", "train.py",
        *arguments(small_cache, tmp_path / "two", *more),
    )  # fmt: skip
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    a, b = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert gap(a, b, "weight") < 1e-5 and gap(a, b, "exp_avg") < 1e-5
    assert len(log(tmp_path / "two")) == 4  # one log, rank 0's


def test_bad_input_is_one_line(small_cache, stage_a, tmp_path, capsys):
    def fails(*argv):
        assert train.main(train.parse_args(list(map(str, argv)))) == 1
        err = capsys.readouterr().err.strip().splitlines()
        return next(line for line in err if line.startswith("train.py:"))

    assert "finished cache" in fails(*arguments(tmp_path / "nothing", tmp_path / "x"))
    assert "multiple" in fails(*arguments(small_cache, tmp_path / "x", "--batch", "5", "--accumulate", "2"))
    assert "found none" in fails(*arguments(small_cache, tmp_path / "x", "--init", tmp_path / "no", stage="B"))
    assert "resume" in fails(*arguments(small_cache, tmp_path / "x", "--resume"))
    assert "seed = 0" in fails(*arguments(small_cache, stage_a, "--steps", "12", "--sgcl-every", "2", "--seed", "1"))
    assert "adapter" in fails(
        *arguments(small_cache, tmp_path / "x", "--init", stage_a, "--adapter", "none", stage="B")
    )
    for wrong in (
        ["--stage", "B"],
        ["--stage", "A", "--init", "x"],
        ["--stage", "A", "--batch", "0"],
        ["--stage", "C"],
    ):
        with pytest.raises(SystemExit) as e:
            train.parse_args(wrong)
        assert e.value.code == 2


def test_stage_b_wants_a_stage_a_checkpoint_of_the_caches_preset(small_cache, tmp_path, capsys):
    def refusal(init):
        argv = arguments(small_cache, tmp_path / "x", "--init", init, stage="B")
        assert train.main(train.parse_args(list(map(str, argv)))) == 1
        return capsys.readouterr().err

    assert "Stage A checkpoint" in refusal(ROOT / "tiny" / "student")  # of Stage B
    shutil.copytree(ROOT / "tiny" / "student", tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps(config | {"stage": "A"}))
    assert "cache of preset 'tiny'" in refusal(tmp_path / "a")
    assert not (tmp_path / "x").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_term(small_cache, tmp_path, monkeypatch, capsys):
    real = train.losses.l1_loss
    calls = iter([1.0, 1.0, float("nan")])
    monkeypatch.setattr(train.losses, "l1_loss", lambda a, b: real(a, b) * next(calls))
    argv = arguments(small_cache, tmp_path / "x", "--steps", "5", "--save-every", "2")
    assert train.main(train.parse_args(argv)) == 1
    err = capsys.readouterr().err
    assert "'l1' is nan at step 3" in err and "step-000002" in err
    assert len(log(tmp_path / "x")) == 2


def test_a_disk_that_is_full_keeps_the_checkpoints_before(small_cache, tmp_path, monkeypatch, capsys):
    argv = arguments(small_cache, tmp_path / "x", "--steps", "4", "--save-every", "2")
    real = Student.save

    def save(self, folder, **settings):
        if settings["step"] == 4:
            raise OSError(28, "No space left on device")
        return real(self, folder, **settings)

    monkeypatch.setattr(Student, "save", save)
    assert train.main(train.parse_args(argv)) == 1
    assert "No space left" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "x").iterdir() if p.is_dir()] == ["step-000002"]


def test_help_answers_at_once():
    start = time.perf_counter()
    process = command("train.py", "-h")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "--stage" in out
    assert time.perf_counter() - start < 3  # a second on a quiet machine
