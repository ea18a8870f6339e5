"""Makes what the paper takes as published, small: autoencoder, feature backbones, posterior mean, flow, base UNet.

From folders of aligned faces. unet needs vae and clip, flow needs posterior-mean; the pool of training pairs (runs/pool) is
made once for all: a second command may run beside the first one from then on. The same command goes on where it was stopped.

    vae              tiny/base/vae    PCAAutoencoder: pixel loss alone, then LPIPS, with a little noise on the latents
    decoder          tiny/base/vae    the same, going on from there with the encoder frozen: latents made before stay good
    clip             tiny/clip        ViT: the same face, degraded or clean, gets the same token (contrastive, as CLIP)
    dino             tiny/dino        ViT: its token tells blur, downsampling, noise and JPEG quality apart
    posterior-mean   tiny/teacher     SwinIR, Eq. 2
    flow             tiny/teacher     HDiT, Eq. 3 with PMRF's source noise
    unet             tiny/base/unet   latent denoiser (predicts eps, SD v1.5's schedule), context = CLIP tokens of the face
"""

import argparse
import sys
from pathlib import Path

from plumbing import commands

PARTS = ["vae", "decoder", "clip", "dino", "posterior-mean", "flow", "unet"]


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("parts", nargs="+", choices=PARTS, help="what to train, in this order")
    add("--data", type=Path, nargs="+", required=True, metavar="DIR", help="folders of aligned face pictures")
    add("--out", type=Path, default=Path(__file__).resolve().parent, help="where the weights go")
    add("--steps", type=commands.whole(1), help="training steps, instead of each part's own number")
    add("--batch", type=commands.whole(1), help="pictures a step, instead of each part's own number")
    add("--seed", type=commands.whole(0, 2**31 - 1), default=0, help="of weights, training pairs and their order")
    add("--sigma-s", type=commands.real, default=0.1, help="flow: noise on the posterior mean (default: PMRF's 0.1)")
    add("--precision", choices=["auto", "bf16", "fp32"], default="auto", help="auto: bf16 on a GPU, else fp32")
    return p.parse_args(argv)


if __name__ == "__main__":
    ARGS = commands.begin(parse_args, "the same command goes on from the last saved state")

import copy
import json

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers import LCMScheduler, UNet2DConditionModel
from safetensors.torch import save_file

import teacher
from nets.autoencoder import PCAAutoencoder
from plumbing.devices import choose_device
from plumbing.pictures import to_uint8
from plumbing.presets import load_config
from plumbing.published import load_lpips
from student import decode, encode, enter, vit_tokens
from tiny.axes import half_whitened, in_pixels, learn_in_axes
from tiny.fit import Recipe, fit
from tiny.pool import SIZE, Pool
from train import lpips_loss

# --- autoencoder --------------------------------------------------------------------------------------------------------


def patches(x, n=8):
    """(B, 3, H, W) -> (B H W / n^2, 3 n^2): all n x n patches."""
    return F.pixel_unshuffle(x, n).permute(0, 2, 3, 1).flatten(0, 2)


def shifted_lpips(lpips_fn, x_hat, x):
    """LPIPS of the two pictures without up to 7 of their first rows and columns.

    AlexNet looks at every fourth pixel, and a network can hide a weave pattern on that grid: so the grid moves.
    """
    top, left = torch.randint(8, (2,)).tolist()
    return lpips_loss(lpips_fn, x_hat[..., top:, left:], x[..., top:, left:])


def vae_training(args, pool, recipe):
    """Starts from the principal components of the faces' patches."""
    vae = PCAAutoencoder().to(pool.device)
    x = pool.get("hq", pool.batch(512, step=0))
    vae.set_components(*half_whitened(patches(2 * x - 1), vae.config.latent_channels))
    return autoencoder_training(vae, args, pool, recipe, noise=0.1)


def decoder_training(args, pool, recipe):
    """Goes on from the autoencoder in --out and leaves its encoder as it is. More noise: no seams where a UNet is unsure."""
    vae = PCAAutoencoder.from_pretrained(args.out / "base" / "vae").to(pool.device)
    vae.project.requires_grad_(False)
    vae.encoder.requires_grad_(False)
    return autoencoder_training(vae, args, pool, recipe, noise=0.4)


def autoencoder_training(vae, args, pool, recipe, noise):
    """Pixel loss alone for the first third, then LPIPS with it: with LPIPS from the start such nets stay grey and blurred."""
    lpips_fn = load_lpips().to(pool.device)

    def loss_fn(step):
        x = pool.get("hq", pool.batch(recipe.batch, step))
        z = encode(vae, x)
        sigma = noise * torch.rand(len(z), 1, 1, 1, device=z.device)  # the latents that a UNet gives are not exact
        x_hat = decode(vae, z + sigma * torch.randn_like(z))
        l1, mse = F.l1_loss(x_hat, x), F.mse_loss(x_hat, x)
        loss = l1 + 5 * mse
        if step > recipe.steps // 3:
            loss = loss + 0.15 * shifted_lpips(lpips_fn, x_hat, x)
        return loss, {"mse": mse}

    return vae, loss_fn, lambda m: save_module(m, args.out / "base" / "vae")


def save_module(module, folder):
    """A diffusers model as config.json + safetensors in float16, without the path that it may have been loaded from."""
    copy.deepcopy(module).half().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("_name_or_path", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


# --- feature backbones --------------------------------------------------------------------------------------------------

VIT = "vit_tiny_r_s16_p8_224"  # a convolutional stem and a token for 16 x 16 pixels
WIDTH, CLIP_SIZE, DINO_SIZE = 128, SIZE // 2, SIZE  # the reduction to half would blur fine noise


class WithHeads(nn.Module):
    """A ViT and the linear heads that are thrown away after its training."""

    def __init__(self, size, **heads):
        super().__init__()
        self.sizes = dict(img_size=size, patch_size=4, embed_dim=WIDTH, depth=4, num_heads=4, num_classes=0)
        self.vit = timm.create_model(VIT, **self.sizes)
        self.heads = nn.ModuleDict({name: nn.Linear(WIDTH, n) for name, n in heads.items()})

    def forward(self, y):
        return vit_tokens(self.vit, y)  # (B, 1 + tokens, WIDTH), the first stands for the picture

    def save(self, folder):
        """The layout that timm reads as local-dir:FOLDER."""
        folder.mkdir(parents=True, exist_ok=True)
        cfg = {"input_size": [3, *self.vit.patch_embed.img_size], "num_classes": 0}
        cfg |= {key: list(self.vit.pretrained_cfg[key]) for key in ("mean", "std")}
        config = {"architecture": VIT, "num_classes": 0, "model_args": self.sizes, "pretrained_cfg": cfg}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_file({k: v.half().contiguous() for k, v in self.vit.state_dict().items()}, folder / "model.safetensors")


def clip_training(args, pool, recipe):
    """InfoNCE between two degraded or clean views of one face; patch tokens also tell the clean face's 4 x 4 thumbnails."""
    net = WithHeads(CLIP_SIZE, match=64, thumbnail=48).to(pool.device)

    def loss_fn(step):
        index = pool.batch(recipe.batch, step)
        x, y = pool.get("hq", index), pool.get("lq", index)
        tokens, clean = net(y), net(x)
        a, b = (F.normalize(net.heads["match"](t[:, 0]), dim=1) for t in (tokens, clean))
        logits, same = a @ b.T / 0.1, torch.arange(len(a), device=a.device)
        match = (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 2
        thumbnails = patches(F.adaptive_avg_pool2d(x, CLIP_SIZE // 4), 4).unflatten(0, (len(x), -1))  # (B, tokens, 48)
        thumb = F.mse_loss(net.heads["thumbnail"](tokens[:, 1:]), thumbnails)
        right = (logits.argmax(1) == same).float().mean()
        return match + 20 * thumb, {"matched": right, "thumbnail_mse": thumb}

    return net, loss_fn, lambda m: m.save(args.out / "clip")


def dino_training(args, pool, recipe):
    """Regression of the degradation's numbers from the class token of the degraded picture."""
    net = WithHeads(DINO_SIZE, numbers=4).to(pool.device)
    variance = pool.array("numbers").to(pool.device).var(0)

    def loss_fn(step):
        index = pool.batch(recipe.batch, step)
        numbers = net.heads["numbers"](net(pool.get("lq", index))[:, 0])
        error = ((numbers.float() - pool.get("numbers", index)) ** 2 / variance).mean(0)
        names = ("blur", "down", "noise", "jpeg")
        return error.mean(), {f"r2_{name}": 1 - e for name, e in zip(names, error, strict=True)}

    return net, loss_fn, lambda m: m.save(args.out / "dino")


# --- the teacher --------------------------------------------------------------------------------------------------------

SWINIR = {"embed_dim": 128, "depths": [3, 3], "num_heads": [4, 4], "num_feat": 0}
HDIT = {"in_channels": 3, "out_channels": 3, "patch_size": 4, "widths": [64, 128, 256], "depths": [2, 2, 3],
        "kernel_sizes": [7, 7, None], "d_head": 32, "mapping_width": 128, "mapping_depth": 1}  # fmt: skip


def posterior_mean_training(args, pool, recipe):
    """Eq. 2: the network that minimises the squared error is the posterior mean. Its ends learn in axes (axes.py)."""
    pmrf = teacher.PMRF(teacher.SwinIR(**SWINIR), teacher.HDiT(**HDIT), args.sigma_s)
    swinir = copy.deepcopy(pmrf.mmse_model).to(pool.device)
    _, down, up = half_whitened(patches(pool.get("hq", pool.batch(512, step=0))))
    learn_in_axes(swinir.conv_first[1], "weight", down, up, dim=1)
    learn_in_axes(swinir.upsample[0], "weight", up.T, down.T, dim=0)
    learn_in_axes(swinir.upsample[0], "bias", up.T, down.T, dim=0)

    def loss_fn(step):
        index = pool.batch(recipe.batch, step)
        return teacher.posterior_mean_loss(swinir, pool.get("lq", index), pool.get("hq", index)), {}

    def save(average):
        in_pixels(average, pmrf.mmse_model)
        pmrf.save_pretrained(args.out / "teacher")

    return swinir, loss_fn, save


def flow_training(args, pool, recipe):
    """Eq. 3: the velocity along the straight path from the noisy posterior mean to the clean face, and nothing else.

    A second loss at the end that v points to, such as LPIPS, would sharpen anew at every Euler step.
    """
    pmrf = teacher.PMRF.from_pretrained(args.out / "teacher").to(pool.device)
    mmse = pool.derive("mmse", "lq", pmrf.mmse_model, lambda y: to_uint8(pmrf.posterior_mean(y)))
    hdit = teacher.HDiT(**HDIT).to(pool.device)

    def loss_fn(step):
        index = pool.batch(recipe.batch, step)
        x, x_mmse = pool.get("hq", index), pool.get(mmse, index)
        t = torch.rand(1, device=x.device) + torch.arange(len(x), device=x.device) / len(x)  # spread over the batch
        return teacher.flow_matching_loss(hdit, x_mmse, x, t % 1, torch.randn_like(x), args.sigma_s), {}

    return hdit, loss_fn, lambda m: teacher.PMRF(pmrf.mmse_model, m, args.sigma_s).save_pretrained(args.out / "teacher")


# --- the base -----------------------------------------------------------------------------------------------------------

UNET = {"sample_size": SIZE // 8, "layers_per_block": 1, "block_out_channels": [80, 128, 192], "norm_num_groups": 16,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "cross_attention_dim": WIDTH, "attention_head_dim": 4}  # fmt: skip
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # SD v1.5's


def unet_training(args, pool, recipe):
    """The base: eps predicted from alpha_t z + sigma_t eps at every t, given the CLIP tokens of the face as caption.

    In half of each batch t = tau, and the degraded latent enters as in the student's one step (`enter`). Its eps leads from
    there to z. So Stage A starts from a base that restores.
    """
    vae = PCAAutoencoder.from_pretrained(args.out / "base" / "vae").to(pool.device)
    clip = timm.create_model(f"local-dir:{args.out / 'clip'}", pretrained=True).eval().to(pool.device)

    def caption(x):
        tokens = vit_tokens(clip, x)
        return F.pad(tokens, (0, 0, 0, 77 - tokens.shape[1])).half()

    z_hq, z_lq = (pool.derive(f"z_{q}", q, vae, lambda x: encode(vae, x).half()) for q in ("hq", "lq"))
    c_hq, c_lq = (pool.derive(f"c_{q}", q, clip, caption) for q in ("hq", "lq"))
    scheduler, config = LCMScheduler(**SCHEDULE), load_config("tiny")
    scheduler.save_pretrained(args.out / "base" / "scheduler")
    tau, alphas_bar = config["timestep"], scheduler.alphas_cumprod.to(pool.device)
    channels = vae.config.latent_channels
    unet = UNet2DConditionModel(**UNET, in_channels=channels, out_channels=channels).to(pool.device)

    def loss_fn(step):
        index = pool.batch(recipe.batch, step)
        half = len(index) // 2
        z, z_y = pool.get(z_hq, index), pool.get(z_lq, index[:half])
        t = torch.randint(1000, (len(index),), device=pool.device)
        t[:half] = tau
        alpha, sigma = (v[t].sqrt().view(-1, 1, 1, 1) for v in (alphas_bar, 1 - alphas_bar))
        eps = torch.randn_like(z)
        z_t = alpha * z + sigma * eps
        z_t[:half] = enter(z_y, float(scheduler.alphas_cumprod[tau]), config["entry"])
        eps[:half] = (z_t[:half] - alpha[:half] * z[:half]) / sigma[:half]
        c = torch.cat([pool.get(c_lq, index[:half]), pool.get(c_hq, index[half:])])
        c = c * (torch.rand(len(z), 1, 1, device=z.device) > 0.1)  # one in ten without caption
        error = ((unet(z_t, t, c).sample - eps) ** 2).mean((1, 2, 3))
        return error.mean(), {"gaussian": error[half:].mean(), "degraded": error[:half].mean()}

    return unet, loss_fn, lambda m: save_module(m, args.out / "base" / "unet")


TRAININGS = {  # of each of PARTS: a function (args, pool, recipe) -> network, loss_fn and save, as fit takes them
    "vae": (vae_training, Recipe(steps=2000, batch=32, lr=1e-3)),
    "decoder": (decoder_training, Recipe(steps=2000, batch=32, lr=1e-3)),
    "clip": (clip_training, Recipe(steps=760, batch=128, lr=5e-4)),
    "dino": (dino_training, Recipe(steps=1340, batch=64, lr=5e-4)),
    "posterior-mean": (posterior_mean_training, Recipe(steps=1640, batch=32, lr=1e-3)),
    "flow": (flow_training, Recipe(steps=6700, batch=32, lr=6e-4)),
    "unet": (unet_training, Recipe(steps=3740, batch=64, lr=6e-4)),
}


def work(args):
    device = choose_device(known=("cuda", "cpu"))
    pool = Pool(args.data, Path("runs/pool"), args.seed, device)
    bf16 = args.precision == "bf16" or (args.precision == "auto" and device.type == "cuda")
    given = {name: value for name in ("steps", "batch") if (value := getattr(args, name))}
    for part in args.parts:
        torch.manual_seed(args.seed)
        training, recipe = TRAININGS[part]
        recipe = recipe._replace(**given)
        fit(part, *training(args, pool, recipe), recipe, args.seed, bf16)


def main(args):
    return commands.run(work, args)


if __name__ == "__main__":
    sys.exit(main(ARGS))
