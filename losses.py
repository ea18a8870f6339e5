"""The composite training objective (paper Sec. 3.4, Eq. 6): latent MSE + LPIPS + L1 + SGCL.

    L_total = lambda_lat L_lat + lambda_lpips L_lpips + lambda_l1 L_l1 + lambda_sgcl L_sgcl

L_lat compares latents, the other three compare pictures that the VAE decoder made, with gradient through it. SGCL itself
(Eq. 7-9) is sgcl.py. The paper gives no value for the lambdas: ours are defaults of train.py.
Images: (B, 3, H, W) float32 in [0, 1]. Latents: (B, C, h, w), VAE latents times their scaling factor.
"""

import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

LPIPS_FEATURES = Path(__file__).resolve().parent / "tiny" / "lpips_alex.safetensors"


def latent_loss(z_hat, z_target):
    """Mean squared distance of the student's latent to the teacher's, L_lat of Eq. 6 ("the primary anchor").

    z_hat, z_target: (B, C, h, w). Returns a scalar, the mean over all elements. ValueError if the shapes differ.
    """
    if z_hat.shape != z_target.shape:
        raise ValueError(f"expected two latents of one shape, got {tuple(z_hat.shape)} and {tuple(z_target.shape)}")
    return F.mse_loss(z_hat.float(), z_target.float())


def l1_loss(x_hat, x_target):
    """Mean absolute distance of the decoded picture to the teacher's picture X†, L_l1 of Eq. 6. Returns a scalar."""
    return F.l1_loss(x_hat.float(), x_target.float())


def lpips_loss(lpips_fn, x_hat, x_target):
    """Learned perceptual distance (LPIPS, AlexNet) of x_hat to X†, L_lpips of Eq. 6; images in [0, 1]. A scalar.

    In float32 under autocast too: it is small against the decoder, and compares features that are nearly equal.
    """
    with torch.autocast(x_hat.device.type, enabled=False):
        return lpips_fn(x_hat.float(), x_target.float(), normalize=True).mean()


def total_loss(terms, lambdas):
    """Eq. 6: the weighted sum of the terms. terms, lambdas: dicts with the same names; a term may be absent (a scalar each)."""
    return sum(lambdas[name] * value for name, value in terms.items())


def load_lpips():
    """LPIPS with AlexNet features, offline: the lpips package's linear layers on the convolutions in tiny/.

    Returns an lpips.LPIPS module in eval mode without trainable parameters: lpips_fn(a, b, normalize=True) for images in
    [0, 1], (B, 3, H, W) -> (B, 1, 1, 1). FileNotFoundError when the feature file is missing.
    Source: richzhang/PerceptualSimilarity (v0.1 linear layers), torchvision's AlexNet convolutions in float16.
    """
    import lpips  # imports torchvision: only where the metric is really used

    if not LPIPS_FEATURES.is_file():
        raise FileNotFoundError(
            f"expected the LPIPS features at {LPIPS_FEATURES.name} in tiny/: restore the file from git"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lpips_fn = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    features = load_file(
        LPIPS_FEATURES
    )  # features.{n}.weight: n is the layer's number in torchvision and in lpips' slices
    convolutions = {name.split(".")[1]: m for name, m in lpips_fn.net.named_modules() if isinstance(m, torch.nn.Conv2d)}
    for n, convolution in convolutions.items():
        convolution.load_state_dict({key: features[f"features.{n}.{key}"] for key in ("weight", "bias")})
    return lpips_fn.eval().requires_grad_(False)
