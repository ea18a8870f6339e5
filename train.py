"""The two training stages (paper Sec. 3.4 Eq. 6, Sec. 4): from a cache of (z_lq, z_target) to a one-step restorer.

    Eq. 6   L = lambda_lat L_lat + lambda_lpips L_lpips + lambda_l1 L_l1 + lambda_sgcl L_sgcl         objective
    Sec. 4  Stage A trains the encoders and the adapter, Stage B the LoRA and the adapter        Student.set_stage
            AdamW, cosine decay, bf16, EMA 0.999                                                 Run, optimize, update_ema

    python train.py --stage A                            visual encoder + spatial encoder + adapter, UNet frozen
    python train.py --stage B --init runs/stage_a        LoRA + adapter, encoders frozen
    torchrun --nproc_per_node=8 train.py --stage A ...   the same on several GPUs; --batch is the global batch

The same command again goes on from the last checkpoint in --out. Every random number of a step depends on the seed, the
step and the picture alone. A killed run therefore goes on with the same steps, and two processes make the steps of one.
--out holds step-*/ (config.json and safetensors: the EMA weights, and training.safetensors to go on from; the last two are
kept), log.jsonl (the terms of Eq. 6, raw and weighted) and grid.png (LQ | student | X† of the cache's first pictures).
Images: (B, 3, H, W) float32 in [0, 1]. Latents: (B, C, h, w), VAE latents times their scaling factor.
"""

import argparse
import sys
from pathlib import Path

from plumbing import commands
from plumbing.presets import ADAPTERS, ENTRIES


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, whole, real = p.add_argument, commands.whole, commands.real
    add("--stage", choices=["A", "B"], required=True, help="what is trained (Sec. 4)")
    add("--cache", type=Path, default=Path("cache"), help="folder made by cache.py")
    add("--out", type=Path, help="the run's folder (default: runs/stage_a or runs/stage_b)")
    add("--init", type=Path, help="Stage B: the Stage A run or checkpoint to start from")
    add("--steps", type=whole(0, 999_999), default=1000, help="optimizer steps; 0 keeps the untrained student")
    add("--batch", type=whole(1, 10**6), default=16, help="pictures a step, over all processes (the paper: not given)")
    add("--accumulate", type=whole(1, 10**6), default=1, metavar="N", help="each process splits its share into N parts")
    add("--checkpointing", action="store_true", help="recompute activations in the backward pass: less memory")
    add("--precision", choices=["auto", "bf16", "fp32"], default="auto", help="auto: bf16 on a GPU (Sec. 4), else fp32")
    add("--seed", type=whole(0), default=0, help="of fresh layers, the pictures' order, SGCL's t and noise")
    add("--save-every", type=whole(1, 10**6), default=200, metavar="N", help="steps between checkpoints")
    add("--log-every", type=whole(1, 10**6), default=10, metavar="N", help="steps between lines of log.jsonl")
    add("--resume", action="store_true", help="fail if --out holds no checkpoint to go on from")
    add("--lr", type=real, help="peak learning rate of AdamW (default: the preset's; paper: 2e-5)")
    add("--lambda-lat", type=real, default=1.0, help="weight of the latent MSE in Eq. 6")
    add("--lambda-lpips", type=real, default=0.5, help="weight of LPIPS in Eq. 6")
    add("--lambda-l1", type=real, default=1.0, help="weight of L1 in Eq. 6")
    add("--lambda-sgcl", type=real, default=0.1, help="weight of SGCL in Eq. 6")
    add("--sgcl-every", type=whole(1, 10**6), default=4, metavar="N", help="SGCL in each N-th step, N times as strong")
    add("--sgcl-source", choices=["gaussian", "mmse"], default="gaussian", help="Eq. 7's noise, or PMRF's own source")
    add("--adapter", choices=ADAPTERS, help="Sec. 3.3.1 (default: the preset's, in Stage B that of Stage A)")
    add("--entry", choices=ENTRIES, help="z_tau of the one step (default: the preset's, in Stage B that of Stage A)")
    args = p.parse_args(argv)
    if args.stage == "B" and not args.init:
        p.error("--stage B starts from Stage A: expected --init RUN, such as --init runs/stage_a; got none")
    if args.stage == "A" and args.init:
        p.error("--init belongs to --stage B: Stage A starts from the published weights that the cache's preset names")
    if not (args.lambda_lat or args.lambda_lpips or args.lambda_l1 or args.lambda_sgcl):
        p.error("expected one of the four weights of Eq. 6 above 0, got --lambda-... 0 for all")
    args.out = args.out or Path("runs") / f"stage_{args.stage.lower()}"
    return args


if __name__ == "__main__":
    ARGS = commands.begin(parse_args, "the same command goes on from the last checkpoint")

import contextlib
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import sgcl
from plumbing import devices, runs
from plumbing.batches import Batches, generator, loader
from plumbing.presets import load_config, locate
from plumbing.published import load_lpips
from plumbing.shards import CacheDataset
from student import Student, decode
from teacher import PMRF

# --- Eq. 6, the objective -----------------------------------------------------------------------------------------------


def latent_loss(z_hat, z_target):
    """Mean squared distance of two latents (B, C, h, w), L_lat of Eq. 6 ("the primary anchor"). ValueError if shapes differ."""
    if z_hat.shape != z_target.shape:
        raise ValueError(f"expected two latents of one shape, got {tuple(z_hat.shape)} and {tuple(z_target.shape)}")
    return F.mse_loss(z_hat.float(), z_target.float())


def lpips_loss(lpips_fn, x_hat, x_target):
    """Learned perceptual distance (LPIPS, AlexNet) of x_hat to X†, L_lpips of Eq. 6; images in [0, 1]. A scalar.

    Always in float32: it compares features that are nearly equal, and costs little beside the decoder.
    """
    with torch.autocast(x_hat.device.type, enabled=False):
        return lpips_fn(x_hat.float(), x_target.float(), normalize=True).mean()


def l1_loss(x_hat, x_target):
    """Mean absolute distance of the decoded picture to the teacher's picture X†, L_l1 of Eq. 6. Returns a scalar."""
    return F.l1_loss(x_hat.float(), x_target.float())


def objective(one_step, student, teacher, lpips_fn, batch, step, args):
    """The terms of Eq. 6 for one batch of the cache, in the paper's order: a dict of scalars."""
    y, z_y, z_target, x_target = (batch[k] for k in ("y", "z_lq", "z_target", "x_target"))  # x_target: X†
    z_hat = one_step(z_y, y)  # Eq. 5
    terms = {"lat": latent_loss(z_hat, z_target)}
    if not (args.lambda_lpips or args.lambda_l1 or args.lambda_sgcl):
        return terms  # "latent only" of the ablation: no picture is decoded
    x_hat = decode(student.vae, z_hat)  # with gradient: the pixel terms train the latent
    terms["lpips"] = lpips_loss(lpips_fn, x_hat, x_target)
    terms["l1"] = l1_loss(x_hat, x_target)
    if args.lambda_sgcl and step % args.sgcl_every == 0:
        generators = [generator("sgcl", args.seed, step, i) for i in batch["index"].tolist()]
        drawn = sgcl.draw(sgcl.BANDS[args.stage], x_hat.shape[1:], generators)
        t, eps = (v.to(x_hat.device, non_blocking=True) for v in drawn)
        mmse = args.sgcl_source == "mmse"
        source = sgcl.mmse_source(teacher.posterior_mean(y), eps, teacher.sigma_s) if mmse else eps
        terms["sgcl"] = sgcl.sgcl_loss(x_hat, teacher.velocity, t, source)  # Eq. 7-9
    return terms


def total_loss(terms, lambdas):
    """Eq. 6: the weighted sum of the terms. terms, lambdas: dicts with the same names; a term may be absent (a scalar each)."""
    return sum(lambdas[name] * value for name, value in terms.items())


def lambdas_of(args):
    """The lambdas of Eq. 6. SGCL, in every n-th step ("applied sparsely", Sec. 4), is n times as strong: lambda on average."""
    lambdas = {"lat": args.lambda_lat, "lpips": args.lambda_lpips, "l1": args.lambda_l1}
    return lambdas | {"sgcl": args.sgcl_every * args.lambda_sgcl}


# --- Sec. 4, what a stage starts from and trains ------------------------------------------------------------------------


def initial_student(args, meta):
    """Stage A starts from the published weights of the cache's preset, Stage B from Stage A's EMA weights."""
    torch.manual_seed(args.seed)  # fresh layers: the same in every process
    if args.stage == "B":
        runs.check_init(load_config(args.init), args, meta)
        return Student.load(args.init)
    config = load_config(meta["preset"])
    return Student.from_published(config | {k: v for k in ("adapter", "entry") if (v := getattr(args, k))})


class OneStep(nn.Module):
    """The student's Eq. 5 as the forward of a module, which is what DistributedDataParallel can wrap."""

    def __init__(self, student):
        super().__init__()
        self.student = student

    def forward(self, z_y, y):
        return self.student.step(z_y, y)


class Run:
    """What one process trains with: the cache, the networks, AdamW and the average."""

    def __init__(self, args):
        self.args, (self.rank, self.world) = args, devices.processes()
        self.device = devices.choose_device(known=("cuda", "cpu"))
        self.data = CacheDataset(args.cache)
        self.batches = Batches(len(self.data), args.batch, args.seed, self.rank, self.world, args.accumulate)
        self.student = initial_student(args, self.data.meta).to(self.device)
        self.teacher = self.lpips_fn = None  # the frozen critics of Eq. 6, each where it is needed
        if args.lambda_sgcl:
            self.teacher = PMRF.from_pretrained(locate(self.student.config["teacher"])).to(self.device)
            self.teacher.requires_grad_(False)
        if args.lambda_lpips or args.lambda_l1 or args.lambda_sgcl:
            self.lpips_fn = load_lpips().to(self.device)
        runs.check_networks(args.cache, self.data.meta, vae=self.student.vae, teacher=self.teacher)
        gpu = self.device.type == "cuda"
        args.precision = ("bf16" if gpu else "fp32") if args.precision == "auto" else args.precision
        args.lr = self.student.config["lr"] if args.lr is None else args.lr
        self.settings = runs.settings(args, self.student.config, self.data.meta)
        self.trained = self.student.set_stage(args.stage)  # {name: parameter}; all else is frozen
        if args.checkpointing:  # the backward pass computes the activations again
            for part in (self.student.unet, self.student.spatial_encoder, self.student.vae):
                if part._supports_gradient_checkpointing:  # all but the tiny preset's autoencoder
                    part.enable_gradient_checkpointing()
        self.ema = {name: p.detach().clone() for name, p in self.trained.items()}
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=args.lr, weight_decay=5e-5, fused=gpu)
        self.one_step = OneStep(self.student)

    def autocast(self):
        """Matrix products and convolutions in bf16 (Sec. 4), or nothing. Weights, latents, losses and EMA stay float32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.precision == "bf16")


# --- Sec. 4, the training step ------------------------------------------------------------------------------------------


def set_rate(optimizer, peak, step, steps):
    """Cosine decay from the peak at the first step to zero after the last (Sec. 4). Returns the rate of this step."""
    lr = peak * 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def update_ema(ema, trained, step, decay=0.999):
    """ema = decay ema + (1 - decay) weights, for the trained parameters only (Sec. 4: EMA 0.999).

    The decay rises to 0.999 as (1 + step) / (10 + step), so that the average of a short run is not its untrained start.
    """
    decay = min(decay, (1 + step) / (10 + step))
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.values()), [p.detach() for p in trained.values()], 1 - decay)


def optimize(run, first):
    """Steps first + 1 ... args.steps, each in the paper's order: Eq. 5-9, backward, AdamW with cosine decay, EMA."""
    args, lambdas, log = run.args, lambdas_of(run.args), runs.Log(run.args.out, run.rank, run.world, first)
    run.batches.steps = range(first, args.steps)
    batches = iter(loader(run.data, run.batches, run.device))
    bar = tqdm(range(first + 1, args.steps + 1), f"Stage {args.stage}", args.steps, initial=first, disable=run.rank > 0)
    for step in bar:
        lr, raw = set_rate(run.optimizer, args.lr, step, args.steps), {}
        for part in range(1, args.accumulate + 1):
            batch = next(batches)  # the pictures' numbers stay on the CPU: to ask a GPU for them is to wait for it
            batch |= {k: v.to(run.device, non_blocking=True) for k, v in batch.items() if k != "index"}
            more = run.world > 1 and part < args.accumulate  # until the last part, gradients stay on their process
            with run.one_step.no_sync() if more else contextlib.nullcontext():
                with run.autocast():
                    terms = objective(run.one_step, run.student, run.teacher, run.lpips_fn, batch, step, args)
                (total_loss(terms, lambdas) / args.accumulate).backward()  # Eq. 6
            raw = {name: raw.get(name, 0) + value.detach() / args.accumulate for name, value in terms.items()}
        norm = nn.utils.clip_grad_norm_(run.trained.values(), 1.0)
        saves = step % args.save_every == 0 or step == args.steps
        logs = saves or step % args.log_every == 0  # in the other steps a GPU is never waited for
        if logs:
            raw = log.mean(raw | {"norm of the gradient": norm})
            check_finite(raw, step, args.out)  # before it reaches the weights
            bar.set_postfix(loss=log.write(step, lr, {k: raw[k] for k in terms}, lambdas), refresh=False)
        run.optimizer.step()
        run.optimizer.zero_grad()
        update_ema(run.ema, run.trained, step)
        if saves:
            save(run, step)


def check_finite(values, step, out):
    """ValueError that names the step, the value and the last good checkpoint if a value is NaN or infinite."""
    for name, value in values.items():
        if not math.isfinite(value):
            good = runs.steps_in(out)
            kept = f"the last good checkpoint is {good[-1]}" if good else "there is no checkpoint yet"
            raise ValueError(f"{name!r} is {value} at step {step}; {kept}: lower --lr or raise --batch")


# --- a run, from the cache to the last checkpoint -----------------------------------------------------------------------


def save(run, step):
    """A checkpoint of this step and the sample grid, by the first process."""

    def fill(folder):
        runs.save_training(folder / "training.safetensors", run.trained, run.optimizer)
        with runs.averaged(run.trained, run.ema), run.autocast():
            runs.grid(run.args.out / "grid.png", run.data, lambda y: run.student(y.to(run.device)))
            run.student.save(folder, **run.settings, step=step, torch=torch.__version__)

    if not run.rank:
        runs.write(run.args.out, step, fill)


def resume(run):
    """Goes on from the newest checkpoint of --out, if there is one. Returns its step, or 0."""
    found = runs.steps_in(run.args.out)
    if not found and run.args.resume:
        raise FileNotFoundError(f"expected a checkpoint in {run.args.out}, found none: leave --resume out to begin")
    if not found:
        return 0
    folder = found[-1]
    runs.check_settings(folder, run.settings)
    run.student.load_trained(folder)
    run.ema = {name: p.detach().clone() for name, p in run.trained.items()}
    step = run.student.config["step"]
    runs.load_training(folder / "training.safetensors", run.trained, run.optimizer, step)
    return step


def train(args):
    """The whole of a run on one process."""
    run = Run(args)
    with runs.alone(args.out, run.rank):
        first = resume(run)
        if run.world > 1:
            devices.join(run.device)
            run.one_step = DistributedDataParallel(run.one_step)
        if first and first >= args.steps and not run.rank:
            commands.say(f"{args.out} is finished at step {first}: nothing to do")
        if not args.steps:
            save(run, 0)
        optimize(run, first)


def main(args):
    advice = f"--batch {args.batch} --accumulate {args.accumulate}: raise --accumulate"
    advice += " or lower --batch" if args.checkpointing else ", give --checkpointing or lower --batch"
    try:
        return commands.run(train, args, memory=advice)
    finally:
        devices.leave()


if __name__ == "__main__":
    sys.exit(main(ARGS))
