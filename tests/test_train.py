"""The two stages: what moves and what must not, Eq. 6 end to end, resuming, several processes, and bad input."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import torchruns_variables
from safetensors.torch import load_file

import cache
import sgcl
import train
from plumbing import commands, published, runs
from plumbing.batches import Batches, generator
from plumbing.pictures import write_image
from plumbing.published import load_lpips, load_vae
from plumbing.runs import steps_in
from student import Student
from teacher import PMRF
from train import Run

ROOT = Path(__file__).resolve().parent.parent
LPIPS = functools.cache(load_lpips)


@pytest.fixture(autouse=True)
def script(monkeypatch):
    """Faults begin with the script's name, as on the command line. LPIPS, frozen, is loaded once for all tests."""
    monkeypatch.setattr(commands, "SCRIPT", "train.py")
    monkeypatch.setattr(train, "load_lpips", LPIPS)


@pytest.fixture(scope="session")
def small_cache(small_config, tmp_path_factory):
    """Eight random pictures through the whole offline pass, two teacher steps."""
    return make_cache(small_config, tmp_path_factory.mktemp("cache"), steps=2)


def make_cache(small_config, root, steps):
    (root / "faces").mkdir()
    for i in range(8):
        small = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(i))
        write_image(
            root / "faces" / f"{i}.png", torch.nn.functional.interpolate(small, size=64, mode="bicubic")[0].clamp(0, 1)
        )
    names = sorted(p.name for p in (root / "faces").iterdir())
    pmrf, vae = PMRF.from_pretrained(small_config["teacher"]), load_vae(small_config)
    settings = cache.settings_for(
        pmrf, vae, root / "faces", names, small_config["preset"], 64, 0, steps, ["difface"], 1, 4
    )
    cache.build(pmrf, vae, root / "faces", names, root / "cache", settings)
    return root / "cache"


def arguments(small_cache, out, *more, stage="A"):
    return ["--stage", stage, "--cache", str(small_cache), "--out", str(out), "--batch", "4", "--log-every", "1", *more]


def run_here(*argv):
    assert train.main(train.parse_args(list(map(str, argv)))) == 0


def weights(run):
    """All safetensors of a run's newest checkpoint, by file name: EMA, raw weights, moments."""
    step = steps_in(run)[-1]
    files = sorted(step.rglob("*.safetensors"))
    return {f"{f.relative_to(step)}:{k}": v for f in files for k, v in load_file(f).items()}


def log(run):
    """The lines of a run's log, without the seconds, in which no two runs agree."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert all(line.pop("seconds") > 0 for line in lines)
    return lines


@pytest.fixture(scope="module")
def stage_a(small_cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "stage_a"
    run_here(*arguments(small_cache, out, "--steps", "12", "--save-every", "4", "--sgcl-every", "2"))
    return out


def test_eq6_latent_and_l1_terms_by_numpy():
    a, b = np.random.default_rng(0).normal(size=(2, 2, 4, 3, 3)).astype(np.float32)
    assert train.latent_loss(torch.tensor(a), torch.tensor(b)).item() == pytest.approx(((a - b) ** 2).mean(), rel=1e-5)
    assert train.l1_loss(torch.tensor(a), torch.tensor(b)).item() == pytest.approx(np.abs(a - b).mean(), rel=1e-5)
    with pytest.raises(ValueError, match="one shape"):
        train.latent_loss(torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 1))


def test_eq6_is_the_weighted_sum_and_its_gradient():
    x = torch.tensor(2.0, requires_grad=True)
    terms = {"lat": x**2, "lpips": 3 * x, "l1": x**3, "sgcl": 1 / x}
    lambdas = {"lat": 1.0, "lpips": 0.5, "l1": 2.0, "sgcl": 0.1}
    total = train.total_loss(terms, lambdas)
    assert total.item() == pytest.approx(4 + 3 + 16 + 0.05)
    total.backward()
    assert x.grad.item() == pytest.approx(2 * 2 + 1.5 + 2 * 3 * 4 - 0.1 / 4)
    assert train.total_loss({"lat": x**2}, lambdas).item() == pytest.approx(4)


def test_eq6_lpips_is_offline_a_distance_and_follows_its_definition():
    """sum over layers of mean over places of w . (unit features' difference)^2, written out from the network's own layers."""
    lpips_fn = load_lpips()
    g = torch.Generator().manual_seed(0)
    x = torch.rand(1, 3, 64, 64, generator=g)
    near, far = (x + s * torch.randn(x.shape, generator=g) for s in (0.02, 0.3))
    d = [train.lpips_loss(lpips_fn, x, other).item() for other in (x, near, far)]
    assert d[0] == 0 and 0 < d[1] < d[2]

    def features(z):
        h = ((2 * z - 1) - torch.tensor([-0.030, -0.088, -0.188])[:, None, None]) / torch.tensor([0.458, 0.448, 0.450])[
            :, None, None
        ]
        for s in range(1, 6):
            h = getattr(lpips_fn.net, f"slice{s}")(h)
            yield h / (h.norm(dim=1, keepdim=True) + 1e-10)

    layers = zip(features(x), features(far), strict=True)
    by_hand = sum((lpips_fn.lins[i].model[-1].weight * (a - b) ** 2).sum(1).mean() for i, (a, b) in enumerate(layers))
    assert d[2] == pytest.approx(by_hand.item(), rel=1e-4)
    assert lpips_fn.net.slice1[0].weight.std() > 0.05  # the shipped AlexNet, not random numbers
    assert not any(p.requires_grad for p in lpips_fn.parameters())


def test_eq6_lpips_gives_a_gradient_to_the_picture():
    x = torch.rand(1, 3, 64, 64, requires_grad=True)
    train.lpips_loss(load_lpips(), x, torch.rand(1, 3, 64, 64)).backward()
    assert x.grad.abs().sum() > 0


def test_missing_lpips_features_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(published, "LPIPS_FEATURES", tmp_path / "lpips_alex.safetensors")
    with pytest.raises(OSError, match="lpips_alex.*restore that folder"):
        load_lpips()


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


class Known:
    """Stands for the student, the VAE and the teacher, with answers that can be written down."""

    def __init__(self, mu):
        self.mu, self.vae, self.config, self.sigma_s, self.asked = (
            mu,
            self,
            SimpleNamespace(scaling_factor=0.5),
            0.1,
            [],
        )

    def parameters(self):
        yield torch.zeros(1)

    def decode(self, z):
        return SimpleNamespace(sample=z[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3))

    def posterior_mean(self, y):
        return 0.5 * y

    def velocity(self, x_t, t):
        self.asked.append((x_t, t))
        return (self.mu - x_t) / (1 - t)[:, None, None, None]  # all pictures are mu


@pytest.mark.parametrize("stage", ["A", "B"])
@pytest.mark.parametrize("source", ["gaussian", "mmse"])
def test_eq6_each_term_compares_what_the_paper_says(stage, source):
    """By hand: which tensor goes to which term, where the gradient goes, and when and where the teacher is asked."""
    g = torch.Generator().manual_seed(0)
    z_y, z_target = torch.randn(2, 5, 4, 2, 2, generator=g)
    y, x_target, mu = torch.rand(3, 5, 3, 16, 16, generator=g)
    batch = {"y": y, "z_lq": z_y, "z_target": z_target, "x_target": x_target, "index": torch.tensor([7, 3, 0, 9, 2])}
    known, z_hat = Known(mu), (2 * z_y).requires_grad_()
    argv = ["--stage", stage, "--sgcl-every", "2", "--sgcl-source", source, "--seed", "5", "--init", "x"]

    def terms(step, *more):
        args = train.parse_args(argv[: 8 if stage == "A" else 10] + list(more))
        return train.objective(
            lambda z, picture: z_hat if z is z_y and picture is y else None, known, known,
            lambda a, b, normalize: ((a - b) ** 2).mean((1, 2, 3)), batch, step, args,
        )  # fmt: skip

    x_hat = (known.decode(z_hat.detach() / 0.5).sample + 1) / 2
    expected = {
        "lat": ((z_hat - z_target) ** 2).mean(), "lpips": ((x_hat - x_target) ** 2).mean(),
        "l1": (x_hat - x_target).abs().mean(), "sgcl": ((x_hat - mu) ** 2).mean(),
    }  # fmt: skip
    got = terms(4)
    assert {k: v.item() for k, v in got.items()} == pytest.approx({k: v.item() for k, v in expected.items()}, rel=1e-5)
    assert all(torch.autograd.grad(v, z_hat, retain_graph=True)[0].abs().sum() > 0 for v in got.values())
    (x_t, t), *none = known.asked
    t_drawn, eps = sgcl.draw(sgcl.BANDS[stage], (3, 16, 16), [generator("sgcl", 5, 4, i) for i in (7, 3, 0, 9, 2)])
    assert torch.equal(t, t_drawn) and not none and not x_t.requires_grad
    start = eps if source == "gaussian" else 0.5 * y + 0.1 * eps
    tb = t[:, None, None, None]
    assert torch.allclose(x_t, tb * x_hat + (1 - tb) * start, atol=1e-6)
    assert terms(3).keys() == {"lat", "lpips", "l1"} == terms(4, "--lambda-sgcl", "0").keys()
    only = [v for name in ("lpips", "l1", "sgcl") for v in (f"--lambda-{name}", "0")]
    assert terms(4, *only).keys() == {"lat"} and len(known.asked) == 1


def test_sec4_adamw_with_the_papers_decay_on_a_clipped_gradient(small_cache, tmp_path):
    run = Run(train.parse_args(arguments(small_cache, tmp_path / "x", "--steps", "1", "--lambda-lat", "1e4")))
    run.args.out.mkdir()
    train.optimize(run, 0)
    (group,) = run.optimizer.param_groups
    assert type(run.optimizer) is torch.optim.AdamW
    assert (group["weight_decay"], group["betas"], group["eps"]) == (5e-5, (0.9, 0.999), 1e-8)
    gradient = torch.cat([10 * run.optimizer.state[p]["exp_avg"].flatten() for p in run.trained.values()])
    assert gradient.norm().item() == pytest.approx(1, rel=1e-3)


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


def test_a_gradient_that_is_not_finite_reaches_no_weight(small_cache, tmp_path, capsys):
    """A finite loss can have a gradient that is not; the checkpoint of that step would then be lost without a word."""
    args = train.parse_args(arguments(small_cache, tmp_path / "x", "--steps", "3", "--save-every", "1"))
    run = Run(args)
    args.out.mkdir()
    before = {name: p.detach().clone() for name, p in run.trained.items()}
    run.student.visual_encoder.blocks[0].weight.register_hook(lambda g: g * float("inf"))
    with pytest.raises(ValueError, match="'norm of the gradient' is (nan|inf) at step 1; there is no checkpoint yet"):
        train.optimize(run, 0)
    assert all(torch.equal(p, before[name]) for name, p in run.trained.items())


def test_each_stage_begins_at_the_presets_rate(small_cache, tmp_path):
    """--lr of Stage A says nothing about Stage B, whose default is the preset's again."""
    run_here(*arguments(small_cache, tmp_path / "a", "--steps", "1", "--lr", "3e-4"))
    run_here(*arguments(small_cache, tmp_path / "b", "--steps", "1", "--init", tmp_path / "a", stage="B"))
    assert log(tmp_path / "a")[0]["lr"] == 3e-4 and log(tmp_path / "b")[0]["lr"] == 1e-3
    config = json.loads((steps_in(tmp_path / "a")[-1] / "config.json").read_text())
    assert config["lr"] == 1e-3 and config["peak_lr"] == 3e-4


def test_any_seed_below_2_to_the_63_works_and_others_are_refused(small_cache, tmp_path):
    run_here(*arguments(small_cache, tmp_path / "x", "--steps", "1", "--sgcl-every", "1", "--seed", str(2**63 - 1)))
    assert log(tmp_path / "x")[0]["raw"]["sgcl"] > 0
    far = range(10**6, 10**6 + 2)
    assert list(Batches(10, 4, 2**63 - 1, steps=far)) != list(Batches(10, 4, 2**62, steps=far))
    for wrong in (["--seed", "-1"], ["--seed", str(2**63)], ["--seed", "²"], ["--lr", "nan"], ["--lambda-l1", "-1"],
                  ["--steps", "1000000"], ["--lambda-lat", "0", "--lambda-lpips", "0", "--lambda-l1", "0", "--lambda-sgcl",
                  "0"]):  # fmt: skip
        with pytest.raises(SystemExit) as e:
            train.parse_args(["--stage", "A", *wrong])
        assert e.value.code == 2


def test_random_numbers_differ_from_key_to_key():
    keys = [
        ("sgcl", seed, step, i) for seed in (0, 1, 2**32, 2**62) for step in (0, 1, 999_999) for i in (0, 1, 69_999)
    ]
    numbers = {torch.rand(1, generator=generator(*key), dtype=torch.float64).item() for key in keys}
    assert len(numbers) == len(keys)
    assert torch.equal(torch.rand(3, generator=generator(*keys[5])), torch.rand(3, generator=generator(*keys[5])))


def test_a_run_goes_on_with_its_own_cache_networks_and_settings_alone(small_config, small_cache, tmp_path, capsys):
    def refusal(folder, *more):
        assert train.main(train.parse_args(arguments(folder, tmp_path / "run", "--steps", "2", *more))) == 1
        return capsys.readouterr().err.strip().splitlines()[-1]

    run_here(*arguments(small_cache, tmp_path / "run", "--steps", "2"))
    assert "precision = 'fp32'" in refusal(small_cache, "--precision", "bf16")
    other = make_cache(small_config, tmp_path, steps=1)
    assert "others: cache_steps = 2 (now 1)" in refusal(other)
    shutil.copytree(small_cache, tmp_path / "same settings")
    meta = json.loads((small_cache / "meta.json").read_text())

    def change(**more):
        (tmp_path / "same settings" / "meta.json").write_text(json.dumps(meta | more))

    change(shards=[meta["shards"][0] | {"sha256": "0" * 64}, *meta["shards"][1:]])
    assert "others: cache_shards_sha256" in refusal(tmp_path / "same settings")
    for name in ("vae", "teacher"):  # latents of another space; targets of another teacher
        change(**{f"{name}_sha256": "0" * 64})
        assert f"made with the preset's {name}" in refusal(tmp_path / "same settings")
        assert f"made with the preset's {name}" in refusal(tmp_path / "same settings", "--out", str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_batches_depend_on_seed_and_step_alone():
    whole = list(Batches(10, 4, 0, steps=range(9)))
    assert whole[3:] == list(Batches(10, 4, 0, steps=range(3, 9)))  # a resumed sampler goes on where it was
    assert sorted(sum(whole, [])[:10]) == list(range(10))  # an epoch sees each picture once
    halves = [list(Batches(10, 4, 0, rank, 2, steps=range(9))) for rank in (0, 1)]
    assert [a + b for a, b in zip(*halves, strict=True)] == whole
    quarters = list(Batches(10, 4, 0, accumulate=2, steps=range(9)))
    assert [a + b for a, b in zip(quarters[::2], quarters[1::2], strict=True)] == whole
    assert list(Batches(10, 4, 1, steps=range(9))) != whole


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


def watched_step(argv):
    """One training step. Returns how often a layer of each network ran in it, and the bytes kept for the backward pass."""
    run = Run(train.parse_args(list(map(str, argv))))
    run.args.out.mkdir()
    run.rank = 1  # no checkpoint: its picture would count as a run
    unet, spatial, vae = run.student.unet, run.student.spatial_encoder, run.student.vae
    blocks = {"unet": unet.mid_block, "spatial encoder": spatial.mid_block, "vae": vae.decoder.up_blocks[-1]}
    calls, storages = dict.fromkeys(blocks, 0), {}
    for name, block in blocks.items():

        def count(*_, name=name):
            calls[name] += 1

        block.resnets[-1].conv1.register_forward_hook(count)

    def keep(t):
        if not isinstance(t, torch.nn.Parameter):
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        train.optimize(run, 0)
    gradient = torch.cat([run.optimizer.state[p]["exp_avg"].flatten() for p in run.trained.values()])
    return calls, sum(storage.nbytes() for storage in storages.values()), gradient


@pytest.mark.parametrize("stage", ["A", "B"])
def test_checkpointing_recomputes_all_three_networks_and_keeps_less(small_cache, stage_a, tmp_path, stage):
    more = ["--steps", "1", "--precision", "bf16", *(["--init", stage_a] if stage == "B" else [])]
    calls, kept, gradient = watched_step(arguments(small_cache, tmp_path / "1", *more, stage=stage))
    assert calls == {"unet": 1, "spatial encoder": 1, "vae": 1}
    more.append("--checkpointing")
    calls, kept_less, same = watched_step(arguments(small_cache, tmp_path / "2", *more, stage=stage))
    assert calls == {"unet": 2, "spatial encoder": 2, "vae": 2}
    assert kept_less < 0.5 * kept
    assert (same - gradient).abs().max() < 1e-6  # recomputed under the same autocast


def test_bf16_keeps_weights_losses_ema_and_latents_in_float32(small_cache, tmp_path, monkeypatch):
    """Only products are in bf16: close to the float32 step, not equal to it, and LPIPS is the very same function."""
    kinds, lpips_inputs, mean = {}, [], runs.Log.mean

    def spy(log, values):
        kinds.update({name: value.dtype for name, value in values.items()})
        return mean(log, values)

    monkeypatch.setattr(runs.Log, "mean", spy)
    real = train.lpips_loss
    monkeypatch.setattr(
        train, "lpips_loss", lambda f, a, b: (lpips_inputs.append((f, a.detach(), b)), real(f, a, b))[1]
    )
    for name in ("fp32", "bf16"):
        run_here(
            *arguments(small_cache, tmp_path / name, "--steps", "1", "--sgcl-every", "1", "--precision", name),
        )
    assert kinds == dict.fromkeys(("lat", "lpips", "l1", "sgcl", "norm of the gradient"), torch.float32)
    lpips_fn, x_hat, x_target = lpips_inputs[-1]
    assert x_hat.dtype == torch.float32 and x_hat.to(torch.bfloat16).ne(x_hat).any()  # (x + 1) / 2 is in float32
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert real(lpips_fn, x_hat, x_target).item() == log(tmp_path / "bf16")[0]["raw"]["lpips"]
    assert real(lpips_fn, x_hat, x_target).item() == pytest.approx(log(tmp_path / "bf16")[0]["raw"]["lpips"], rel=1e-6)
    one, half = weights(tmp_path / "fp32"), weights(tmp_path / "bf16")
    assert {v.dtype for v in half.values()} == {torch.float32}
    a, b = (torch.cat([w[k].flatten() for k in sorted(w) if ":exp_avg." in k]) for w in (one, half))
    assert 0.95 < torch.cosine_similarity(a, b, dim=0) and 0 < (a - b).norm() / a.norm() < 0.3


def test_a_killed_run_goes_on_to_the_same_bits(small_cache, tmp_path, start_script):
    """kill -9 in the middle, then the same command: weights, EMA and moments equal those of an unbroken run."""
    torch.set_num_threads(1)
    try:
        more = ("--steps", "10", "--save-every", "2", "--lambda-lpips", "0", "--sgcl-every", "2")
        run_here(*arguments(small_cache, tmp_path / "whole", *more))
        killed = tmp_path / "killed"
        process = start_script("train.py", *arguments(small_cache, killed, *more), err=tmp_path / "err")
        while process.is_alive() and len(steps_in(killed)) < 1:
            time.sleep(0.01)
        process.kill()
        process.join()
        assert steps_in(killed) and steps_in(killed)[-1].name < "step-000010"
        with open(killed / "log.jsonl", "a") as f:  # steps after the last checkpoint, the last line cut
            f.write('{"step": 9, "weighted": {}}\n{"step": 10, "we')
        run_here(*arguments(small_cache, killed, "--resume", *more))
    finally:
        torch.set_num_threads(2)
    a, b = weights(tmp_path / "whole"), weights(killed)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert log(tmp_path / "whole") == log(killed)


def test_two_processes_make_the_steps_of_one(small_cache, tmp_path, start_script):
    """At the paper's rate: AdamW turns rounding in a gradient of nothing into a whole step, so a high rate would show it.

    L1's gradient has a jump where a pixel is right: with seed 0 rounding takes one pixel over it, with seed 1 none.
    """
    more = ("--steps", "4", "--sgcl-every", "1", "--lr", "2e-5", "--seed", "1")
    two, errs = tmp_path / "two", [tmp_path / "err_0", tmp_path / "err_1"]
    processes = [
        start_script("train.py", *arguments(small_cache, two, *more), err=err, **own)
        for err, own in zip(errs, torchruns_variables(2), strict=True)
    ]
    run_here(*arguments(small_cache, tmp_path / "one", *more))
    for process, err in zip(processes, errs, strict=True):
        process.join(240)
        assert process.exitcode == 0, err.read_text()
        assert "broadcast_buffers" not in err.read_text()
    a, b = weights(tmp_path / "one"), weights(two)
    assert gap(a, b, "weight") < 1e-5 and gap(a, b, "exp_avg") < 1e-6
    one, two = log(tmp_path / "one"), log(two)  # of the whole batch, however many processes share it
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-5)
    assert [line["raw"] for line in two] == [pytest.approx(line["raw"], rel=1e-4) for line in one]


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
    real = train.l1_loss
    calls = iter([1.0, 1.0, float("nan")])
    monkeypatch.setattr(train, "l1_loss", lambda a, b: real(a, b) * next(calls))
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
    err = capsys.readouterr().err
    assert "No space left" in err and "goes on from" in err and "x/step-000002" in err
    assert [p.name for p in (tmp_path / "x").iterdir() if p.is_dir()] == ["step-000002"]
    argv = arguments(small_cache, tmp_path / "y", "--steps", "4")
    assert train.main(train.parse_args(argv)) == 1  # the first checkpoint: there is none before it
    assert "the same command begins anew" in capsys.readouterr().err and not steps_in(tmp_path / "y")


def test_two_trainings_do_not_share_a_folder(small_cache, stage_a, tmp_path, capsys):
    out = tmp_path / "x"
    argv = arguments(small_cache, out, "--steps", "1", "--lambda-sgcl", "0")
    with runs.alone(out, 0):
        for _ in range(2):  # a refusal leaves the lock with its owner
            assert train.main(train.parse_args(argv)) == 1
    err = capsys.readouterr().err.strip().splitlines()
    assert "another process is training into" in err[-1] and not list(out.iterdir())
    with runs.alone(out, 0), runs.alone(tmp_path / "y", 0), runs.alone(out, 1):
        pass  # other folders, and the other processes of this training
    run_here(*argv)


def test_a_data_worker_that_outlives_a_killed_training_does_not_hold_its_folder(tmp_path):
    """On a GPU four of them read ahead. They notice within seconds that the training is gone."""
    ends, out = os.pipe(), tmp_path / "run"
    if not (training := os.fork()):
        with runs.alone(out, 0):
            if worker := os.fork():
                os.write(ends[1], b"%d" % worker)
            time.sleep(60)
            os._exit(0)
    worker = int(os.read(ends[0], 20))
    try:
        with pytest.raises(ValueError, match="another process"), runs.alone(out, 0):
            pass
        os.kill(training, signal.SIGKILL)
        os.waitpid(training, 0)
        with runs.alone(out, 0):
            os.kill(worker, 0)  # it is still there
    finally:
        os.kill(worker, signal.SIGKILL)


def test_init_is_the_same_folder_by_any_path(small_cache, stage_a, tmp_path, monkeypatch, capsys):
    more = ("--steps", "1", "--lambda-sgcl", "0", "--lambda-lpips", "0", "--lambda-l1", "0")
    monkeypatch.chdir(stage_a.parent)
    run_here(*arguments(small_cache, tmp_path / "b", *more, "--init", stage_a.name, stage="B"))
    run_here(*arguments(small_cache, tmp_path / "b", *more, "--init", stage_a, stage="B"))
    assert "nothing to do" in capsys.readouterr().out
    other = shutil.copytree(stage_a, tmp_path / "other")
    argv = arguments(small_cache, tmp_path / "b", *more, "--init", other, stage="B")
    assert train.main(train.parse_args(list(map(str, argv)))) == 1 and "init = " in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_out_of_memory_is_one_line_that_says_what_to_do(small_cache, tmp_path, monkeypatch, capsys, kind):
    def full(*_):
        if kind == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return torch.empty(2**60)  # more than any machine has: PyTorch's own error

    monkeypatch.setattr(train, "decode", full)
    assert train.main(train.parse_args(arguments(small_cache, tmp_path / "x", "--accumulate", "2"))) == 1
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert "expected enough memory" in err and "--batch 4 --accumulate 2" in err and "give --checkpointing" in err


def test_an_error_of_the_code_itself_is_not_hidden(small_cache, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "decode", lambda *_: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        train.main(train.parse_args(arguments(small_cache, tmp_path / "x")))


def test_ctrl_c_inside_a_library_is_no_fault(small_cache, tmp_path, monkeypatch, capsys):
    """Its exit may come back as the library's own error."""
    before = signal.getsignal(signal.SIGINT)

    def reading(*_):
        with pytest.raises(SystemExit):
            commands.interruption("")()
        raise OSError("what a library made of it")

    monkeypatch.setattr(train, "decode", reading)
    try:
        assert train.main(train.parse_args(arguments(small_cache, tmp_path / "x"))) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert "library" not in capsys.readouterr().err


def test_ctrl_c_is_one_line_and_leaves_no_half_checkpoint(small_cache, tmp_path, start_script):
    out, more = tmp_path / "x", ("--steps", "5000", "--save-every", "1")
    process = start_script("train.py", *arguments(small_cache, out, *more), err=tmp_path / "err")
    while process.is_alive() and len(steps_in(out)) < 2:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    err = (tmp_path / "err").read_text()
    assert process.exitcode == 130 and "Traceback" not in err
    assert [line for line in err.splitlines() if line.startswith("train.py")] == [
        "train.py: interrupted; the same command goes on from the last checkpoint"
    ]
    assert not list(out.glob("*.tmp")) and steps_in(out)


def test_a_log_that_cannot_be_written_is_one_line(small_cache, tmp_path, capsys):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "log.jsonl").symlink_to("/dev/full")
    assert train.main(train.parse_args(arguments(small_cache, tmp_path / "x", "--steps", "1"))) == 1
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith("train.py: could not write") and "No space left on device" in err and "goes on" in err


def test_help_answers_at_once():
    start = time.perf_counter()
    done = subprocess.run([sys.executable, ROOT / "train.py", "-h"], capture_output=True, text=True)
    assert done.returncode == 0 and "--stage" in done.stdout
    assert time.perf_counter() - start < 3  # a second on a quiet machine
