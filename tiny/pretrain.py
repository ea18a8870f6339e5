"""Makes what the paper takes as published, small: autoencoder, feature backbones, posterior mean, flow, base UNet.

    python -m tiny.pretrain --data DIR vae clip dino unet
    python -m tiny.pretrain --data DIR posterior-mean flow

From a folder of aligned faces; in each line later parts use earlier ones, and the two can run side by side once the first
has made the pool of training pairs (runs/pool). tiny/README.md has the commands and figures of the weights in this folder.
Everything works at 128 px and on two CPU cores; a CUDA GPU is used when there is one.

    vae              tiny/base/vae    PCAAutoencoder: pixel loss alone, then LPIPS, with a little noise on the latents
    clip             tiny/clip        ViT: the same face, degraded or clean, gets the same token (contrastive, as CLIP)
    dino             tiny/dino        ViT: its token tells blur, downsampling, noise and JPEG quality apart
    posterior-mean   tiny/teacher     SwinIR, Eq. 2
    flow             tiny/teacher     HDiT, Eq. 3 with PMRF's source noise
    unet             tiny/base/unet   latent denoiser (predicts eps, SD v1.5's schedule), context = CLIP tokens of the face
"""

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
# part: training steps, pictures a step
RECIPE = {
    "vae": (800, 8),
    "clip": (300, 64),
    "dino": (400, 64),
    "posterior-mean": (8000, 8),
    "flow": (3400, 8),
    "unet": (3200, 8),
}


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("parts", nargs="+", choices=list(RECIPE), help="what to train, in this order")
    p.add_argument("--data", type=Path, required=True, help="folder of aligned face pictures")
    p.add_argument("--out", type=Path, default=HERE, help="where the weights go")
    p.add_argument("--steps", type=positive, help="training steps, instead of each part's own number")
    p.add_argument("--batch", type=positive, help="pictures a step, instead of each part's own number")
    p.add_argument("--go-on", action="store_true", help="posterior-mean, flow, unet: start from the weights in --out")
    p.add_argument("--seed", type=int, default=0, help="of weights, training pairs and their order")
    p.add_argument("--sigma-s", type=float, default=0.03, help="flow: noise on the posterior mean (PMRF: 0.1)")
    p.add_argument("--lambda-lpips", type=float, default=0.1, help="flow: weight of LPIPS at the end that v points to")
    p.add_argument(
        "--bf16", action="store_true", help="products in bfloat16: faster on a GPU and on CPUs with AVX512-BF16"
    )
    args = p.parse_args(argv)
    if not 0 <= args.seed < 2**63 or not (args.sigma_s >= 0 and args.lambda_lpips >= 0):
        p.error("arguments --seed, --sigma-s, --lambda-lpips: expected 0 or more (a seed: below 2^63)")
    return args


def positive(text):
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}")
    return int(text)


if __name__ == "__main__":
    ARGS = parse_args()  # before torch is imported, so that -h answers at once

import copy
import math

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers import LCMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from tqdm import tqdm

import losses
import teacher
from nets.autoencoder import PCAAutoencoder
from tiny.axes import half_whitened, in_pixels, learn_in_axes
from tiny.pool import SIZE, Pool

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# --- one training loop for all parts ------------------------------------------------------------------------------------


def fit(name, model, loss_fn, steps, lr, save, bf16, decay=0.998):
    """AdamW with warm-up and cosine decay; returns the exponential moving average of the model's weights.

    loss_fn(step) -> (loss, dict of figures). save(average) every 200 steps and at the end, so that little is ever lost.
    """
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1, (s + 1) / 50) * (0.51 + 0.49 * math.cos(math.pi * s / steps))
    )
    with open(Path("runs") / f"tiny_{name}.jsonl", "w") as log:
        for step in tqdm(range(1, steps + 1), desc=name, mininterval=10):
            with torch.autocast(DEVICE, torch.bfloat16, enabled=bf16):
                loss, figures = loss_fn(step)
            if not torch.isfinite(loss):
                raise ValueError(
                    f"{name}: the loss is {loss.item()} at step {step}: lower the learning rate or change the seed"
                )
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            rate.step()
            with torch.no_grad():
                for a, w in zip(average.parameters(), model.parameters(), strict=True):
                    a.lerp_(w, 1 - min(decay, step / (step + 10)))
            if step % 20 == 0:
                log.write(json.dumps({"step": step, "loss": round(loss.item(), 5), **figures}) + "\n")
                log.flush()
            if step % 200 == 0 or step == steps:
                save(average)
    return average


def shifted_lpips(lpips_fn, x_hat, x):
    """LPIPS of the two pictures without up to 7 of their first rows and columns.

    AlexNet looks at every fourth pixel, and a network can hide a weave pattern on that grid: so the grid moves.
    """
    top, left = torch.randint(8, (2,)).tolist()
    return losses.lpips_loss(lpips_fn, x_hat[..., top:, left:], x[..., top:, left:])


# --- the parts ----------------------------------------------------------------------------------------------------------


def train_vae(args, pool, steps, batch):
    """Pixel loss alone for the first third, then LPIPS with it: with LPIPS from the start such nets stay grey and blurred."""
    pool.forget("latents")
    pool.forget("latents_lq")
    vae = PCAAutoencoder().to(DEVICE)
    vae.fit_pca(2 * pool.get("hq", pool.batch(512)) - 1)
    lpips_fn = losses.load_lpips().to(DEVICE)

    def loss_fn(step):
        x = pool.get("hq", pool.batch(batch))
        z = vae.encode(2 * x - 1).latent_dist.mode()
        x_hat = (vae.decode(z + 0.05 * torch.randn_like(z)).sample + 1) / 2
        l1, mse = F.l1_loss(x_hat, x), F.mse_loss(x_hat, x)
        loss = l1 + 5 * mse
        if step > steps // 3:
            loss = loss + 0.15 * shifted_lpips(lpips_fn, x_hat, x)
        return loss, {"psnr": round(-10 * math.log10(mse.item()), 2)}

    fit("vae", vae, loss_fn, steps, 1e-3, lambda m: save_module(m, args.out / "base" / "vae"), args.bf16)


def save_module(module, folder):
    """A diffusers model as config.json + safetensors in float16, without the path that it may have been loaded from."""
    copy.deepcopy(module).half().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("_name_or_path", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


VIT = (
    "vit_tiny_r_s16_p8_224",
    {"img_size": SIZE, "patch_size": 4, "embed_dim": 128, "depth": 4, "num_heads": 4, "num_classes": 0},
)
MEAN_STD = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}


def save_vit(vit, folder):
    """The layout that timm reads as local-dir:FOLDER."""
    folder.mkdir(parents=True, exist_ok=True)
    name, model_args = VIT
    config = {"architecture": name, "num_classes": 0, "model_args": model_args,
              "pretrained_cfg": {"input_size": [3, SIZE, SIZE], "num_classes": 0, **MEAN_STD}}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file({k: v.half().contiguous() for k, v in vit.state_dict().items()}, folder / "model.safetensors")


class WithHeads(nn.Module):
    """A ViT and the linear heads that are thrown away after its training."""

    def __init__(self, **heads):
        super().__init__()
        self.vit = timm.create_model(VIT[0], **VIT[1])
        self.heads = nn.ModuleDict({name: nn.Linear(128, n) for name, n in heads.items()})

    def forward(self, y):
        return self.vit.forward_features(2 * y - 1)  # (B, 1 + 64, 128), the first token stands for the picture


def train_clip(args, pool, steps, batch):
    """InfoNCE between two degraded or clean views of one face; patch tokens also tell the clean face's 4 x 4 thumbnails."""
    pool.forget("captions")
    net = WithHeads(match=64, thumbnail=48).to(DEVICE)

    def loss_fn(step):
        index = pool.batch(batch)
        x, y = pool.get("hq", index), pool.get("lq", index)
        tokens, clean = net(y), net(x)
        a, b = (F.normalize(net.heads["match"](t[:, 0]), dim=1) for t in (tokens, clean))
        logits, same = a @ b.T / 0.1, torch.arange(len(a), device=a.device)
        match = (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 2
        thumbnails = F.unfold(F.avg_pool2d(x, 4), 4, stride=4).transpose(1, 2)  # (B, 64, 48)
        thumb = F.mse_loss(net.heads["thumbnail"](tokens[:, 1:]), thumbnails)
        right = (logits.argmax(1) == same).float().mean().item()
        return match + 20 * thumb, {"matched": round(right, 3), "thumbnail_mse": round(thumb.item(), 5)}

    fit("clip", net, loss_fn, steps, 5e-4, lambda m: save_vit(m.vit, args.out / "clip"), args.bf16)


def train_dino(args, pool, steps, batch):
    """Regression of the degradation's numbers from the class token of the degraded picture."""
    net = WithHeads(numbers=4).to(DEVICE)
    variance = torch.from_numpy(pool.array("numbers")[:].var(0)).to(DEVICE)

    def loss_fn(step):
        index = pool.batch(batch)
        error = (net.heads["numbers"](net(pool.get("lq", index))[:, 0]) - pool.get("numbers", index)) ** 2 / variance
        return error.mean(), {"r2": [round(1 - e, 2) for e in error.mean(0).tolist()]}

    fit("dino", net, loss_fn, steps, 5e-4, lambda m: save_vit(m.vit, args.out / "dino"), args.bf16)


SWINIR = {"embed_dim": 128, "depths": [2, 2], "num_heads": [4, 4], "num_feat": 0}
HDIT = {"in_channels": 3, "out_channels": 3, "patch_size": 4, "widths": [64, 128, 192], "depths": [1, 2, 4],
        "kernel_sizes": [7, None, None], "d_head": 64, "mapping_width": 128, "mapping_depth": 1}  # fmt: skip


def train_posterior_mean(args, pool, steps, batch):
    """Eq. 2: the network that minimises the squared error is the posterior mean. Its ends learn in axes (axes.py)."""
    pool.forget("mmse")
    fresh = lambda: teacher.PMRF(teacher.SwinIR(**SWINIR), teacher.HDiT(**HDIT), args.sigma_s)  # noqa: E731
    pmrf = teacher.PMRF.from_pretrained(args.out / "teacher").train() if args.go_on else fresh()
    swinir = copy.deepcopy(pmrf.mmse_model).to(DEVICE)
    patches = F.pixel_unshuffle(pool.get("hq", pool.batch(512)), 8).permute(0, 2, 3, 1).reshape(-1, 192)
    _, down, up = half_whitened(patches)
    learn_in_axes(swinir.conv_first[1], "weight", down, up, dim=1, fresh=not args.go_on)
    learn_in_axes(swinir.upsample[0], "weight", up.T, down.T, dim=0, fresh=not args.go_on)
    learn_in_axes(swinir.upsample[0], "bias", up.T, down.T, dim=0, fresh=not args.go_on)

    def loss_fn(step):
        index = pool.batch(batch)
        loss = teacher.posterior_mean_loss(swinir, pool.get("lq", index), pool.get("hq", index))
        return loss, {"psnr": round(-10 * math.log10(loss.item()), 2)}

    def save(average):
        mmse_model = in_pixels(average, pmrf.mmse_model)
        teacher.PMRF(mmse_model, pmrf.model, pmrf.sigma_s).save_pretrained(args.out / "teacher")

    fit("posterior-mean", swinir, loss_fn, steps, 1e-3, save, args.bf16)


def train_flow(args, pool, steps, batch):
    """Eq. 3: the velocity along the straight path from the noisy posterior mean to the clean face."""
    pmrf = teacher.PMRF.from_pretrained(args.out / "teacher").to(DEVICE)
    pool.derive("mmse", "lq", pmrf.posterior_mean)
    hdit = (pmrf.model.train() if args.go_on else teacher.HDiT(**HDIT)).to(DEVICE)
    lpips_fn = losses.load_lpips().to(DEVICE)

    def loss_fn(step):
        index, seen = pool.batch(batch), {}
        x, x_mmse = pool.get("hq", index), pool.get("mmse", index)
        u = (torch.rand(1, device=DEVICE) + torch.arange(len(x), device=DEVICE) / len(x)) % 1  # spread over the batch
        t = u**2  # half of them below 1/4: most is to be done there, and near t = 1 hardly anything

        def v_phi(x_t, t):  # keeps what it was asked and said, for LPIPS
            seen["x_t"], seen["v"] = x_t, hdit(x_t, t).float()
            return seen["v"]

        flow = teacher.flow_matching_loss(v_phi, x_mmse, x, t, torch.randn_like(x), args.sigma_s)
        end = seen["x_t"] + (1 - t).view(-1, 1, 1, 1) * seen["v"]  # where v points to, at t = 1
        lpips = shifted_lpips(lpips_fn, end, x)
        return flow + args.lambda_lpips * lpips, {"flow": round(flow.item(), 5), "lpips": round(lpips.item(), 4)}

    save = lambda m: teacher.PMRF(pmrf.mmse_model, m, args.sigma_s).save_pretrained(args.out / "teacher")  # noqa: E731
    fit("flow", hdit, loss_fn, steps, 6e-4, save, args.bf16)


UNET = {"sample_size": SIZE // 8, "in_channels": 48, "out_channels": 48, "layers_per_block": 1,
        "block_out_channels": [80, 112, 128], "norm_num_groups": 16,
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        "cross_attention_dim": 128, "attention_head_dim": 4}  # fmt: skip
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # SD v1.5's


def train_unet(args, pool, steps, batch):
    """The base: eps predicted from alpha_t z + sigma_t eps at every t, given the CLIP tokens of the clean face as caption.

    Half of each batch are degraded latents z_y in the place of noisy ones at tau = 499, eps then being what leads from z_y
    to z: a base that has seen Gaussian noise alone takes the noise-free z_y of the student's one step for the noisy latent
    of a face of 1 / alpha = 1.9 times the contrast, and Stage A has to undo that first.
    """
    vae = PCAAutoencoder.from_pretrained(args.out / "base" / "vae").to(DEVICE)
    clip = timm.create_model(f"local-dir:{args.out / 'clip'}", pretrained=True).eval().to(DEVICE)
    pool.derive("latents", "hq", lambda x: vae.encode(2 * x - 1).latent_dist.mode())
    pool.derive("latents_lq", "lq", lambda y: vae.encode(2 * y - 1).latent_dist.mode())
    pool.derive("captions", "hq", lambda x: F.pad(clip.forward_features(2 * x - 1), (0, 0, 0, 77 - 65)))
    scheduler = LCMScheduler(**SCHEDULE)
    scheduler.save_pretrained(args.out / "base" / "scheduler")
    alpha, sigma = scheduler.alphas_cumprod[499] ** 0.5, (1 - scheduler.alphas_cumprod[499]) ** 0.5
    base = args.out / "base"
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet") if args.go_on else UNet2DConditionModel(**UNET)
    unet = unet.float().to(DEVICE).train()

    def loss_fn(step):
        index = pool.batch(batch)
        z, caption = pool.get("latents", index), pool.get("captions", index)
        caption = caption * (torch.rand(len(z), 1, 1, device=DEVICE) > 0.1)  # one in ten without caption
        t, eps = torch.randint(1000, (len(z),), device=DEVICE), torch.randn_like(z)
        z_t, half = scheduler.add_noise(z, eps, t), len(z) // 2
        t[:half], z_t[:half] = 499, pool.get("latents_lq", index)[:half]
        eps[:half] = (z_t[:half] - alpha * z[:half]) / sigma
        error = ((unet(z_t, t, caption).sample - eps) ** 2).mean((1, 2, 3))
        return error.mean(), {"gaussian": error[half:].mean().item(), "degraded": error[:half].mean().item()}

    fit("unet", unet, loss_fn, steps, 5e-4, lambda m: save_module(m, args.out / "base" / "unet"), args.bf16)


def main(args):
    train = {"vae": train_vae, "clip": train_clip, "dino": train_dino,
             "posterior-mean": train_posterior_mean, "flow": train_flow, "unet": train_unet}  # fmt: skip
    try:
        Path("runs").mkdir(exist_ok=True)
        pool = Pool(args.data, Path("runs/pool"), args.seed, DEVICE)
        for part in args.parts:
            steps, batch = RECIPE[part]
            torch.manual_seed(args.seed)
            pool.restart(args.seed)
            train[part](args, pool, args.steps or steps, args.batch or batch)
    except (ValueError, OSError) as e:
        print(f"pretrain.py: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("pretrain.py: stopped; the last saved weights are kept", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(ARGS))
