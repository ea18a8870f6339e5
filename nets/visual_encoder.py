"""The visual encoder (paper Sec. 3.3.1's "semantic context projector", InterLCM's): CLIP tokens -> cross-attention context.

The published network: 1-D convolutions that take the 197 tokens for channels and their 768 features for a length, and give
77 tokens of 768 features, the shape in which SD v1.5's UNet expects its text. State dicts load strictly with the published
names (blocks.0.weight ...): 12,960,845 parameters. Source: sen-mao/InterLCM; trained in Stage A, frozen in Stage B.
"""

from functools import partial

import torch.nn as nn
import torch.nn.functional as F

group_norm = partial(nn.GroupNorm, 32, eps=1e-6)


class ResBlock1d(nn.Module):
    """GroupNorm, swish, convolution, twice, plus the input (through a 1 x 1 convolution where the width changes)."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1, self.conv1 = group_norm(c_in), nn.Conv1d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = group_norm(c_out), nn.Conv1d(c_out, c_out, 3, padding=1)
        self.conv_out = nn.Conv1d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, h):
        z = self.conv1(F.silu(self.norm1(h)))
        return self.conv_out(h) + self.conv2(F.silu(self.norm2(z)))


class AttnBlock1d(nn.Module):
    """Single-head self-attention over the length, plus the input."""

    def __init__(self, c):
        super().__init__()
        self.norm = group_norm(c)
        self.q, self.k, self.v, self.proj_out = (nn.Conv1d(c, c, 1) for _ in range(4))

    def forward(self, h):
        q, k, v = (f(self.norm(h)).transpose(1, 2) for f in (self.q, self.k, self.v))  # (B, L, c)
        return h + self.proj_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2))


class Resample1d(nn.Module):
    """Nearest resampling to `part` of the network's input length, then a convolution."""

    def __init__(self, c, part):
        super().__init__()
        self.part, self.conv = part, nn.Conv1d(c, c, 3, padding=1)

    def forward(self, h, length):
        return self.conv(F.interpolate(h, size=round(self.part * length), mode="nearest"))


class VisualEncoder(nn.Module):
    """CLIP tokens (B, emb_dim, D) -> cross-attention context (B, out_channels, D).

    The length goes D -> D/3 -> 2D/3 -> D for three levels of widths nf * ch_mult (last first). Attention after the first
    block, and after each one of exactly 512 channels. Published: nf=64, emb_dim=197, ch_mult=[2, 4, 8], res_blocks=2, D=768.
    """

    def __init__(self, nf, emb_dim, ch_mult, res_blocks, out_channels=77):
        super().__init__()
        levels, c = len(ch_mult), nf * ch_mult[-1]
        blocks = [nn.Conv1d(emb_dim, c, 3, padding=1), Resample1d(c, 1 / levels)]
        blocks += [ResBlock1d(c, c), AttnBlock1d(c), ResBlock1d(c, c)]
        for i in reversed(range(levels)):
            for _ in range(res_blocks):
                blocks.append(ResBlock1d(c, nf * ch_mult[i]))
                c = nf * ch_mult[i]
                if c == 512:
                    blocks.append(AttnBlock1d(c))
            if i:
                blocks.append(Resample1d(c, (levels - i + 1) / levels))
        self.blocks = nn.ModuleList([*blocks, group_norm(c), nn.Conv1d(c, out_channels, 3, padding=1)])

    def forward(self, tokens):
        h, length = tokens, tokens.shape[-1]
        for block in self.blocks:
            h = block(h, length) if isinstance(block, Resample1d) else block(h)
        return h
