"""The degradation of the training pairs (paper Sec. 4, Datasets): blur, downsampling, noise, JPEG, and back up.

    y = [ (x * k_sigma) down_r + n_delta ]_JPEG_q up_r                                         x, y: (3, H, W) in [0, 1]

The paper says "consistent with Real-ESRGAN" but describes one pass, the pipeline of blind face restoration (GFPGAN, Sec. 4.1):
that is the default. The ranges `realesrgan` are Real-ESRGAN's own two passes. Left out there is what the paper does not name:
sinc filters, kernels that are not Gaussian, Poisson and gray noise; and of its two last steps, JPEG comes first. `apply` is a
function of picture and parameters alone: the same bytes on any number of threads, with the same libjpeg.

Usage: python degrade.py samples/clean -o samples/degraded --level medium
"""

import argparse
import sys
from pathlib import Path

from plumbing import commands, presets


def parse_args(argv=None):
    p = argparse.ArgumentParser(description="Degrade pictures: blur, downsampling, noise, JPEG, and back up (Sec. 4).")
    p.add_argument("images", nargs="+", metavar="IMAGE_OR_FOLDER", help="pictures, or folders searched recursively")
    p.add_argument("-o", "--out", type=Path, required=True, metavar="OUT", help="folder for the degraded copies (PNG)")
    how = p.add_mutually_exclusive_group()
    how.add_argument("--ranges", choices=presets.RANGES, default="difface", help="draw from these (default difface)")
    how.add_argument("--level", choices=presets.LEVELS, help="fixed parameters instead of drawn ones")
    p.add_argument("--size", type=commands.whole(16, 8192), metavar="N", help="first crop to a square of N px")
    p.add_argument("--seed", type=commands.whole(0), default=0, help="seed of parameters and noise (default 0)")
    return p.parse_args(argv)


if __name__ == "__main__":
    ARGS = commands.begin(parse_args, "what is written is whole")

import dataclasses
import io
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from plumbing.files import make_folder
from plumbing.pictures import read_image, square, write_image
from plumbing.targets import plan_copies


def apply(x, params):
    """Degrades a picture: y = [ (x * k_sigma) down_r + n_delta ]_JPEG_q up_r.

    x: (3, H, W) float32 in [0, 1]. Returns y, same shape, 8-bit values / 255, a function of x and params alone. If
    params.gray, y is gray; who compares it with x makes x gray, too (`to_gray`). Raises ValueError for another shape.
    """
    if x.ndim != 3 or x.shape[0] != 3:
        raise ValueError(f"expected a picture (3, H, W), got {tuple(x.shape)}: degrade the pictures one by one")
    y = x.detach().cpu().numpy().astype(np.float64) * 255
    for p in (params.before, params) if params.before else (params,):  # Real-ESRGAN has two passes
        *_, y = one_pass(y, p, x.shape[1:])
    y = bilinear(y, x.shape[1:])
    y = to_gray(torch.from_numpy(y)).numpy() if params.gray else y
    return torch.from_numpy(_round8(y).astype(np.float32) / 255)


def one_pass(y, params, size):
    """[ (y * k_sigma) down_r + n_delta ]_JPEG_q of y (3, h, w) float64, 0 ... 255; r counts from size = (H, W).

    Yields what there is after each of the four: blur, downsampling, noise, JPEG.
    """
    yield (y := blur(y, gaussian_kernel(params.kernel_size, params.sigma_x, params.sigma_y, params.theta).numpy()))
    yield (y := bilinear(y, [max(1, int(n / params.down)) for n in size]))
    yield (y := y + params.noise * np.random.Generator(np.random.PCG64(params.noise_seed)).standard_normal(y.shape))
    yield jpeg(_round8(y), params.jpeg).astype(np.float64)


def gaussian_kernel(size, sigma_x, sigma_y, theta):
    """Gaussian blur kernel k_sigma, (size, size) float64, sum 1, index [row y, column x].

    size: odd, pixels; sigma_x, sigma_y > 0: standard deviations in pixels along axes turned by theta radians, so the
    covariance is R diag(sigma_x^2, sigma_y^2) R^T. Raises ValueError for another size or sigma.
    """
    if size < 1 or size % 2 == 0 or not min(sigma_x, sigma_y) > 0:
        raise ValueError(f"expected odd size, sigmas > 0, got {size}, {sigma_x}, {sigma_y}: use size + 1, sigma 0.1")
    y, x = np.mgrid[:size, :size] - size // 2
    u = (x * math.cos(theta) + y * math.sin(theta)) / sigma_x
    v = (y * math.cos(theta) - x * math.sin(theta)) / sigma_y
    k = np.exp(-0.5 * (u**2 + v**2))
    return torch.from_numpy(k / k.sum())


def blur(x, kernel):
    """Correlation of x (3, H, W) with kernel (s, s), reflect-101 borders; float64 numpy, through the Fourier transform.

    Numpy's transform is one thread and the same everywhere; a 41 x 41 kernel costs no more than a small one.
    """
    pad = kernel.shape[0] // 2
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad)), mode="reflect")  # (3, H + 2 pad, W + 2 pad)
    shape = [_fast_length(n) for n in padded.shape[1:]]
    spectrum = np.fft.rfft2(padded, s=shape) * np.conj(np.fft.rfft2(kernel, s=shape))
    return np.fft.irfft2(spectrum, s=shape)[:, : x.shape[1], : x.shape[2]]  # what wraps around lies beyond H, W


def _fast_length(n):
    while 30**16 % n:  # up to the next product of twos, threes and fives, for which the transform is twice as fast
        n += 1
    return n


def bilinear(x, size):
    """Bilinear resampling of x (3, h, w) to size = (H, W) like OpenCV: pixel centres, no antialiasing; float64."""
    return F.interpolate(torch.from_numpy(x)[None], tuple(size), mode="bilinear", align_corners=False)[0].numpy()


def jpeg(x, quality):
    """x (3, H, W) uint8 after one JPEG round trip (4:2:0, as libjpeg and OpenCV have it); uint8 numpy."""
    f = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(x.transpose(1, 2, 0))).save(f, "JPEG", quality=quality, subsampling=2)
    return np.asarray(Image.open(f).convert("RGB")).transpose(2, 0, 1)


def to_gray(x):
    """Luma (BT.601) in all three channels; x: (..., 3, H, W) in [0, 1]. For the target of a gray sample."""
    r, g, b = x.unbind(-3)
    gray = 0.299 * r + 0.587 * g + 0.114 * b
    return torch.stack([gray, gray, gray], -3)


def _round8(v):
    # through a grid of 2^-24, so that a value a rounding error away from a half rounds like the half itself
    return np.clip(np.round(np.round(v * 2**24) / 2**24), 0, 255).astype(np.uint8)


# --- the parameters: which there are, and how they are drawn ----------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Params:
    """One degradation. `dataclasses.asdict` makes a plain JSON dict of it, `Params(**d)` reads it back."""

    kernel_size: int  # odd, pixels
    sigma_x: float  # pixels, > 0
    sigma_y: float
    theta: float  # radians, from the x axis towards the y axis (downwards)
    down: float  # factor r > 0
    noise: float  # standard deviation, grey levels of 255
    noise_seed: int
    jpeg: int  # quality 1 ... 100
    gray: bool = False
    before: "Params | None" = None  # the pass before this one

    def __post_init__(self):
        if isinstance(self.before, dict):  # from JSON
            object.__setattr__(self, "before", Params(**self.before))


@dataclasses.dataclass(frozen=True)
class Ranges:
    """What `sample` draws from, uniformly; spatial values for pictures of 512 px."""

    blur: tuple[float, float]  # sigma of the Gaussian, pixels
    down: tuple  # factor r; below 1 the picture is enlarged. Or ((probability, lowest, highest 1 / r), ...)
    noise: tuple[float, float]  # standard deviation, grey levels of 255
    jpeg: tuple[float, float]  # quality
    gray: float = 0.0  # probability of a gray sample
    isotropic: float = 0.5  # probability of a round kernel
    kernel: int | tuple[int, ...] = 41  # kernel size, pixels, odd; or those of which one is drawn; 1: no blur
    before: "Ranges | None" = None  # the pass before this one


RANGES = {
    # zsyOAOA/DifFace configs/training/swinir_ffhq512.yaml: the posterior-mean network of PMRF, and PMRF itself
    "difface": Ranges(blur=(0.1, 15), down=(0.8, 32), noise=(0, 20), jpeg=(30, 100), gray=0.01),
    # TencentARC/GFPGAN options/train_gfpgan_v1_simple.yml, with its gt_gray variant (no colour jitter)
    "gfpgan": Ranges(blur=(0.1, 10), down=(0.8, 8), noise=(0, 20), jpeg=(60, 100), gray=0.01),
    # sczhou/CodeFormer options/CodeFormer_stage3.yml: its small ranges, and its large ones (those of stage 2)
    "codeformer": Ranges(blur=(0.1, 10), down=(1, 12), noise=(0, 15), jpeg=(60, 100)),
    "codeformer-large": Ranges(blur=(1, 15), down=(4, 30), noise=(0, 20), jpeg=(30, 80)),
}
RANGES["realesrgan"] = Ranges(  # xinntao/Real-ESRGAN options/train_realesrnet_x4plus.yml; its pictures end at a quarter
    blur=(0.2, 1.5), down=((0.3, 1 / 4, 1.2 / 4), (0.4, 0.3 / 4, 1 / 4), (0.3, 1 / 4, 1 / 4)), noise=(1, 25), jpeg=(30, 95),
    isotropic=0.45 / 0.7, kernel=(1, 1, *range(7, 22, 2)), before=Ranges(
        blur=(0.2, 3), down=((0.2, 1, 1.5), (0.7, 0.15, 1), (0.1, 1, 1)), noise=(1, 30), jpeg=(30, 95),
        isotropic=0.45 / 0.7, kernel=tuple(range(7, 22, 2)),
    ),
)  # fmt: skip
MIN_DOWN = 0.8  # scaled ranges do not go below: enlarging a small picture more would lose nothing but time


def sample(rng, ranges="difface", size=512):
    """Draws the parameters of one degradation.

    rng: numpy.random.Generator; ranges: a name in RANGES or a Ranges, for 512 px; size: side of the pictures in pixels:
    blur, kernel and downsampling are scaled by size / 512, noise and JPEG stay. Returns Params.
    """
    r, scale = RANGES[ranges] if isinstance(ranges, str) else ranges, size / 512
    before = sample(rng, r.before, size) if r.before else None
    sigma_x, sigma_y = (float(s) * scale for s in rng.uniform(*r.blur, 2))
    theta = float(rng.uniform(-math.pi, math.pi))
    if rng.uniform() < r.isotropic:
        sigma_y, theta = sigma_x, 0.0
    if len(r.down) == 3:  # Real-ESRGAN's: enlarged, shrunk or kept
        _, lowest, highest = r.down[rng.choice(3, p=[p for p, _, _ in r.down])]
        down = 1 / float(rng.uniform(lowest, highest))
        down = max(down * scale, min(down, MIN_DOWN))
    else:
        down = float(rng.uniform(*(max(d * scale, MIN_DOWN) for d in r.down)))
    noise, jpeg, gray = float(rng.uniform(*r.noise)), int(rng.uniform(*r.jpeg)), bool(rng.uniform() < r.gray)
    noise_seed = int(rng.integers(2**32))
    radius = (r.kernel if isinstance(r.kernel, int) else int(rng.choice(r.kernel))) // 2
    kernel = 2 * max(min(1, radius), round(radius * scale)) + 1
    return Params(kernel, sigma_x, sigma_y, theta, down, noise, noise_seed, jpeg, gray, before)


LEVELS = {  # ranges without width; our choice: a mild web copy, an old small picture, and close to the far end of "difface"
    "light": Ranges(blur=(1.5, 1.5), down=(2, 2), noise=(3, 3), jpeg=(80, 80), isotropic=1),
    "medium": Ranges(blur=(4, 4), down=(6, 6), noise=(8, 8), jpeg=(60, 60), isotropic=1),
    "heavy": Ranges(blur=(8, 8), down=(16, 16), noise=(15, 15), jpeg=(40, 40), isotropic=1),
}


def level(name, size=512, seed=0):
    """The fixed parameters LEVELS[name], scaled by size / 512 as in `sample`, with the noise of `seed`."""
    return dataclasses.replace(sample(np.random.default_rng(0), LEVELS[name], size), noise_seed=seed)


# --- the command ------------------------------------------------------------------------------------------------------
# The third number in a test's seed, where training has a face's repeat (numpy reads (seed, i) as (seed, i, 0)): so no test
# repeats a degradation of training.
EVALUATION = 2**32 - 1


def work(args):
    """Writes a degraded copy of each picture, and prints its parameters. Returns the exit code."""
    pairs, errors = plan_copies(args.images, args.out)
    failed = sum(map(commands.complain, errors))
    for i, (path, target) in enumerate(pairs):
        try:
            with commands.enough_memory(path, "make it smaller, or use --size"):
                x = read_image(path)
                x = x if args.size is None else square(x, args.size)
                size, rng = min(x.shape[1:]), np.random.default_rng((args.seed, i, EVALUATION))
                params = level(args.level, size, args.seed) if args.level else sample(rng, args.ranges, size)
                y = apply(x, params)
        except (ValueError, OSError) as e:
            failed += commands.complain(e)
            continue
        make_folder(target.parent)
        write_image(target, y)
        commands.say(f"{target}  {params}")
    return 1 if failed else 0


def main(args):
    return commands.run(work, args)


if __name__ == "__main__":
    sys.exit(main(ARGS))
