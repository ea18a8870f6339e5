"""SwinIR, the network behind the posterior mean of Eq. 2 (Liang et al. 2021, in the form that DifFace trained for faces).

The method is in teacher.py; this file has the layers, under the names of the published weights; the transformer block is
timm's. Three things to know: a token stands for 8 x 8 pixels (pixel unshuffle), attention runs in windows of 8 x 8 tokens,
and the result is not clipped. Letters: B pictures, h x w tokens of C channels.
"""

from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformerBlock

WINDOW = 8  # tokens a side of a window, and pixels a side of a token
conv3 = partial(nn.Conv2d, kernel_size=3, padding=1)


class SwinBlock(SwinTransformerBlock):
    """timm's block. The mask of its shifted windows is made once a size, and not at every call."""

    masks = {}

    def get_attn_mask(self, x):
        key = self.shift_size, x.shape[1:3], x.device, x.dtype
        if key not in self.masks:
            with torch.inference_mode(False):  # so that a training may use it, too
                self.masks[key] = super().get_attn_mask(x)
        return self.masks[key]


class SwinLayer(nn.Module):
    """Swin blocks, every second one shifted by half a window, then a convolution, with a residual around them."""

    def __init__(self, dim, depth, heads):
        super().__init__()
        # dynamic_mask: for pictures of any size; so input_resolution does not count
        windows = dict(input_resolution=(WINDOW, WINDOW), window_size=WINDOW, always_partition=True, dynamic_mask=True)
        shifts = (WINDOW // 2 * (i % 2) for i in range(depth))
        blocks = [SwinBlock(dim, num_heads=heads, shift_size=n, mlp_ratio=2, **windows) for n in shifts]
        for block in blocks:
            block.attn.fused_attn = True  # torch's; timm's default writes the scores out
        self.residual_group = nn.ModuleDict({"blocks": nn.Sequential(*blocks)})
        self.conv = conv3(dim, dim)

    def forward(self, x):
        """x: (B, h, w, C), h and w multiples of 8, of any number of windows -> the same."""
        return x + self.conv(self.residual_group["blocks"](x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


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
        self.layers = nn.Sequential(*(SwinLayer(embed_dim, *dh) for dh in zip(depths, num_heads, strict=True)))
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
        """y: (B, 3, H, W) in [0, 1] -> the same, unclipped, sides rounded up to 8s. ValueError unless these are 64s."""
        h, w = (-(-n // WINDOW) for n in y.shape[-2:])
        if y.ndim != 4 or y.shape[1] != 3 or h % WINDOW or w % WINDOW or not h * w:
            raise ValueError(f"expected (B, 3, H, W), sides in (64 n - 8, 64 n], got {tuple(y.shape)}: resize first")
        # made on the device: no GPU is waited for
        mean = torch.stack([y.new_full((1, 1), m) for m in (0.4488, 0.4371, 0.4040)])
        y = F.pad(y, (0, 8 * w - y.shape[3], 0, 8 * h - y.shape[2]), mode="reflect") - mean
        shallow = self.conv_first(y.to(self.conv_first[1].weight.dtype))  # (B, C, h, w)
        x = self.layers(self.patch_embed["norm"](shallow.permute(0, 2, 3, 1)))
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
    for block in module.modules():  # and make them, as the network may have been built on the meta device
        if isinstance(block, SwinBlock):
            block.attn.init_non_persistent_buffers()
