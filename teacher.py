"""PMRF, the frozen teacher (paper Sec. 1.1 and 3.1, Eq. 1-4): a posterior mean, and a flow from it to natural images.

    Eq. 1   dx/dt = v(x_t, t), x(0) = X*, x(1) = X_0                        PMRF.transport, by left Euler steps
    Eq. 2   X* = E[X | Y] = argmin E ||X* - X||^2                           SwinIR, posterior_mean_loss
    Eq. 3   x_t = (1 - t) x_source + t x_target, v_t = x_target - x_source  path, flow_matching_loss
    Eq. 4   X_0 = X* + int_0^1 v(x_t, t) dt                                 PMRF.transport, the sum of its steps

Time runs from t=0 (posterior mean) to t=1 (natural image). PMRF starts at X* + sigma_s eps, and its v does not see Y.
Images: (B, 3, H, W) float32 in [0, 1]. Shapes: B pictures, h x w tokens of C channels, d channels a head.
Networks: SwinIR (Liang et al. 2021, as DifFace trained it), HDiT (Crowson et al. 2024), both as in ohayonguy/PMRF (MIT).

    x_hat = PMRF.from_pretrained("ohayonguy/PMRF_blind_face_image_restoration").restore(y, steps=25, seed=0)
"""

import json
import pickle
import re
from pathlib import Path

import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F

from nets.hdit import HDiT, neighborhood_attention  # noqa: F401 (offered here too)
from nets.swinir import SwinIR
from plumbing.pictures import write_bytes

# The published sizes, swinir_L and hdit_ImageNet256Sp4
SWINIR = dict(embed_dim=180, depths=[6] * 8, num_heads=[6] * 8)
HDIT = dict(in_channels=3, out_channels=3, patch_size=4, widths=[256, 512, 1024], depths=[2, 2, 8])
HDIT |= dict(kernel_sizes=[7, 7, None], d_head=64, mapping_width=768, mapping_depth=2)


def posterior_mean_loss(swinir, y, x):
    """E ||X* - X||^2, whose minimiser is Eq. 2. y, x: (B, 3, H, W), degraded and clean, sides in 64s. A scalar mean."""
    return F.mse_loss(swinir(y), x)


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


# ---------------------------------------------------------------------------------- Eq. 1 and 4, the transport


class PMRF(nn.Module):
    """The teacher: `swinir` gives the posterior mean, `hdit` the velocity. sigma_s, steps, t_eps: transport's defaults."""

    def __init__(self, swinir, hdit, sigma_s=0.1, steps=25, t_eps=0.0):
        super().__init__()
        self.mmse_model, self.model = swinir, hdit  # their names in the published weights
        self.sigma_s, self.steps, self.t_eps = sigma_s, steps, t_eps

    @torch.no_grad()
    def posterior_mean(self, y):
        """X* of Eq. 2. y: (B, 3, H, W) in [0, 1] -> (B, 3, 8h, 8w) in [0, 1], clipped, the size that SwinIR gives."""
        return self.mmse_model(y).clamp(0, 1)

    def velocity(self, x_t, t):
        """v(x_t, t) of Eq. 1, with gradient. x_t: (B, 3, H, W); t: in [0, 1], a number or (B,). Like x_t, dtype too."""
        t = torch.as_tensor(t, dtype=x_t.dtype, device=x_t.device)
        if t.ndim > 1 or t.numel() not in (1, len(x_t)):
            raise ValueError(f"expected one t, or one for each of {len(x_t)} pictures, got shape {tuple(t.shape)}")
        return self.model(x_t, t.expand(len(x_t))).to(x_t.dtype)  # under autocast v is rounded, the sum of Eq. 4 is not

    @torch.no_grad()
    def transport(self, x_mmse, eps, steps=None, sigma_s=None, t_eps=None):
        """X_0 of Eq. 4, by `steps` left Euler steps of Eq. 1 from t_eps to 1, clipped to [0, 1] only at the end.

        x_mmse: (B, 3, H, W) in [0, 1]; eps: the same shape, standard normal. Default: 25 steps, and sigma_s 0.1, t_eps 0
        where the config of the weights names no others. ValueError for steps < 1.
        """
        steps, sigma_s = self.steps if steps is None else steps, self.sigma_s if sigma_s is None else sigma_s
        t_eps = self.t_eps if t_eps is None else t_eps
        if steps != int(steps) or steps < 1:
            raise ValueError(f"expected a whole number of steps, 1 or more, got {steps}")
        x, dt = x_mmse + sigma_s * eps, (1 - t_eps) / steps  # x(0) of Eq. 1
        for i in range(int(steps)):
            x = x + self.velocity(x, t_eps + i * dt) * dt  # Eq. 4
        return x.clamp(0, 1)

    @torch.no_grad()
    def restore(self, y, steps=None, seed=0, sigma_s=None):
        """Posterior mean, then transport. y: (B, 3, H, W) in [0, 1] -> (B, 3, 8h, 8w) in [0, 1], the size SwinIR gives.

        seed: one for every picture, or a sequence of one each, whole numbers modulo 2^32. Noise is drawn for each picture
        alone, on the CPU, so that a picture depends on the batch it is in by rounding only: 1 and 8 differ by 2e-6 there.
        """
        x_mmse = self.posterior_mean(y)
        seeds = list(seed) if hasattr(seed, "__len__") else [seed] * len(y)
        if len(seeds) != len(y):
            raise ValueError(f"expected one seed, or one for each of {len(y)} pictures, got {len(seeds)}")
        eps = [torch.randn(x_mmse.shape[1:], generator=torch.Generator().manual_seed(int(s) % 2**32)) for s in seeds]
        return self.transport(x_mmse, torch.stack(eps).to(x_mmse), steps, sigma_s)

    @classmethod
    def from_pretrained(cls, name_or_folder):
        """The teacher with published weights, float32, eval mode: a hub id, a folder like one, or a Lightning .ckpt.

        steps stays the paper's 25: num_flow_steps in the files is what training was validated with (50 in PMRF's script).
        Raises FileNotFoundError for what is not there, ValueError for files that are cut, foreign or of other sizes.
        """
        source = Path(name_or_folder)
        try:
            config, weights, average = read_lightning(source) if source.suffix == ".ckpt" else read_repository(source)
            if not isinstance(config, dict):
                raise ValueError(f"settings of type {type(config).__name__} instead of a dict")
            with torch.device("meta"):
                pmrf = cls(SwinIR(**sizes(config, "swinir")), HDiT(**sizes(config, "hdit")))
            pmrf.sigma_s = float(config.get("mmse_noise_std", pmrf.sigma_s))
            pmrf.t_eps = float(config.get("eps", pmrf.t_eps))
            if average is not None:
                names = [f"model.{name}" for name, _ in pmrf.model.named_parameters()]
                if len(average) != len(names):
                    raise ValueError(f"{len(average)} averaged parameters instead of {len(names)}")
                weights |= dict(zip(names, average, strict=True))
            pmrf.to_empty(device="cpu").load_state_dict(weights)
        except OSError:
            raise
        except Exception as e:  # a foreign file can fail in any way
            got = f"expected PMRF as published, got {one_line(e)}"
            raise ValueError(f"{source}: {got}; check the download and the sizes") from None
        return pmrf.eval()

    def save_pretrained(self, folder, dtype=torch.float16):
        """Write config.json and model.safetensors as published, plus the sizes; parameters in dtype; no half files."""
        config = {"arch": "hdit", "mmse_model_arch": "swinir", "stage": "flow", "conditional": False}
        config |= {"mmse_noise_std": self.sigma_s, "num_flow_steps": self.steps, "eps": self.t_eps}
        config |= {"hdit": self.model.config, "swinir": self.mmse_model.config}
        weights = {k: p.detach().to("cpu", dtype).contiguous() for k, p in self.named_parameters()}
        weights |= {k: b.cpu() for k, b in self.named_buffers()}  # the frequencies of time stay float32
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / "model.safetensors", safetensors.torch.save(weights, {"format": "pt"}))
        write_bytes(folder / "config.json", json.dumps(config, indent=1).encode() + b"\n")


def sizes(config, net):
    """Constructor arguments of "swinir" or "hdit": those in the config, or the published ones that its `arch` names."""
    key, arch, published = {
        "swinir": ("mmse_model_arch", "swinir_L", SWINIR),
        "hdit": ("arch", "hdit_ImageNet256Sp4", HDIT),
    }[net]
    if net not in config and config.get(key, arch) != arch:
        raise ValueError(f"{key} {config[key]!r} without its sizes under {net!r} (known without: {arch})")
    return config.get(net, published)


def read_repository(path):
    """config, weights, None from config.json and model.safetensors of a folder or a hub repository."""
    names = ("config.json", "model.safetensors")
    if path.is_dir():
        files = [path / name for name in names]
        if missing := [f.name for f in files if not f.is_file()]:
            got = " and no ".join(missing)
            raise FileNotFoundError(f"{path}: expected {names[0]} and {names[1]}, got no {got}: copy both there")
    else:
        need = f"expected a folder, a .ckpt or a hub repository with {names[0]} and {names[1]} (published: 0.7 GB)"
        if path.is_absolute() or len(path.parts) != 2:  # no owner/name
            raise FileNotFoundError(f"{path}: {need}, got none of them: check the path")
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils import logging

        logging.set_verbosity_error()  # without a network it would announce each retry
        try:
            files = [Path(hf_hub_download(str(path), name)) for name in names]
        except Exception as e:  # offline, unknown, gated: all the same to the user
            raise FileNotFoundError(f"{path}: {need}, got {type(e).__name__}: online, run hf download {path}") from None
    config = json.loads(files[0].read_text())
    with safetensors.safe_open(files[1], "pt") as f:
        return config, {k: f.get_tensor(k) for k in f.keys() if k.startswith(("model.", "mmse_model."))}, None


def read_lightning(path):
    """config, weights, averaged parameters of the flow (a list in HDiT's order) from a training checkpoint."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a Lightning checkpoint, got no file: check the path")
    try:
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:  # its own text advises to load the file without that check, which may run code
        found = re.search(r"GLOBAL (\S+)", str(e))
        raise ValueError(f"{found[1]} in it, which could run code" if found else "no file of torch.save") from None
    try:
        config, average = ckpt["hyper_parameters"], list(ckpt["ema"]["shadow_params"])
        weights = {k: w for k, w in ckpt["state_dict"].items() if k.startswith(("model.", "mmse_model."))}
    except (LookupError, TypeError, AttributeError):
        raise ValueError("a file without hyper_parameters, state_dict or ema.shadow_params") from None
    return config, weights, average


def one_line(error):
    """What was wrong with a file, from whatever error it caused; of all keys that do not fit, the first and the last."""
    lines = [line.strip()[:200] for line in str(error).splitlines()] or ["nothing in it"]
    lines = dict.fromkeys((lines[1], lines[-1])) if "loading state_dict" in lines[0] else lines[:1]
    kind = "" if type(error) in (ValueError, RuntimeError) else f"{type(error).__name__}: "
    return kind + "; ".join(lines)
