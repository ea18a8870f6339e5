"""Restores face pictures in one pass (paper Sec. 4), with colour correction.

    y -> square of S px -> x_hat = S_theta(y), one network evaluation (Eq. 5) -> colour correction -> the input's shape

The network works at the checkpoint's size S on faces that are aligned like FFHQ. A picture of another size is resized so that
its long side is S, never squashed, and mirrored at its borders up to a square. The result has the input's size, but a long
side of at least S. Where it is larger than S, it is enlarged and holds S px of detail.

Usage: python restore.py face.png                        writes face_restored.png beside it
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path

from plumbing import commands


def parse_args(argv=None):
    p = argparse.ArgumentParser(
        description="Restore face pictures: face.png -> face_restored.png. Exit code 1 if some pictures failed.",
        epilog="Pictures should show one face, aligned like FFHQ. Same machine, same picture in: same bytes out.",
    )
    add, whole = p.add_argument, commands.whole
    add("images", nargs="+", metavar="IMAGE_OR_FOLDER", help="pictures, or folders searched recursively")
    add("-o", "--out", type=Path, metavar="OUT", help="folder, or for one picture a file (default: beside it)")
    add("--checkpoint", default="tiny", metavar="tiny|DIR", help="the student (default tiny: in this repository)")
    add("--method", choices=("student", "teacher", "mmse"), default="student",
        help="one step (default), the flow teacher (Eq. 4) or its posterior mean (Eq. 2)")  # fmt: skip
    add("--color-fix", choices=("wavelet", "adain", "none"),
        help="colours from the input (default wavelet; teacher and mmse: none)")  # fmt: skip
    add("--steps", type=whole(), help="teacher only: Euler steps K (default 25)")
    add("--seed", type=whole(0), help="teacher only: seed of its noise (default 0)")
    add("--batch", type=whole(), default=1, metavar="N",
        help="pictures a pass on a GPU (default 1); the last bit may depend on N. On a CPU always one")  # fmt: skip
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto",
        help="default auto: bf16 on a CUDA GPU, and for large networks on a CPU with AMX; else float32")  # fmt: skip
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="default auto: a GPU if there is one")
    add("--compare", action="store_true", help="write input | restored side by side too, as *_compare.png")
    add("--metadata", choices=("basic", "gps", "none"), default="basic",
        help="EXIF data that results keep: date, camera, author, text (default basic); gps: the place, too")  # fmt: skip
    add("--overwrite", action="store_true", help="replace pictures in the way, too, that this program did not make")
    add("--photo", action="store_true", help="whole photos: find the faces, restore them and put them back (align.py)")
    add("--upscale", type=whole(1, 8), metavar="N", help="with --photo: enlarge it N times, bicubically (default 1)")
    add("--landmarks", type=Path, metavar="CSV", help="with --photo: the faces' landmarks, do not look for faces")
    args = p.parse_args(argv)
    if not args.photo and (args.upscale, args.landmarks) != (None, None):
        p.error("--upscale and --landmarks belong to --photo: add it, or leave them out")
    if args.method != "teacher" and (args.steps, args.seed) != (None, None):
        p.error(f"--steps and --seed belong to --method teacher, got --method {args.method}: leave them out")
    return args


if __name__ == "__main__":
    ARGS = commands.begin(parse_args, "what is written is whole")
    commands.import_without_training_packages()

import numpy as np
import torch
import torch.nn.functional as F

from align import TOO_SMALL, faces_of, is_aligned, restore_photo, square
from plumbing.devices import choose_device, prepare, workers_for
from plumbing.files import make_folder
from plumbing.landmarks import face_finder
from plumbing.pictures import is_gray, read_picture, resize, write_result
from plumbing.pipeline import Job, overlapped, progress, trying
from plumbing.presets import load_config, locate
from plumbing.targets import compare_name, plan
from student import Student
from teacher import PMRF

# --- colour correction: the picture's detail, the input's colours ---------------------------------------------------------


def low_pass(x, levels=5):
    """Low frequencies of x (B, C, H, W): an a-trous wavelet's approximation after `levels` levels, same shape.

    Level i is the 3 x 3 binomial kernel with dilation 2^i and replicated borders; five reach 31 px in each direction.
    """
    k = torch.tensor([1.0, 2.0, 1.0], dtype=x.dtype, device=x.device)
    k = (k[:, None] * k / 16).expand(x.shape[1], 1, 3, 3)
    for r in (2**i for i in range(levels)):
        x = F.conv2d(F.pad(x, (r, r, r, r), mode="replicate"), k, groups=x.shape[1], dilation=r)
    return x


def wavelet_color_fix(content, style):
    """The high frequencies of content with the low frequencies of style; (B, 3, H, W) each -> same, unclipped.

    The detail bands of an a-trous wavelet sum up to x - low_pass(x), and low_pass is linear. Source: StableSR's
    wavelet colour correction, which InterLCM uses. ValueError if the shapes differ.
    """
    check_shapes(content, style)
    return content + low_pass(style - content)


def adain_color_fix(content, style, eps=1e-5):
    """Content with the mean and standard deviation of style, channel by channel; (B, 3, H, W) each -> same, unclipped.

    Adaptive instance normalisation (Huang and Belongie 2017, Eq. 8); eps is added to the unbiased variances.
    ValueError if the shapes differ.
    """
    check_shapes(content, style)
    (var_c, mu_c), (var_s, mu_s) = (torch.var_mean(x, dim=(2, 3), keepdim=True) for x in (content, style))
    return (content - mu_c) / (var_c + eps).sqrt() * (var_s + eps).sqrt() + mu_s  # mu, var: (B, 3, 1, 1)


def check_shapes(content, style):
    if content.shape != style.shape:
        raise ValueError(f"expected one shape, got {tuple(content.shape)} and {tuple(style.shape)}: resize one")


COLOR_FIXES = {"wavelet": wavelet_color_fix, "adain": adain_color_fix, "none": lambda content, style: content}


# --- any shape to the network's square, and back --------------------------------------------------------------------------


def to_square(x, size):
    """x (3, H, W) -> (3, size, size): resized to a long side of `size`, then mirrored evenly on both sides."""
    top, left, h, w = fit(x, size)
    border = ((0, 0), (top, size - h - top), (left, size - w - left))
    return torch.from_numpy(np.pad(resize(x, (h, w)).numpy(), border, mode="symmetric"))


def from_square(x_hat, x):
    """The part of x_hat (3, S, S) that is not padding, enlarged to the size of x (3, H, W) if that is larger than S."""
    size = x_hat.shape[-1]
    top, left, h, w = fit(x, size)
    x_hat = x_hat[:, top : top + h, left : left + w]
    return resize(x_hat, x.shape[1:]) if max(x.shape[1:]) > size else x_hat


def fit(x, size):
    """Where x (3, H, W) lies in the square of `size`, with a long side of `size`: top, left, height, width."""
    h, w = (max(1, round(side * size / max(x.shape[1:]))) for side in x.shape[1:])
    return (size - h) // 2, (size - w) // 2, h, w


# --- one pass -------------------------------------------------------------------------------------------------------------


def load_model(checkpoint="tiny", method="student", device="cpu", steps=25, seed=0, precision="auto"):
    """A function (B, 3, S, S) -> (B, 3, S, S), both in about [0, 1], on `device`, and S.

    checkpoint: "tiny" or a folder (it names its teacher too); method: "student" (Eq. 5), "teacher" (Eq. 4 in `steps`
    steps from the noise of `seed`) or "mmse" (Eq. 2); precision: see plumbing/devices.py. OSError, ValueError: no such weights.
    """
    if method == "student":
        student = prepare(Student.load(checkpoint, merge=True), device, precision)
        return student, student.image_size
    config = load_config(checkpoint)
    teacher = prepare(PMRF.from_pretrained(locate(config["teacher"])), device, precision)
    if method == "mmse":
        return teacher.posterior_mean, config["image_size"]
    return lambda y: teacher.restore(y, steps=steps, seed=seed), config["image_size"]


@torch.inference_mode()
def restore(model, size, xs, color_fix="wavelet", device="cpu"):
    """Restores xs, a list of (3, H, W) in [0, 1], in one batch by load_model's model and size: as many, sized by from_square.

    A gray picture stays gray.
    """
    y = torch.stack([to_square(x, size) for x in xs]).to(device)  # (B, 3, S, S)
    x_hat = COLOR_FIXES[color_fix](model(y), y).clamp(0, 1).cpu()
    x_hat = [v.mean(0, keepdim=True).expand(3, -1, -1) if is_gray(x) else v for v, x in zip(x_hat, xs, strict=True)]
    return [from_square(v, x) for v, x in zip(x_hat, xs, strict=True)]


# --- the command ----------------------------------------------------------------------------------------------------------


def restore_files(args):
    """Restores what the arguments name, says what became of each, and returns 0, or 1 if some failed."""
    device = choose_device(args.device)
    pairs, errors = plan(args.images, args.out, args.compare, args.overwrite)
    failed = sum(map(commands.complain, errors))
    if not pairs:
        return 1
    model, size = load_model(args.checkpoint, args.method, device, args.steps or 25, args.seed or 0, args.precision)
    color_fix = args.color_fix or ("wavelet" if args.method == "student" else "none")
    batch = 1 if device.type == "cpu" else args.batch  # the kernels for 1 and for N pictures round differently
    network = partial(restore, model, size, color_fix=color_fix, device=device)
    work, workers = partial(restore_batch, network=network, size=size), workers_for(model, device)
    if args.photo:
        in_place = partial(restore_photo, restore=network, size=size, upscale=args.upscale or 1, batch=batch)
        work, workers, batch = partial(restore_faces, find=face_finder(args.landmarks), in_place=in_place), None, 1
    batches = ([Job(*pair) for pair in pairs[start : start + batch]] for start in range(0, len(pairs), batch))
    read, write = partial(read_batch, metadata=args.metadata), partial(write_batch, compare=args.compare)
    for some in progress(overlapped(batches, read, work, write, workers), len(pairs)):
        for job in some:
            if not job.error:
                commands.say(job.line)
        for error in dict.fromkeys(job.error for job in some if job.error):  # once for a batch that failed as one
            failed += commands.complain(error)
    return 1 if failed else 0


def read_batch(jobs, metadata):
    for job in jobs:
        with trying([job]):
            job.picture = read_picture(job.path, metadata)


def restore_batch(jobs, network, size):
    """Restores the pictures of a batch in one pass, aligned faces of any shape."""
    jobs, begin = [job for job in jobs if not job.error], time.perf_counter()
    with trying(jobs, "use smaller pictures or --batch 1"):
        x_hats = network([job.picture.x for job in jobs]) if jobs else []
        ms = (time.perf_counter() - begin) * 1000 / max(1, len(jobs))
        for job, x_hat in zip(jobs, x_hats, strict=True):
            (H, W), (h, w), job.x_hat = job.picture.x.shape[1:], x_hat.shape[1:], x_hat
            hint = f"; {size} px of detail, enlarged to {w} x {h}" if max(H, W) > size else ""
            if not is_aligned(job.picture.x):
                hint += "; no aligned crop, it seems: --photo restores the faces in a photo"
            job.line = f"{job.path} {W}x{H} -> {job.target} {w}x{h}, {ms:.0f} ms{hint}"


def restore_faces(jobs, find, in_place):
    """Restores the faces that `find` finds in a photo. Without a face the result is a copy, and the job has an error."""
    for job in (job for job in jobs if not job.error):
        begin = time.perf_counter()
        with trying([job], "make it smaller, or leave out --upscale"):
            squares = [square(points) for points, _ in faces_of(job.path, job.picture.x, find, TOO_SMALL)]
            job.x_hat = in_place(job.picture.x, squares)
            job.line = f"{job.path} -> {job.target}, faces: {len(squares)}, {time.perf_counter() - begin:.1f} s"
            if not squares:
                raise ValueError(f"expected a face to restore, found none in {job.path}: {job.target} is a copy")


def write_batch(jobs, compare):
    """Writes each result, and input | result side by side where wanted."""
    for job in (job for job in jobs if job.x_hat is not None):
        with trying([job]):
            make_folder(job.target.parent)
            write_result(job.target, job.x_hat, like=job.picture)
            if compare:
                both = torch.cat([resize(job.picture.x, job.x_hat.shape[1:]), job.x_hat], dim=2)
                write_result(compare_name(job.target), both)


def main(args):
    return commands.run(restore_files, args, fault=2)  # no device, output, checkpoint: nothing was restored


if __name__ == "__main__":
    sys.exit(main(ARGS))
