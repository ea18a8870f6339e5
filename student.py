"""The one-step student (paper Sec. 3.2, 3.3.2, Eq. 5): SD v1.5's UNet as a latent consistency model of face restoration.

    z_y   = s E(2y - 1)                                     Sec. 3.2, the space bridge: the mean of the VAE's posterior
    c     = visual_encoder(CLIP(y)) + Z(DINOv2(y))          Sec. 3.3.1, (B, 77, D); Z is adapter.py
    z_tau = alpha_tau z_y                                   the entry of the one step, three readings: `enter`
    eps   = UNet(z_tau, tau, c, spatial_encoder(z_tau, tau, c, y))
    x_0   = (z_tau - sigma_tau eps) / alpha_tau
    z     = c_skip(tau) z_tau + c_out(tau) x_0              Eq. 5: S_theta(y), which training pulls to the teacher's latent
    x     = D(z / s)                                        back over the bridge

Images: (B, 3, H, W) float32 in [0, 1], at the preset's size. Latents: (B, C, H/8, W/8), scaled. tau = 499 of 0 ... 999.
A config is a dict of names and sizes (plumbing/presets.py). Sources of the parts: diffusers (UNet, VAE, ControlNet), timm
(CLIP, DINOv2), sen-mao/InterLCM (visual encoder), latent consistency models (boundary scalings).
"""

import json
import re
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers import ControlNetModel
from safetensors.torch import load_file, save_file

from adapter import SemanticAdapter
from nets.visual_encoder import VisualEncoder
from plumbing.devices import constant, dtype_of
from plumbing.presets import load_config, newest_checkpoint
from plumbing.published import load_lora, load_schedule, load_unet, load_vae, load_vit, loading

# --- Sec. 3.2, the space bridge -----------------------------------------------------------------------------------------


def encode(vae, x):
    """z = s E(2x - 1), the mean of the encoder's posterior: x (B, 3, H, W) in [0, 1] -> (B, C, H/8, W/8). Deterministic."""
    return vae.config.scaling_factor * vae.encode((2 * x - 1).to(dtype_of(vae))).latent_dist.mode().float()


def decode(vae, z):
    """x = D(z / s), mapped from [-1, 1] to [0, 1] and not clipped: (B, C, h, w) -> (B, 3, 8h, 8w). With gradient."""
    return (vae.decode((z / vae.config.scaling_factor).to(dtype_of(vae))).sample.float() + 1) / 2


# --- Sec. 3.3.1, what the frozen backbones see --------------------------------------------------------------------------


def vit_tokens(vit, y):
    """All tokens after the last norm, without projection: y (B, 3, H, W) in [0, 1] -> (B, 1 + N, D), the class token first."""
    cfg = vit.pretrained_cfg
    y = F.interpolate(y, size=vit.patch_embed.img_size, mode="bicubic", antialias=True, align_corners=False)
    mean, std = (constant(tuple(cfg[k]), y.device)[:, None, None] for k in ("mean", "std"))
    return vit.forward_features(((y - mean) / std).to(dtype_of(vit)))


# --- Eq. 5, the one step ------------------------------------------------------------------------------------------------


def enter(z_y, alpha_bar, entry):
    """z_tau, the latent that the one step starts from; z_y (B, C, h, w) -> the same shape. The paper does not say which.

    "mean": alpha z_y, the mean of q(z_tau | z_y). The base knows this amplitude, and eps = 0 makes the step the identity.
    "clean": z_y itself, 1.9 times the contrast that the base expects at tau = 499.
    "noised": alpha z_y + sigma noise, as InterLCM's first step. One noise for all pictures, so the step stays a function.
    """
    if entry == "clean":
        return z_y
    if entry == "mean":
        return alpha_bar**0.5 * z_y
    noise = torch.randn(z_y.shape[1:], generator=torch.Generator().manual_seed(0)).to(z_y)
    return alpha_bar**0.5 * z_y + (1 - alpha_bar) ** 0.5 * noise


def x0_from_eps(z_tau, eps, alpha_bar):
    """x_0 = (z_tau - sigma eps) / alpha with alpha = sqrt(alpha_bar), sigma = sqrt(1 - alpha_bar) at the timestep. A latent."""
    return (z_tau - (1 - alpha_bar) ** 0.5 * eps) / alpha_bar**0.5


def boundary_scalings(tau, sigma_data=0.5, timestep_scaling=10.0):
    """c_skip(tau), c_out(tau) of latent consistency models: 1 and 0 at tau = 0, about 0 and 1 at 499. Floats."""
    s = timestep_scaling * tau
    return sigma_data**2 / (s**2 + sigma_data**2), s / (s**2 + sigma_data**2) ** 0.5


# --- Sec. 3.3.2, transport-adaptive LoRA --------------------------------------------------------------------------------

# Cross-attention and feed-forward, nothing else: no self-attention attn1, no convolution
LORA_TARGETS = r".*(attn2\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2))"


@torch.no_grad()
def merge_lora(unet, layers):
    """Adds (alpha / r) B A to each layer's W: the LoRA's effect stays, its cost goes. Returns the same UNet.

    layers: {name in the UNet: (A (r, in, ...), B (out, r, ...), alpha / r)}, linear layers or convolutions, from load_lora.
    LCM-LoRA is merged the same way. It turns SD v1.5's UNet into a latent consistency model.
    """
    for name, (A, B, scale) in layers.items():
        W = unet.get_submodule(name).weight
        W += scale * (B.flatten(1) @ A.flatten(1)).view_as(W).to(W)
    return unet


# --- the student --------------------------------------------------------------------------------------------------------


class Student(nn.Module):
    """S_theta of Eq. 5. Build it with `from_published` (Stage A's start) or `load` (a checkpoint)."""

    def __init__(self, config, vae, unet, clip, dino, alphas_bar):
        super().__init__()
        self.config, self.image_size, self.tau = config, config["image_size"], config["timestep"]
        self.alphas_bar = alphas_bar
        self.vae, self.clip, self.dino, self.unet, self.has_lora = vae, clip, dino, unet, False
        self.visual_encoder = VisualEncoder(**config["visual_encoder"])
        self.adapter = SemanticAdapter(dino.num_features, unet.config.cross_attention_dim, config["adapter"])
        sizes = dict(conditioning_channels=3, conditioning_embedding_out_channels=tuple(config["condition_channels"]))
        self.spatial_encoder = ControlNetModel.from_unet(unet, **sizes)
        self.eval()

    @classmethod
    def from_published(cls, config):
        """Stage A's start: published weights, fresh encoders, adapter at zero. Raises OSError."""
        vae, unet, alphas_bar = load_vae(config), load_unet(config), load_schedule(config)
        student = cls(config, vae, unet, load_vit(config["clip"]), load_vit(config["dino"]), alphas_bar)
        # merged after the spatial encoder has copied the plain UNet (ControlNet's recipe)
        if name := config["lcm_lora"]:
            with loading("LCM-LoRA", name, "pytorch_lora_weights.safetensors, 135 MB"):
                merge_lora(unet, load_lora(name, "pytorch_lora_weights.safetensors", unet))
        return student

    def features(self, y):
        """What the frozen backbones give: CLIP's tokens (B, 1 + N, D), DINOv2's class token (B, D)."""
        with torch.no_grad():
            return vit_tokens(self.clip, y), vit_tokens(self.dino, y)[:, 0]

    def context(self, y):
        """c = visual_encoder(CLIP(y)) + Z(DINOv2(y)), (B, 77, D): the UNet's cross-attention context (Sec. 3.3.1)."""
        tokens, e_dino = self.features(y)
        return self.visual_encoder(tokens) + self.adapter(e_dino)

    def step(self, z_y, y, tau=None):
        """Eq. 5, the one step in latent space. z_y: (B, C, h, w); y: (B, 3, H, W) in [0, 1]. Returns z, shaped as z_y.

        The spatial encoder sees y in [0, 1], as diffusers' ControlNets do (InterLCM feeds it [-1, 1]).
        """
        tau = self.tau if tau is None else tau
        alpha_bar, (c_skip, c_out) = self.alphas_bar[tau], boundary_scalings(tau)
        c = self.context(y)
        z_tau = enter(z_y, alpha_bar, self.config["entry"])
        z, y, t = z_tau.to(c.dtype), y.to(c.dtype), torch.full((), tau, device=y.device)
        down, mid = self.spatial_encoder(z, t, c, controlnet_cond=y, return_dict=False)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        eps = self.unet(z, t, encoder_hidden_states=c, **residuals).sample
        x_0 = x0_from_eps(z_tau, eps.float(), alpha_bar)
        return c_skip * z_tau + c_out * x_0

    def forward(self, y):
        """A degraded picture in, a restored one out: (B, 3, S, S) in [0, 1] -> the same, unclipped."""
        return decode(self.vae, self.step(encode(self.vae, y), y))

    def set_stage(self, stage):
        """Returns what the stage trains (Sec. 4), {name: parameter}, and turns the gradient of all else off.

        "A": visual encoder, spatial encoder, adapter. "B": LoRA and adapter (adds the LoRA if there is none yet).
        """
        if stage == "B" and not self.has_lora:
            self.add_lora()
        trained = {"A": ("visual_encoder.", "spatial_encoder.", "adapter."), "B": ("unet.", "adapter.")}[stage]
        for name, p in self.named_parameters():
            p.requires_grad_(name.startswith(trained) and (not name.startswith("unet.") or "lora_" in name))
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def add_lora(self):
        """Puts Stage B's LoRA on the UNet, rank r, scale 1, B = 0: the output does not change by a bit."""
        import peft  # for training alone

        r, self.has_lora = self.config["lora_rank"], True
        self.unet = peft.get_peft_model(self.unet, peft.LoraConfig(r=r, lora_alpha=r, target_modules=LORA_TARGETS))

    def save(self, folder, **settings):
        """Writes config.json (with `settings`), visual_encoder, adapter, spatial_encoder/ (diffusers), lora/ (peft).

        Frozen published parts are not copied: config.json names them. Tensors keep their dtype (student.half() to ship).
        """
        folder = Path(folder)
        self.spatial_encoder.save_pretrained(folder / "spatial_encoder")
        save_file(self.visual_encoder.state_dict(), folder / "visual_encoder.safetensors")
        save_file(self.adapter.state_dict(), folder / "adapter.safetensors")
        if self.has_lora:
            self.unet.save_pretrained(folder / "lora")
            (folder / "lora" / "README.md").unlink(missing_ok=True)  # peft's empty model card
        (folder / "config.json").write_text(json.dumps({**self.config, **settings}, indent=2) + "\n")

    @classmethod
    def load(cls, checkpoint, merge=False):
        """A checkpoint ("tiny", a folder, or a run's folder: its newest) -> the student, eval mode, float32, CPU.

        merge: adds the LoRA to the UNet's weights. That is enough to restore; do not train or save such a student.
        """
        folder = newest_checkpoint(checkpoint)
        student = cls.from_published(load_config(folder))
        student.load_trained(folder, merge)
        return student.requires_grad_(False)

    def load_trained(self, folder, merge=False):
        """Takes the trained parts of a checkpoint's folder, a Path. OSError if a file is missing or cut."""
        with loading("student's weights", str(folder), "a checkpoint's safetensors files"):
            self.visual_encoder.load_state_dict(load_file(folder / "visual_encoder.safetensors"))
            self.adapter.load_state_dict(load_file(folder / "adapter.safetensors"))
            spatial = load_file(folder / "spatial_encoder" / "diffusion_pytorch_model.safetensors")
            self.spatial_encoder.load_state_dict(spatial)
            if (folder / "lora").is_dir():
                self.load_lora(folder / "lora", merge)
        self.config = load_config(folder)

    def load_lora(self, folder, merge):
        """Reads the LoRA that peft wrote: merged, or as layers to train further. ValueError if it is for other layers."""
        file, unet = "adapter_model.safetensors", self.unet.get_base_model() if self.has_lora else self.unet
        layers = load_lora(folder, file, unet)
        if layers.keys() != {name for name, _ in unet.named_modules() if re.fullmatch(LORA_TARGETS, name)}:
            raise ValueError("lora/ is for other layers")
        if merge:
            merge_lora(unet, layers)
            return
        import peft  # for training alone

        if not self.has_lora:
            self.add_lora()
        peft.set_peft_model_state_dict(self.unet, load_file(folder / file))
