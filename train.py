"""The two training stages (paper Sec. 3.4 Eq. 6, Sec. 4): from a cache of (z_lq, z_target) to a one-step restorer.

    python train.py --stage A                            visual encoder + spatial encoder + adapter, UNet frozen
    python train.py --stage B --init runs/stage_a        LoRA + adapter, encoders frozen
    torchrun --nproc_per_node=8 train.py --stage A ...   the same on several GPUs; --batch is the global batch

The same command again goes on from the last checkpoint in --out. Every random number of a step is a function of the seed,
the step and the picture, so a run that was killed and one on two processes make the same steps as an unbroken one.
--out holds step-*/ (config.json + safetensors: the EMA weights, and training.safetensors to go on from; the last two are
kept), log.jsonl (each term of Eq. 6 raw and weighted) and grid.png (LQ | student | X† for the first pictures of the cache).
"""

import argparse
import os
import signal
import sys
from pathlib import Path


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--stage", choices=["A", "B"], required=True, help="what is trained (Sec. 4)")
    add("--cache", type=Path, default=Path("cache"), help="folder made by cache.py")
    add("--out", type=Path, help="the run's folder (default: runs/stage_a or runs/stage_b)")
    add("--init", type=Path, help="Stage B: the Stage A run or checkpoint to start from")
    add("--steps", type=whole(0, 999_999), default=1000, help="optimizer steps; 0 keeps the untrained student")
    add("--batch", type=whole(1, 10**6), default=16, help="pictures a step, over all processes (the paper: not given)")
    add("--accumulate", type=whole(1, 10**6), default=1, metavar="N", help="each process makes its share in N parts")
    add("--checkpointing", action="store_true", help="recompute activations in the backward pass: less memory")
    add("--precision", choices=["auto", "bf16", "fp32"], default="auto", help="auto: bf16 on a GPU (Sec. 4), else fp32")
    add("--seed", type=whole(0, 2**63 - 1), default=0, help="of fresh layers, the pictures' order, SGCL's t and noise")
    add("--save-every", type=whole(1, 10**6), default=200, metavar="N", help="steps between checkpoints")
    add("--resume", action="store_true", help="insist on going on: no checkpoint in --out is then an error")
    add("--lr", type=real, help="peak learning rate of AdamW (default: the preset's; paper: 2e-5)")
    add("--lambda-lat", type=real, default=1.0, help="weight of the latent MSE in Eq. 6")
    add("--lambda-lpips", type=real, default=0.5, help="weight of LPIPS in Eq. 6")
    add("--lambda-l1", type=real, default=1.0, help="weight of L1 in Eq. 6")
    add("--lambda-sgcl", type=real, default=0.1, help="weight of SGCL in Eq. 6")
    add("--sgcl-every", type=whole(1, 10**6), default=4, metavar="N", help="SGCL in each N-th step, N times as strong")
    sources = ["gaussian", "mmse"]
    add("--sgcl-source", choices=sources, default="gaussian", help="Eq. 7's noise, or PMRF's own source")
    adapters = ["zero-linear", "scalar-gate", "none"]
    add("--adapter", choices=adapters, help="Sec. 3.3.1 (default: the preset's, in Stage B that of Stage A)")
    args = p.parse_args(argv)
    if args.stage == "B" and not args.init:
        p.error(
            "--stage B starts from Stage A: expected --init RUN_OR_CHECKPOINT, got none (such as --init runs/stage_a)"
        )
    if args.stage == "A" and args.init:
        p.error("--init belongs to --stage B: Stage A starts from the published weights that the cache's preset names")
    if not (args.lambda_lat or args.lambda_lpips or args.lambda_l1 or args.lambda_sgcl):
        p.error("expected one of the four weights of Eq. 6 above 0, got --lambda-... 0 for all")
    args.out = args.out or Path("runs") / f"stage_{args.stage.lower()}"
    return args


def whole(low, high):
    """An argument's type: a whole number from low to high."""

    def convert(text):
        if not (text.isascii() and text.isdigit() and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(f"expected a whole number from {low} to {high}, got {text!r}")
        return int(text)

    return convert


def real(text):
    """An argument's type: a number from 0 on, neither infinite nor NaN."""
    try:
        if 0 <= float(text) < float("inf"):
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected a number from 0 on, got {text!r}")


def interrupted(*_):
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends at once
    if os.environ.get("RANK", "0") == "0":
        os.write(2, b"\ntrain.py: stopped; the same command goes on from the last checkpoint\n")
    sys.exit(130)  # raised wherever it is, so that a checkpoint in the writing is removed


if __name__ == "__main__":
    ARGS = parse_args()  # before torch is imported, so that -h answers at once
    signal.signal(signal.SIGINT, interrupted)

import contextlib
import math

import torch
import torch.distributed as dist
import torch.nn as nn
from safetensors import SafetensorError
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import losses
import sgcl
from plumbing import checkpoints
from run import Run, generator
from student import decode

# --- the training step -----------------------------------------------------------------------------------------------------


def objective(one_step, student, teacher, lpips_fn, batch, step, args):
    """The terms of Eq. 6 for one batch of the cache, in the paper's order: a dict of scalars."""
    y, z_y, z_target, x_target = (batch[k] for k in ("y", "z_lq", "z_target", "x_target"))
    z_hat = one_step(z_y, y)  # Eq. 5
    terms = {"lat": losses.latent_loss(z_hat, z_target)}
    if not (args.lambda_lpips or args.lambda_l1 or args.lambda_sgcl):
        return terms  # "latent loss only" of the ablation: no picture is decoded
    x_hat = decode(student.vae, z_hat)  # with gradient: the pixel terms train the latent
    terms["lpips"] = losses.lpips_loss(lpips_fn, x_hat, x_target)
    terms["l1"] = losses.l1_loss(x_hat, x_target)
    if args.lambda_sgcl and step % args.sgcl_every == 0:
        g = [generator("sgcl", args.seed, step, i) for i in batch["index"].tolist()]
        t, source = (v.to(x_hat.device) for v in sgcl.draw(sgcl.BANDS[args.stage], x_hat.shape[1:], g))
        if args.sgcl_source == "mmse":
            source = sgcl.mmse_source(teacher.posterior_mean(y), source, teacher.sigma_s)
        terms["sgcl"] = sgcl.sgcl_loss(x_hat, teacher.velocity, t, source)  # Eq. 7-9
    return terms


def optimize(run, first):
    """Steps first + 1 ... args.steps, each in the paper's order: Eq. 5-9, backward, AdamW with cosine decay, EMA."""
    args, batches = run.args, iter(run.loader(first))
    lambdas = {"lat": args.lambda_lat, "lpips": args.lambda_lpips, "l1": args.lambda_l1}
    lambdas["sgcl"] = args.sgcl_every * args.lambda_sgcl  # in every n-th step only: lambda is its mean weight
    bar = tqdm(range(first + 1, args.steps + 1), f"Stage {args.stage}", args.steps, initial=first, disable=run.rank > 0)
    for step in bar:
        lr = set_rate(run.optimizer, args.lr, step, args.steps)
        raw = dict.fromkeys(lambdas, 0.0)
        for part in range(1, args.accumulate + 1):
            batch = {k: v.to(run.device, non_blocking=True) for k, v in next(batches).items()}
            with quiet(run.one_step, part < args.accumulate):
                with run.autocast():
                    terms = objective(run.one_step, run.student, run.teacher, run.lpips_fn, batch, step, args)
                check_finite(terms, step, args.out)
                (losses.total_loss(terms, lambdas) / args.accumulate).backward()  # Eq. 6
            for name, value in terms.items():
                raw[name] += value.item() / args.accumulate
        norm = nn.utils.clip_grad_norm_(run.trained.values(), 1.0)
        check_finite({"norm of the gradient": norm}, step, args.out)  # before it reaches the weights
        run.optimizer.step()
        run.optimizer.zero_grad()
        update_ema(run.ema, run.trained, step)
        bar.set_postfix(loss=run.log(step, lr, raw, lambdas), refresh=False)
        if step % args.save_every == 0 or step == args.steps:
            run.save(step)


def set_rate(optimizer, peak, step, steps):
    """Cosine decay from the peak at the first step to zero after the last (Sec. 4). Returns the rate of this step."""
    lr = peak * 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def quiet(one_step, more_to_come):
    """While more parts of an accumulated step are to come, the gradients stay on their process."""
    several = isinstance(one_step, DistributedDataParallel)
    return one_step.no_sync() if several and more_to_come else contextlib.nullcontext()


def check_finite(values, step, out):
    """ValueError that names the step, the term and the last good checkpoint if a term of Eq. 6 is NaN or infinite."""
    for name, value in values.items():
        if not torch.isfinite(value):
            good = checkpoints.steps_in(out)
            kept = f"the last good checkpoint is {good[-1]}" if good else "there is no checkpoint yet"
            raise ValueError(f"{name!r} is {value.item()} at step {step}; {kept}: lower --lr or raise --batch")


def update_ema(ema, trained, step, decay=0.999):
    """ema = decay ema + (1 - decay) weights, for the trained parameters only (Sec. 4: EMA 0.999).

    The decay rises to 0.999 as (1 + step) / (10 + step), so that the average of a short run is not its untrained start.
    """
    decay = min(decay, (1 + step) / (10 + step))
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.values()), [p.detach() for p in trained.values()], 1 - decay)


def train(args):
    """The whole of a run on one process, from the cache to the last checkpoint."""
    run = Run(args)
    first = run.resume()
    args.out.mkdir(parents=True, exist_ok=True)
    if run.world > 1:
        ids = [run.device.index] if run.device.type == "cuda" else None
        run.one_step = DistributedDataParallel(run.one_step, device_ids=ids, broadcast_buffers=False)
    if not run.rank:
        checkpoints.trim_log(args.out / "log.jsonl", first)
    if first and first >= args.steps:
        print(f"{args.out} is finished at step {first}: nothing to do")
    if not args.steps:
        run.save(0)
    optimize(run, first)


def main(args):
    """Trains; what a user can cause is one line and exit code 1."""
    distributed = int(os.environ.get("WORLD_SIZE", 1)) > 1
    try:
        if distributed:
            join(int(os.environ["LOCAL_RANK"]))
        train(args)
    except (ValueError, OSError, SafetensorError) as e:
        fault = (str(e).strip() or repr(e)).splitlines()[-1]  # a data worker's error ends with what was raised there
    except (MemoryError, RuntimeError) as e:
        if not (out_of_memory(e) or stopped()):
            raise
        fault = f"out of memory with --batch {args.batch} --accumulate {args.accumulate}: raise --accumulate"
        fault += " or lower --batch" if args.checkpointing else ", give --checkpointing or lower --batch"
    else:
        return 0
    finally:
        if distributed and dist.is_initialized():
            dist.destroy_process_group()
    if stopped():
        return 130
    print(f"train.py: {fault}", file=sys.stderr)
    return 1


def stopped():
    """Whether `interrupted` has run: a library's C code may turn the exit that it raises into an error of its own."""
    return signal.getsignal(signal.SIGINT) is signal.SIG_DFL


def join(local_rank):
    """This process becomes one of torchrun's, on a GPU of its own if there are GPUs. ValueError if they are too few."""
    gpus = torch.cuda.device_count()
    if gpus and local_rank >= gpus:
        raise ValueError(f"expected one process a GPU, got --nproc_per_node above {gpus}: lower it")
    if gpus:
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if gpus else "gloo")


def out_of_memory(error):
    """Whether an error is a GPU's or the CPU's way to say that memory is full; the latter has no class of its own."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)


if __name__ == "__main__":
    sys.exit(main(ARGS))
