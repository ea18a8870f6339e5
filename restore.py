"""Restores face pictures in one pass (paper Sec. 4), with colour correction.

    y -> square of S px -> x_hat = S_theta(y), one network evaluation (Eq. 5) -> colour correction -> the input's shape

The network works at the checkpoint's size S (tiny 128 px, paper 512 px) on faces that are aligned like FFHQ. A picture
of another size is resized so that its long side is S, never squashed, and mirrored at its borders up to a square. The
result has the input's size; of a picture smaller than S, its shape with a long side of S. What a result larger than S
shows is S px of detail, enlarged.

Usage: python restore.py face.png                        writes face_restored.png beside it
       python restore.py folder -o out --compare         keeps the folder's structure
"""

import argparse
import os
import signal
import sys
import time
from pathlib import Path


def positive(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}")
    return int(text)


def parse_args(argv=None):
    p = argparse.ArgumentParser(
        description="Restore face pictures: face.png -> face_restored.png. Exit code 1 if some pictures failed.",
        epilog="Pictures should show one face, aligned like FFHQ. Same machine, same picture in: same bytes out.",
    )
    p.add_argument("images", nargs="+", metavar="IMAGE_OR_FOLDER", help="pictures, or folders searched recursively")
    p.add_argument(
        "-o", "--out", type=Path, metavar="OUT", help="folder, or for one picture a file (default: beside it)"
    )
    p.add_argument(
        "--checkpoint", default="tiny", metavar="tiny|DIR", help="the student (default tiny: in this repository)"
    )
    p.add_argument("--method", choices=("student", "teacher", "mmse"), default="student",
                   help="one step (default), the flow teacher (Eq. 4) or its posterior mean (Eq. 2)")  # fmt: skip
    p.add_argument("--color-fix", choices=("wavelet", "adain", "none"),
                   help="colours from the input (default wavelet; teacher and mmse: none)")  # fmt: skip
    p.add_argument("--steps", type=positive, help="teacher only: Euler steps K (default 25)")
    p.add_argument("--seed", type=int, help="teacher only: seed of its noise (default 0)")
    p.add_argument("--batch", type=positive, default=1, metavar="N",
                   help="pictures a pass on a GPU, where the last bit may depend on N (default 1); a CPU takes one at a "
                        "time, which costs it about a third more, so that the bytes never depend on N")  # fmt: skip
    p.add_argument(
        "--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="default auto: a GPU if there is one"
    )
    p.add_argument("--compare", action="store_true", help="write input | restored side by side too, as *_compare.png")
    args = p.parse_args(argv)
    if args.method != "teacher" and (args.steps, args.seed) != (None, None):
        p.error(f"--steps and --seed belong to --method teacher, got --method {args.method}: leave them out")
    if args.seed is not None and not 0 <= args.seed < 2**63:
        p.error(f"argument --seed: expected 0 to 2**63 - 1, got {args.seed}")
    return args


def interrupted(*_):
    os.write(2, b"\nrestore.py: interrupted; what is written is whole\n")
    if "main" not in globals():  # still importing, where libraries may turn an exit into something else
        os._exit(130)
    sys.exit(130)  # raised wherever it is, so that a file in the writing is removed


if __name__ == "__main__":
    ARGS = parse_args()  # before torch is imported, so that -h answers at once
    signal.signal(signal.SIGINT, interrupted)

import numpy as np
import torch
import torch.nn.functional as F

from plumbing.commands import enough_memory
from plumbing.pictures import SUFFIXES, find_images, make_folder, read_image, resize, write_image


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
    return content + low_pass(_same_shape(content, style) - content)


def adain_color_fix(content, style, eps=1e-5):
    """Content with the mean and standard deviation of style, channel by channel; (B, 3, H, W) each -> same, unclipped.

    Adaptive instance normalisation (Huang and Belongie 2017, Eq. 8); eps is added to the unbiased variances.
    ValueError if the shapes differ.
    """
    (mu_c, std_c), (mu_s, std_s) = (_moments(x, eps) for x in (content, _same_shape(content, style)))
    return (content - mu_c) / std_c * std_s + mu_s


def _moments(x, eps):
    var, mu = torch.var_mean(x, dim=(2, 3), keepdim=True)  # (B, 3, 1, 1) each
    return mu, (var + eps).sqrt()


def _same_shape(content, style):
    if content.shape != style.shape:
        raise ValueError(
            f"expected two pictures of one shape, got {tuple(content.shape)} and {tuple(style.shape)}: resize one"
        )
    return style


COLOR_FIXES = {"wavelet": wavelet_color_fix, "adain": adain_color_fix, "none": lambda content, style: content}


def to_square(x, size):
    """x (3, H, W) -> (3, size, size): resized to a long side of `size`, then mirrored evenly on both sides."""
    h, w = _fit(x, size)
    top, left = (size - h) // 2, (size - w) // 2
    rows = np.pad(np.arange(h), (top, size - h - top), mode="symmetric")
    columns = np.pad(np.arange(w), (left, size - w - left), mode="symmetric")
    return resize(x, (h, w))[:, rows][:, :, columns]


def from_square(x_hat, x):
    """The part of x_hat (3, S, S) that is not padding, enlarged to the size of x (3, H, W) if that is larger than S."""
    size = x_hat.shape[-1]
    h, w = _fit(x, size)
    top, left = (size - h) // 2, (size - w) // 2
    x_hat = x_hat[:, top : top + h, left : left + w]
    return resize(x_hat, x.shape[1:]) if max(x.shape[1:]) > size else x_hat


def _fit(x, size):
    h, w = x.shape[1:]
    return max(1, round(h * size / max(h, w))), max(1, round(w * size / max(h, w)))


def load_model(checkpoint="tiny", method="student", device="cpu", steps=25, seed=0):
    """A function (B, 3, S, S) -> (B, 3, S, S), both in [0, 1], on `device`, and S.

    checkpoint: "tiny" or a folder, which names its teacher too; method: "student" (Eq. 5), "teacher" (Eq. 4 in `steps`
    steps from the noise of `seed`) or "mmse" (Eq. 2). ValueError or OSError if there is no such checkpoint.
    """
    from student import Student, load_config, locate  # here, as the colour corrections need no networks

    if method == "student":
        student = Student.load(checkpoint).to(device).eval()
        return student, student.image_size
    from teacher import PMRF

    config = load_config(checkpoint)
    teacher = PMRF.from_pretrained(locate(config["teacher"])).to(device).eval()
    if method == "mmse":
        return teacher.posterior_mean, config["image_size"]
    return lambda y: teacher.restore(y, steps=steps, seed=seed), config["image_size"]


@torch.inference_mode()
def restore(model, size, xs, color_fix="wavelet", device="cpu"):
    """Restores pictures of any sizes in one batch.

    model, size: from load_model; xs: list of (3, H, W) in [0, 1]. Returns a list of (3, H', W'), see from_square.
    """
    y = torch.stack([to_square(x, size) for x in xs]).to(device)  # (B, 3, S, S)
    x_hat = COLOR_FIXES[color_fix](model(y), y).clamp(0, 1).cpu()
    return [from_square(x_hat[i], x) for i, x in enumerate(xs)]


def choose_device(name):
    """ "cpu", "cuda" or "mps" for the same or "auto". ValueError if it is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(device for device, ok in there.items() if ok)
    if not there[name]:
        raise ValueError(f"expected a device that this machine has, got --device {name}: use --device auto or cpu")
    return name


def plan(images, out=None):
    """Which picture is written where: ([(picture, output), ...], [what is wrong with the others, ...]).

    Skips earlier results (*_restored, *_compare) in folders. No output is an input or the output of another picture.
    ValueError if out cannot be what it should be: a folder, or a picture file for a single picture.
    """
    pairs, errors = {}, []
    for given in map(Path, images):
        try:
            found = [
                p for p in find_images([given]) if not (given.is_dir() and p.stem.endswith(("_restored", "_compare")))
            ]
        except (ValueError, OSError) as e:
            errors.append(str(e))
            continue
        if not found:
            errors.append(f"expected pictures ({', '.join(SUFFIXES)}) in {given}, got none: name another folder")
        for path in found:
            target = path.with_name(f"{path.stem}_restored.png")
            if out is not None:
                target = out / (target.relative_to(given) if given.is_dir() else target.name)
            pairs.setdefault(path.resolve(), (path, target))  # given twice, done once
    pairs = list(pairs.values())
    if (
        out is not None
        and not out.is_dir()
        and out.suffix.lower() in (".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic")
    ):
        raise ValueError(
            f"expected a folder, or a picture ({', '.join(SUFFIXES)}), got -o {out}: choose another suffix"
        )
    if out is not None and not out.is_dir() and (out.suffix.lower() in SUFFIXES or out.exists()):
        if out.suffix.lower() not in SUFFIXES or len(pairs) + len(errors) != 1:
            raise ValueError(f"expected a folder, or for one input a picture's name, got -o {out}: name a folder")
        pairs = [(path, out) for path, _ in pairs]
    return _without_clashes(pairs, errors)


def _without_clashes(pairs, errors):
    inputs, outputs, good = {path.resolve() for path, _ in pairs}, {}, []
    for path, target in pairs:
        taken = [t for t in (target, compare_name(target)) if t.resolve() in inputs]
        if taken:
            errors.append(
                f"expected an output beside the inputs, got {taken[0]} for {path}, itself an input: use -o FOLDER"
            )
        elif target.resolve() in outputs:
            other = outputs[target.resolve()]
            errors.append(f"expected an output for each, got {target} for both {other} and {path}: rename one")
        else:
            outputs[target.resolve()] = path
            good.append((path, target))
    return good, errors


def compare_name(target):
    """Where --compare writes: face_restored.png -> face_compare.png."""
    return target.with_name(target.stem.removesuffix("_restored") + "_compare.png")


def side_by_side(x, x_hat):
    """The input x (3, H, W), at the size of the result x_hat (3, H', W'), left of it: (3, H', 2 W')."""
    return torch.cat([resize(x, x_hat.shape[1:]), x_hat], dim=2)


def restore_files(args):
    """Restores what the arguments name, says what became of each, and returns 0, or 1 if some failed."""
    device = choose_device(args.device)
    pairs, errors = plan(args.images, args.out)
    for error in errors:
        print(f"restore.py: {error}", file=sys.stderr)
    failed = len(errors)
    if not pairs:
        return 1
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs that have it; nothing changes on a CPU
    model, size = load_model(args.checkpoint, args.method, device, args.steps or 25, args.seed or 0)
    color_fix = args.color_fix or ("wavelet" if args.method == "student" else "none")
    batch = 1 if device == "cpu" else args.batch  # the kernels for 1 and for N pictures round differently
    for start in range(0, len(pairs), batch):
        readable = []
        for path, target in pairs[start : start + batch]:
            try:
                readable.append((path, target, read_image(path)))
            except (ValueError, OSError) as e:
                failed += report(e)
        begin = time.perf_counter()
        try:
            with enough_memory(
                ", ".join(str(path) for path, *_ in readable), "use a smaller --batch or smaller pictures"
            ):
                x_hats = restore(model, size, [x for *_, x in readable], color_fix, device) if readable else []
        except ValueError as e:
            failed += report(e)
            continue
        ms = (time.perf_counter() - begin) * 1000 / max(1, len(readable))
        for (path, target, x), x_hat in zip(readable, x_hats, strict=True):
            try:
                write(x, x_hat, target, args.compare)
                print(
                    f"{path} {x.shape[2]}x{x.shape[1]} -> {target} {x_hat.shape[2]}x{x_hat.shape[1]}, {ms:.0f} ms",
                    flush=True,
                )
            except (ValueError, OSError) as e:
                failed += report(e)
    return 1 if failed else 0


def report(error):
    """Names a failed picture on stderr; returns 1, to be counted."""
    print(f"restore.py: {error}", file=sys.stderr)
    return 1


def write(x, x_hat, target, compare):
    """Writes the result, and the comparison with the input x where wanted; OSError if that is not possible."""
    make_folder(target.parent)
    write_image(target, x_hat)
    if compare:
        write_image(compare_name(target), side_by_side(x, x_hat))


def main(args):
    try:
        with enough_memory(f"the {args.method}", "use --device cpu, or a machine with more"):
            return restore_files(args)
    except (ValueError, OSError) as e:  # no device, output, checkpoint: nothing was restored
        print(f"restore.py: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a file name need not be valid UTF-8
    sys.exit(main(ARGS))
