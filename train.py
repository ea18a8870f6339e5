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
    p.add_argument("--stage", choices=["A", "B"], required=True, help="what is trained (Sec. 4)")
    p.add_argument("--cache", type=Path, default=Path("cache"), help="folder made by cache.py")
    p.add_argument("--out", type=Path, help="the run's folder (default: runs/stage_a or runs/stage_b)")
    p.add_argument("--init", type=Path, help="Stage B: the Stage A run or checkpoint to start from")
    p.add_argument(
        "--steps", type=natural, default=1000, help="optimizer steps (0: the untrained student as a checkpoint)"
    )
    p.add_argument(
        "--batch", type=positive, default=16, help="pictures a step, over all processes (the paper gives no number)"
    )
    p.add_argument(
        "--accumulate", type=positive, default=1, help="split each process's share of the batch into N parts"
    )
    p.add_argument(
        "--checkpointing", action="store_true", help="recompute activations in the backward pass: less memory"
    )
    p.add_argument(
        "--precision",
        choices=["auto", "bf16", "fp32"],
        default="auto",
        help="of the networks' forward pass (auto: bf16 autocast on a GPU, as in Sec. 4, fp32 elsewhere)",
    )
    p.add_argument("--seed", type=seed, default=0, help="of fresh layers, the pictures' order and SGCL's t and noise")
    p.add_argument("--save-every", type=positive, default=200, metavar="N", help="steps between checkpoints")
    p.add_argument("--resume", action="store_true", help="insist on going on: no checkpoint in --out is then an error")
    p.add_argument("--lr", type=float, help="peak learning rate of AdamW (default: the preset's; paper: 2e-5)")
    p.add_argument("--lambda-lat", type=float, default=1.0, help="weight of the latent MSE in Eq. 6")
    p.add_argument("--lambda-lpips", type=float, default=0.5, help="weight of LPIPS in Eq. 6")
    p.add_argument("--lambda-l1", type=float, default=1.0, help="weight of L1 in Eq. 6")
    p.add_argument("--lambda-sgcl", type=float, default=0.1, help="weight of SGCL in Eq. 6")
    p.add_argument(
        "--sgcl-every", type=positive, default=4, metavar="N", help="SGCL in every N-th step, N times as strong"
    )
    p.add_argument(
        "--sgcl-source", choices=["gaussian", "mmse"], default="gaussian", help="Eq. 7's noise, or PMRF's own source"
    )
    p.add_argument(
        "--adapter", choices=["zero-linear", "scalar-gate", "none"], help="Sec. 3.3.1 (default: the preset's)"
    )
    args = p.parse_args(argv)
    if args.stage == "B" and not args.init:
        p.error(
            "--stage B starts from Stage A: expected --init RUN_OR_CHECKPOINT, got none (for example --init runs/stage_a)"
        )
    if args.stage == "A" and args.init:
        p.error("--init belongs to --stage B: Stage A starts from the published weights that the cache's preset names")
    args.out = args.out or Path("runs") / f"stage_{args.stage.lower()}"
    return args


def natural(text):
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 on, got {text!r}")
    return int(text)


def seed(text):
    if not text.isdigit() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to 2**63 - 1, got {text!r}")
    return int(text)


def positive(text):
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}")
    return int(text)


def interrupted(*_):
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
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import checkpoint
import losses
import sgcl
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
    bar = tqdm(total=args.steps, initial=first, disable=run.rank > 0, desc=f"Stage {args.stage}")
    for step in range(first + 1, args.steps + 1):
        lr = set_rate(run.optimizer, args.lr, step, args.steps)
        raw = dict.fromkeys(lambdas, 0.0)
        for part in range(1, args.accumulate + 1):
            batch = {k: v.to(run.device, non_blocking=True) for k, v in next(batches).items()}
            with quiet(run.one_step, part < args.accumulate):
                with run.autocast():
                    terms = objective(
                        run.one_step, run.student, run.teacher, run.lpips_fn, batch, step, args
                    )  # Eq. 5-9
                check_finite(terms, step, args.out)
                (losses.total_loss(terms, lambdas) / args.accumulate).backward()  # Eq. 6
            for name, value in terms.items():
                raw[name] += value.item() / args.accumulate
        nn.utils.clip_grad_norm_(run.trained.values(), 1.0)
        run.optimizer.step()
        run.optimizer.zero_grad()
        update_ema(run.ema, run.trained, step)
        total = run.log(step, lr, raw, lambdas)
        bar.set_postfix(loss=f"{total:.4f}", refresh=False)
        bar.update()
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


def check_finite(terms, step, out):
    """ValueError that names the step, the term and the last good checkpoint if a term of Eq. 6 is NaN or infinite."""
    for name, value in terms.items():
        if not torch.isfinite(value):
            good = checkpoint.steps_in(out)
            kept = f"the last good checkpoint is {good[-1]}" if good else "there is no checkpoint yet"
            raise ValueError(
                f"loss term {name!r} is {value.item()} at step {step}; {kept}: lower --lr or raise --batch"
            )


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
        checkpoint.trim_log(args.out / "log.jsonl", first)
    if first and first >= args.steps:
        print(f"{args.out} is finished at step {first}: nothing to do")
    if not args.steps:
        run.save(0)
    optimize(run, first)


def main(args):
    distributed = int(os.environ.get("WORLD_SIZE", 1)) > 1
    try:
        if distributed:
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        train(args)
    except (ValueError, OSError) as e:
        print(f"train.py: {e}", file=sys.stderr)
        return 1
    finally:
        if distributed and dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(ARGS))
