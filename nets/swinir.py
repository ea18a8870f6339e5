"""SwinIR, the network behind the posterior mean of Eq. 2 (Liang et al. 2021, in the form that DifFace trained for faces).

The method is in teacher.py; this file has the layers, under the names of the published weights. Three things to know:
a token stands for 8 x 8 pixels (pixel unshuffle), attention runs in windows of 8 x 8 tokens, and the result is not
clipped. Letters: B pictures, h x w tokens of C channels, d channels a head.
"""

from collections import OrderedDict
from functools import cache, lru_cache, partial

import torch
import torch.nn as nn
import torch.nn.functional as F

WINDOW = 8  # tokens a side of a window, and pixels a side of a token
conv3 = partial(nn.Conv2d, kernel_size=3, padding=1)


@cache
@torch.inference_mode(False)  # so that a training may use it, too
def relative_position(device):
    """(64, 64): the row of the bias table that belongs to a pair of tokens in a window."""
    i = torch.arange(WINDOW, device=device)
    offset = i[:, None] - i + WINDOW - 1  # 0 to 14, along one axis
    return (offset[:, None, :, None] * (2 * WINDOW - 1) + offset[:, None]).view(WINDOW**2, WINDOW**2)


class WindowAttention(nn.Module):
    """Multi-head attention inside 8 x 8 windows, with a learnt bias for each relative position."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * WINDOW - 1) ** 2, heads))
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x, mask):
        """x: (B, windows, 64, C). mask: (windows, 1, 64, 64), added to the scores, or 0."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(3, 0, 1, 4, 2, 5)  # (B, windows, heads, 64, d)
        bias = self.relative_position_bias_table[relative_position(x.device)].permute(2, 0, 1)  # (heads, 64, 64)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=(bias + mask).to(q.dtype))
        return self.proj(x.transpose(2, 3).flatten(3))


class SwinBlock(nn.Module):
    """Attention in windows, moved by `shift` tokens, and an MLP, each normalised and added."""

    def __init__(self, dim, heads, shift):
        super().__init__()
        self.shift = shift
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, heads)
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(dim, 2 * dim), act=nn.GELU(), fc2=nn.Linear(2 * dim, dim)))

    def forward(self, x, mask):
        """x: (B, h, w, C), h and w multiples of 8. mask: shifted_window_mask(h, w)."""
        n_h, n_w = x.shape[1] // WINDOW, x.shape[2] // WINDOW
        z = self.norm1(x).roll((-self.shift, -self.shift), (1, 2))
        z = z.unflatten(2, (n_w, WINDOW)).unflatten(1, (n_h, WINDOW)).transpose(2, 3)  # (B, n_h, n_w, 8, 8, C)
        z = self.attn(z.flatten(3, 4).flatten(1, 2), mask[:, None] if self.shift else 0)
        z = z.unflatten(2, (WINDOW, WINDOW)).unflatten(1, (n_h, n_w)).transpose(2, 3)
        x = x + z.flatten(3, 4).flatten(1, 2).roll((self.shift, self.shift), (1, 2))
        return x + self.mlp(self.norm2(x))


class SwinLayer(nn.Module):
    """Blocks, every second one shifted by half a window, then a convolution, with a residual around them."""

    def __init__(self, dim, depth, heads):
        super().__init__()
        blocks = nn.ModuleList(SwinBlock(dim, heads, WINDOW // 2 * (i % 2)) for i in range(depth))
        self.residual_group = nn.ModuleDict({"blocks": blocks})
        self.conv = conv3(dim, dim)

    def forward(self, x, mask):
        z = x
        for block in self.residual_group["blocks"]:
            z = block(z, mask)
        return x + self.conv(z.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def shifted_window_mask(h, w, device):
    """(windows, 64, 64): -100 between tokens that only the cyclic shift by half a window has put together, else 0."""
    # -3: whole windows, -2: the last one, -1: its half that came round from the other side
    region_h, region_w = ((torch.arange(-n, 0, device=device) // (WINDOW // 2)).clamp_min(-3) for n in (h, w))
    region = (3 * region_h[:, None] + region_w).view(h // WINDOW, WINDOW, w // WINDOW, WINDOW)
    region = region.transpose(1, 2).reshape(-1, WINDOW**2)
    return -100.0 * (region[:, None] != region[:, :, None])


class SwinIR(nn.Module):
    """E[X | Y] of Eq. 2: a token for 8 x 8 pixels, shifted-window transformer, three times nearest + convolution up.

    embed_dim: channels; depths, num_heads: blocks and heads of each layer; num_feat: channels of the upsampler. num_feat 0
    takes the other end of the SwinIR family instead: one convolution and a pixel shuffle (its light upsampler), added to the
    input (its denoisers), without the norm before them, which would hide how strong a token's detail is. That starts as the
    identity, and so learns in minutes what the published form needs days for.
    """

    def __init__(self, embed_dim, depths, num_heads, num_feat=64):
        super().__init__()
        self.config = dict(embed_dim=embed_dim, depths=list(depths), num_heads=list(num_heads), num_feat=num_feat)
        if len(depths) != len(num_heads) or any(embed_dim % n for n in num_heads):
            raise ValueError(f"expected heads for each layer that divide embed_dim, got {self.config}")
        self.conv_first = nn.Sequential(nn.PixelUnshuffle(WINDOW), conv3(3 * WINDOW**2, embed_dim))
        self.patch_embed = nn.ModuleDict({"norm": nn.LayerNorm(embed_dim)})
        self.layers = nn.ModuleList(SwinLayer(embed_dim, *dh) for dh in zip(depths, num_heads, strict=True))
        self.norm = nn.LayerNorm(embed_dim) if num_feat else nn.Identity()
        self.conv_after_body = conv3(embed_dim, embed_dim)
        if num_feat:
            self.conv_before_upsample = nn.Sequential(conv3(embed_dim, num_feat), nn.LeakyReLU(0.01))
            self.conv_up1, self.conv_up2, self.conv_up3, self.conv_hr = (conv3(num_feat, num_feat) for _ in range(4))
            self.conv_last = conv3(num_feat, 3)
        else:
            self.upsample = nn.Sequential(conv3(embed_dim, 3 * WINDOW**2), nn.PixelShuffle(WINDOW))
        for name, m in self.named_modules():
            if isinstance(m, nn.Linear):
                nn.init.normal_(m.weight, std=m.in_features**-0.5)
                nn.init.zeros_(m.bias)
            if name.endswith("attn.proj") or name == "upsample.0":  # attention that knows nothing yet only blurs
                nn.init.zeros_(m.weight)
                nn.init.zeros_(m.bias)
        self.register_load_state_dict_pre_hook(drop_buffers)

    def forward(self, y):
        """y: (B, 3, H, W) in [0, 1] -> (B, 3, 8h, 8w), unclipped, where 8h, 8w are H, W rounded up to multiples of 8.

        ValueError unless these are multiples of 64, the windows: resize first.
        """
        h, w = (-(-n // WINDOW) for n in y.shape[-2:])
        if y.ndim != 4 or y.shape[1] != 3 or h % WINDOW or w % WINDOW or not h * w:
            raise ValueError(f"expected (B, 3, H, W), sides in (64 n - 8, 64 n], got {tuple(y.shape)}: resize first")
        # made on the device: no GPU is waited for
        mean = torch.stack([y.new_full((1, 1), m) for m in (0.4488, 0.4371, 0.4040)])
        y = F.pad(y, (0, 8 * w - y.shape[3], 0, 8 * h - y.shape[2]), mode="reflect") - mean
        shallow = self.conv_first(y.to(self.conv_first[1].weight.dtype))  # (B, C, h, w)
        x, mask = self.patch_embed["norm"](shallow.permute(0, 2, 3, 1)), shifted_window_mask(h, w, y.device)
        for layer in self.layers:
            x = layer(x, mask)
        x = shallow + self.conv_after_body(self.norm(x).permute(0, 3, 1, 2))
        if not self.config["num_feat"]:
            return y + self.upsample(x) + mean
        x = self.conv_before_upsample(x)
        for conv in (self.conv_up1, self.conv_up2, self.conv_up3):
            x = F.leaky_relu(conv(F.interpolate(x, scale_factor=2, mode="nearest")), 0.2)
        return self.conv_last(F.leaky_relu(self.conv_hr(x), 0.2)) + mean


def drop_buffers(module, state_dict, prefix, *_):
    """Before loading: leave out the published buffers that follow from the sizes, so that strict loading holds."""
    for key in [k for k in state_dict if k.startswith(prefix) and k.endswith(("attn_mask", "relative_position_index"))]:
        del state_dict[key]
