"""PMRF, the frozen teacher (paper Sec. 1.1 and 3.1, Eq. 1-4): a posterior mean, and a flow from it to natural images.

    Eq. 2   X* = E[X | Y] = argmin_Z E ||Z - X||^2                          SwinIR, posterior_mean_loss
    Eq. 3   x_t = (1 - t) x_source + t x_target, v_t = x_target - x_source  path, flow_matching_loss
    Eq. 1   dx/dt = v(x_t, t), x(0) = X*, x(1) = X_0                        PMRF.velocity, PMRF.transport
    Eq. 4   X_0 = X* + int_0^1 v(x_t, t) dt                                 PMRF.transport, in K Euler steps

Time runs from t=0 (posterior mean) to t=1 (natural image). As in PMRF's code, and unlike the paper's letters, the flow starts
at X* + sigma_s eps, and v does not see Y. Images: (B, 3, H, W) float32 in [0, 1].
Networks: SwinIR (nets/swinir.py), HDiT (nets/hdit.py). Source: ohayonguy/PMRF (MIT).

    x_hat = PMRF.from_pretrained("ohayonguy/PMRF_blind_face_image_restoration").restore(y, steps=25, seed=0)
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from nets.hdit import HDiT, neighborhood_attention  # noqa: F401 (offered here too)
from nets.swinir import SwinIR
from plumbing import published

# --- Eq. 2, the posterior mean ----------------------------------------------------------------------------------------


def posterior_mean_loss(swinir, y, x):
    """E ||X* - X||^2, whose minimiser is Eq. 2. y, x: (B, 3, H, W), degraded and clean, sides in 64s. A scalar mean."""
    return F.mse_loss(swinir(y), x)


# --- Eq. 3, the straight path and its velocity --------------------------------------------------------------------------


def path(x_source, x_target, t):
    """x_t and v_t of Eq. 3. x_source, x_target: (B, 3, H, W); t: (B,) in [0, 1]."""
    t = t.view(-1, 1, 1, 1)
    return (1 - t) * x_source + t * x_target, x_target - x_source


def flow_matching_loss(hdit, x_mmse, x, t, eps, sigma_s=0.1):
    """E ||v(x_t, t) - v_t||^2 along Eq. 3, from PMRF's source, the posterior mean plus sigma_s eps, to the clean x.

    x_mmse, x: (B, 3, H, W) in [0, 1]; eps: the same shape, standard normal; t: (B,) in [0, 1]. A scalar mean.
    """
    x_t, v_t = path(x_mmse + sigma_s * eps, x, t)
    return F.mse_loss(hdit(x_t, t), v_t)


# --- Eq. 1 and 4, the transport -----------------------------------------------------------------------------------------


class PMRF(nn.Module):
    """The teacher: `swinir` gives the posterior mean, `hdit` the velocity. sigma_s, t_eps: transport's defaults."""

    def __init__(self, swinir, hdit, sigma_s=0.1, t_eps=0.0):
        super().__init__()
        self.mmse_model, self.model = swinir, hdit  # their names in the published weights
        self.sigma_s, self.t_eps = sigma_s, t_eps

    @torch.no_grad()
    def posterior_mean(self, y):
        """X* of Eq. 2. y: (B, 3, H, W) in [0, 1] -> the same, clipped; sides rounded up to multiples of 8."""
        return self.mmse_model(y).clamp(0, 1)

    def velocity(self, x_t, t):
        """v(x_t, t) of Eq. 1, with gradient. x_t: (B, 3, H, W); t in [0, 1]: a number, or (B,). Has x_t's shape and dtype."""
        t = t.to(x_t) if torch.is_tensor(t) else x_t.new_full((), t)  # made there: no GPU is waited for
        if t.ndim > 1 or t.numel() not in (1, len(x_t)):
            raise ValueError(f"expected one t, or one for each of {len(x_t)} pictures, got shape {tuple(t.shape)}")
        return self.model(x_t, t.expand(len(x_t))).to(x_t.dtype)  # under autocast v is rounded, the sum of Eq. 4 is not

    @torch.no_grad()
    def transport(self, x_mmse, eps, steps=25, sigma_s=None, t_eps=None):
        """X_0 of Eq. 4, by `steps` left Euler steps of Eq. 1 from t_eps to 1, clipped to [0, 1] only at the end.

        x_mmse: (B, 3, H, W) in [0, 1]; eps: the same shape, standard normal; sigma_s, t_eps: by default those of the weights.
        ValueError unless steps is a whole number from 1 on.
        """
        sigma_s, t_eps = self.sigma_s if sigma_s is None else sigma_s, self.t_eps if t_eps is None else t_eps
        if steps != int(steps) or steps < 1:
            raise ValueError(f"expected a whole number of steps, 1 or more, got {steps}")
        x, dt = x_mmse + sigma_s * eps, (1 - t_eps) / steps  # x(0)
        for i in range(int(steps)):
            x = x + self.velocity(x, t_eps + i * dt) * dt  # a step of Eq. 1; their sum is Eq. 4
        return x.clamp(0, 1)

    @torch.no_grad()
    def restore(self, y, steps=25, seed=0):
        """Posterior mean, then transport. y: (B, 3, H, W) in [0, 1] -> the same; sides rounded up to multiples of 8.

        seed: one number for all pictures, or one a picture (modulo 2^32). Each picture draws its own noise, on the CPU. So
        the batch changes a picture by rounding only.
        """
        x_mmse = self.posterior_mean(y)
        seeds = list(seed) if hasattr(seed, "__len__") else [seed] * len(y)
        if len(seeds) != len(y):
            raise ValueError(f"expected one seed, or one for each of {len(y)} pictures, got {len(seeds)}")
        eps = [torch.randn(x_mmse.shape[1:], generator=torch.Generator().manual_seed(int(s) % 2**32)) for s in seeds]
        return self.transport(x_mmse, torch.stack(eps).to(x_mmse), steps)

    @classmethod
    def from_pretrained(cls, name_or_folder):
        """The teacher with published weights, float32, eval mode: a hub id, a folder like one, or a Lightning .ckpt.

        The files' num_flow_steps is what training was validated with (50 in PMRF's script); steps stays the paper's 25.
        OSError if nothing is there, or if a file is cut, foreign or of another size.
        """
        files = "config.json and model.safetensors, 0.7 GB"
        with published.loading("teacher as PMRF published it", name_or_folder, files):
            settings, weights, average = published.read_pmrf(name_or_folder)
            with torch.device("meta"):  # random weights would be replaced at once: make none
                swinir, hdit = SwinIR(**settings.pop("swinir")), HDiT(**settings.pop("hdit"))
            return published.fill_pmrf(cls(swinir, hdit, **settings), weights, average).eval()

    def save_pretrained(self, folder, dtype=torch.float16):
        """Writes config.json (as published, plus the networks' sizes) and model.safetensors in dtype; no half files."""
        config = {"mmse_noise_std": self.sigma_s, "num_flow_steps": 25, "eps": self.t_eps}
        config |= {"hdit": self.model.config, "swinir": self.mmse_model.config}
        published.write_pmrf(folder, config, self, dtype)
