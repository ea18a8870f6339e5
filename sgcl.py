"""Score-guided consistency loss (paper Sec. 3.4.1, Eq. 7-9): the teacher's velocity as a critic of the student's picture.

Eq. 7 moves the student's picture back to a small t. From there the frozen teacher estimates a clean picture (Eq. 8).
Eq. 9 pulls the student's picture to it. Time runs from t = 0 (source: noise or posterior mean) to t = 1 (natural image).
Images: (B, 3, H, W) in about [0, 1]. t: (B,).

    t, eps = draw(BANDS["A"], x_hat.shape[1:], generators)
    loss = sgcl_loss(x_hat, teacher.velocity, t, source=eps)
"""

import torch
import torch.nn.functional as F

BANDS = {"A": (0.05, 0.25), "B": (0.05, 0.20)}  # Sec. 3.4.1, per stage (Sec. 4 gives A's for both)


def draw(band, shape, generators):
    """Draws t and eps of Eq. 7. Each picture has its own CPU generator, so neither batch nor processes change them.

    band: (low, high), 0 <= low < high < 1; shape: (3, H, W). Returns t (B,), uniform in the band, and eps (B, 3, H, W) of
    N(0, I), both on the CPU. ValueError for another band.
    """
    low, high = band
    if not 0 <= low < high < 1:
        raise ValueError(f"expected a band 0 <= low < high < 1 of times, got {band}")
    t = torch.cat([low + (high - low) * torch.rand(1, generator=g) for g in generators])
    return t, torch.stack([torch.randn(shape, generator=g) for g in generators])


def mmse_source(x_mmse, eps, sigma_s):
    """x_mmse + sigma_s eps, the source that PMRF's field was trained on; it may replace eps in Eq. 7."""
    return x_mmse + sigma_s * eps


def perturb(x_hat, t, source):
    """Eq. 7: x_t = t x_hat + (1 - t) source."""
    t = t.to(x_hat)[:, None, None, None]
    return t * x_hat + (1 - t) * source


def clean_estimate(x_t, t, velocity):
    """Eq. 8: x_clean = clamp(x_t + (1 - t) v(x_t, t), 0, 1), the end of one straight step along the teacher's velocity."""
    t = t.to(x_t)
    return (x_t + (1 - t)[:, None, None, None] * velocity(x_t, t)).clamp(0, 1)


def sgcl_loss(x_hat, velocity, t, source):
    """Eq. 9: || x_hat - sg(x_clean) ||^2, the mean over all elements (the paper writes a norm; lambda absorbs the factor).

    x_hat: (B, 3, H, W), with gradient; velocity: function (x_t, t) -> v of the frozen teacher; t: (B,); source: (B, 3, H, W),
    eps for the paper's Eq. 7 or mmse_source(...).
    The gradient is 2 (x_hat - x_clean) / N alone: none flows through the teacher. Returns a scalar.
    """
    with torch.no_grad():  # sg(.)
        x_t = perturb(x_hat.float(), t, source)  # Eq. 7
        x_clean = clean_estimate(x_t, t, velocity)  # Eq. 8
    return F.mse_loss(x_hat.float(), x_clean)
