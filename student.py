"""The one-step student (paper Sec. 3.2, 3.3.2, Eq. 5): SD v1.5's UNet as a latent consistency model of face restoration.

    z_y  = s E(2y - 1)                                      posterior mean of the VAE's encoder, no noise added
    c    = visual_encoder(CLIP(y)) + Z(DINOv2(y))           (B, 77, D), adapter.py
    eps  = UNet(z_y, tau, c, spatial_encoder(z_y, tau, c, y))
    x_0  = (z_y - sigma_tau eps) / alpha_tau
    z    = c_skip(tau) z_y + c_out(tau) x_0                 S_theta of Eq. 5, in the latent space of Sec. 3.2
    x    = D(z / s)

Images: (B, 3, H, W) float32 in [0, 1], at the preset's size. Latents: (B, C, H/8, W/8), scaled. tau = 499 of 0 ... 999.
A preset is a dict of names and sizes; a name is a folder (of this repository, or any) or a hub id. Sources of the parts:
diffusers (UNet, VAE, ControlNet), timm (CLIP, DINOv2), sen-mao/InterLCM (visual encoder), LCM's boundary scalings.
"""

import importlib
import json
from pathlib import Path

import peft
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers import AutoencoderKL, ControlNetModel, LCMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from adapter import SemanticAdapter
from nets.visual_encoder import VisualEncoder
from plumbing.presets import PRESETS, ROOT, load_config, locate, newest_checkpoint  # noqa: F401

# Sec. 3.3.2: cross-attention and feed-forward, nothing else (no self-attention attn1, no convolution)
LORA_TARGETS = r".*(attn2\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2))"


SAFE = {"torch_dtype": torch.float32, "use_safetensors": True}  # never a pickle


# --- building the parts from a config ------------------------------------------------------------------------------------


def published(what, name, size, load):
    """Runs load(); a missing file, cut download or absent network becomes one line: what is missing and how to get it."""
    try:
        loaded = load()
        if isinstance(loaded, nn.Module) and any(p.is_meta for p in loaded.parameters()):
            raise ValueError("weights that its config asks for are not in it")
        return loaded
    except Exception as e:  # huggingface_hub, safetensors, timm and diffusers each have errors of their own
        reason = " ".join(str(e).split())[:160]
        local = Path(locate(name)).exists()
        remedy = (
            "restore that folder" if local else f"run once with a network (hf download {name}), or give a local folder"
        )
        raise OSError(
            f"expected the {what} ({size}) at {name!r}, could not load it ({type(e).__name__}: {reason}): {remedy}"
        ) from None


def load_vae(config):
    """The frozen VAE of the base, in eval mode: diffusers' AutoencoderKL, or the tiny preset's own class."""
    base = locate(config["base"])

    def load():
        kind = AutoencoderKL.load_config(base, subfolder="vae").get("_class_name", "AutoencoderKL")
        cls = importlib.import_module("nets.autoencoder").PCAAutoencoder if kind == "PCAAutoencoder" else AutoencoderKL
        return cls.from_pretrained(base, subfolder="vae", **SAFE)

    return published("VAE", config["base"], "vae/, 335 MB", load).eval().requires_grad_(False)


def load_vit(entry):
    """A frozen timm ViT (CLIP or DINOv2) by name: a local timm folder or a model name with published weights."""
    entry = dict(entry)
    name = entry.pop("name")
    local = locate(name)
    source = f"local-dir:{local}" if Path(local).is_dir() else name

    def load():
        return timm.create_model(source, pretrained=True, num_classes=0, **entry)

    return published("feature backbone", name, "about 350 MB, through timm", load).eval().requires_grad_(False)


def load_unet(config):
    """SD v1.5's UNet. Returns it before LCM-LoRA, since the spatial encoder copies the plain one (ControlNet's recipe)."""
    base = locate(config["base"])

    def load():
        return UNet2DConditionModel.from_pretrained(base, subfolder="unet", **SAFE)

    return published("UNet", config["base"], "unet/, 3.4 GB", load).requires_grad_(False)


def fuse_lcm_lora(unet, name):
    """Adds LCM-LoRA to the UNet's weights for good: the base is then a latent consistency model (Sec. 3.2).

    name: hub id or folder with pytorch_lora_weights.safetensors, in the published kohya layout (lora_unet_...lora_down.weight
    with .alpha, converted by diffusers) or in diffusers' own. Returns the same UNet, with no layer of peft left in it.
    """
    from diffusers.loaders import StableDiffusionLoraLoaderMixin as Lora  # imports transformers

    def load():
        state, alphas = Lora.lora_state_dict(locate(name), unet_config=unet.config, use_safetensors=True)
        if not any(key.startswith("unet.") for key in state):
            raise ValueError("no layer of a UNet in it")  # diffusers would leave the UNet as it is, without a word
        Lora.load_lora_into_unet(state, alphas, unet)
        unet.fuse_lora()
        unet.unload_lora()
        return unet

    return published("LCM-LoRA", name, "pytorch_lora_weights.safetensors, 135 MB", load).requires_grad_(False)


# --- the one step, line by line ------------------------------------------------------------------------------------------


def encode(vae, x):
    """z = s E(2x - 1), the mean of the encoder's posterior: x (B, 3, H, W) in [0, 1] -> (B, C, H/8, W/8). Deterministic."""
    return vae.config.scaling_factor * vae.encode(2 * x - 1).latent_dist.mode().float()


def decode(vae, z):
    """x = D(z / s), mapped from [-1, 1] to [0, 1] and not clipped: (B, C, h, w) -> (B, 3, 8h, 8w). With gradient."""
    return (vae.decode(z / vae.config.scaling_factor).sample.float() + 1) / 2


def vit_tokens(vit, y):
    """All tokens after the last norm, without projection: y (B, 3, H, W) in [0, 1] -> (B, 1 + N, D), the class token first."""
    c = vit.pretrained_cfg
    y = F.interpolate(y, size=vit.patch_embed.img_size, mode="bicubic", antialias=True, align_corners=False)
    mean, std = (torch.tensor(c[k], device=y.device, dtype=y.dtype)[:, None, None] for k in ("mean", "std"))
    return vit.forward_features((y - mean) / std)


def boundary_scalings(tau, sigma_data=0.5, timestep_scaling=10.0):
    """c_skip(tau), c_out(tau) of latent consistency models: 1 and 0 at tau = 0, about 0 and 1 at 499. Floats."""
    s = timestep_scaling * tau
    return sigma_data**2 / (s**2 + sigma_data**2), s / (s**2 + sigma_data**2) ** 0.5


def x0_from_eps(z_y, eps, alpha_bar):
    """x_0 = (z_y - sigma eps) / alpha with alpha = sqrt(alpha_bar), sigma = sqrt(1 - alpha_bar) at the timestep. A latent."""
    return (z_y - (1 - alpha_bar) ** 0.5 * eps) / alpha_bar**0.5


class Student(nn.Module):
    """S_theta of Eq. 5. Build it with `from_published` (Stage A's start) or `load` (a checkpoint)."""

    def __init__(self, config, vae, unet, clip, dino, alphas_bar):
        super().__init__()
        self.config, self.image_size, self.tau = config, config["image_size"], config["timestep"]
        self.vae, self.clip, self.dino = vae, clip, dino
        context_dim = unet.config.cross_attention_dim
        self.visual_encoder = VisualEncoder(**config["visual_encoder"])
        self.adapter = SemanticAdapter(dino.num_features, context_dim, config["adapter"])
        self.spatial_encoder = ControlNetModel.from_unet(
            unet, conditioning_channels=3, conditioning_embedding_out_channels=tuple(config["condition_channels"])
        )
        self.unet = fuse_lcm_lora(unet, config["lcm_lora"]) if config["lcm_lora"] else unet
        self.alphas_bar = [float(a) for a in alphas_bar]
        self.eval()

    @classmethod
    def from_published(cls, config):
        """The student at the start of Stage A: published weights, fresh encoders, adapter at zero. Raises OSError."""
        base = locate(config["base"])

        def load():
            schedule = LCMScheduler.load_config(base, subfolder="scheduler")
            return LCMScheduler(**{k: schedule[k] for k in ("beta_start", "beta_end", "beta_schedule")}).alphas_cumprod

        alphas_bar = published("schedule", config["base"], "scheduler/", load)
        vae, unet = load_vae(config), load_unet(config)
        clip, dino = load_vit(config["clip"]), load_vit(config["dino"])
        return cls(config, vae, unet, clip, dino, alphas_bar)

    def features(self, y):
        """The frozen views of y: CLIP's tokens (B, 1 + N, D) and DINOv2's class token (B, D)."""
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
        c = self.context(y)
        alpha = self.alphas_bar[tau] ** 0.5
        z_tau = alpha * z_y if self.config.get("entry", "clean") == "mean" else z_y
        down, mid = self.spatial_encoder(z_tau, tau, c, controlnet_cond=y, return_dict=False)
        eps = self.unet(
            z_tau, tau, encoder_hidden_states=c, down_block_additional_residuals=down, mid_block_additional_residual=mid
        ).sample
        x_0 = x0_from_eps(z_tau, eps.float(), self.alphas_bar[tau])
        c_skip, c_out = boundary_scalings(tau)
        return c_skip * z_tau + c_out * x_0

    def forward(self, y):
        """A degraded picture in, a restored one out: (B, 3, S, S) in [0, 1] -> the same, clipped."""
        return decode(self.vae, self.step(encode(self.vae, y), y)).clamp(0, 1)

    # --- the two stages ---

    def add_lora(self):
        """Puts Stage B's LoRA on the UNet, rank r, scale 1, B = 0: the output does not change by a bit."""
        r = self.config["lora_rank"]
        lora = peft.LoraConfig(r=r, lora_alpha=r, target_modules=LORA_TARGETS)
        self.unet = peft.get_peft_model(self.unet, lora)

    def set_stage(self, stage):
        """Marks what the stage trains (Sec. 4) and returns it as {name: parameter}; all else holds no gradient.

        "A": visual encoder, spatial encoder, adapter. "B": LoRA and adapter (adds the LoRA if there is none yet).
        """
        if stage == "B" and not isinstance(self.unet, peft.PeftModel):
            self.add_lora()
        trained = {"A": ("visual_encoder.", "spatial_encoder.", "adapter."), "B": ("unet.", "adapter.")}[stage]
        for name, p in self.named_parameters():
            p.requires_grad_(name.startswith(trained) and (not name.startswith("unet.") or "lora_" in name))
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    # --- checkpoints: a folder of config.json and safetensors ---

    def save(self, folder, **settings):
        """Writes config.json (with `settings`), visual_encoder, adapter, spatial_encoder/ (diffusers), lora/ (peft).

        Frozen published parts are not copied: config.json names them. In the parameters' dtype (student.half() to ship).
        """
        folder = Path(folder)
        self.spatial_encoder.save_pretrained(folder / "spatial_encoder")
        save_file(contiguous(self.visual_encoder), folder / "visual_encoder.safetensors")
        save_file(contiguous(self.adapter), folder / "adapter.safetensors")
        if isinstance(self.unet, peft.PeftModel):
            self.unet.save_pretrained(folder / "lora")
            (folder / "lora" / "README.md").unlink(missing_ok=True)  # peft's empty model card
        (folder / "config.json").write_text(json.dumps({**self.config, **settings}, indent=2) + "\n")

    @classmethod
    def load(cls, checkpoint):
        """A checkpoint ("tiny", a folder, or a run's folder: its newest) -> the student, eval mode, float32, CPU."""
        folder = newest_checkpoint(checkpoint)
        student = cls.from_published(load_config(folder))
        student.load_trained(folder)
        return student.requires_grad_(False)

    def load_trained(self, folder):
        """Takes the trained parts of a checkpoint's folder into this student. OSError if a file is missing or cut."""
        folder = Path(folder)

        def load():
            self.visual_encoder.load_state_dict(load_file(folder / "visual_encoder.safetensors"))
            self.adapter.load_state_dict(load_file(folder / "adapter.safetensors"))
            self.spatial_encoder.load_state_dict(
                load_file(folder / "spatial_encoder" / "diffusion_pytorch_model.safetensors")
            )
            if (folder / "lora").is_dir():
                if not isinstance(self.unet, peft.PeftModel):
                    self.add_lora()
                lora = load_file(folder / "lora" / "adapter_model.safetensors")
                if lora.keys() != peft.get_peft_model_state_dict(self.unet).keys():
                    raise ValueError("lora/ is for other layers")
                peft.set_peft_model_state_dict(self.unet, lora)

        published("student's weights", str(folder), "a checkpoint's safetensors files", load)
        self.config = load_config(folder)


def contiguous(module):
    """A module's state dict as safetensors wants it."""
    return {k: v.detach().contiguous() for k, v in module.state_dict().items()}
