"""HDiT, the network behind the velocity v(x_t, t) of Eq. 1 and 4 (Crowson et al. 2024, as PMRF trained it for faces).

The method is in teacher.py; this file has the layers, under the names of the published weights: an hourglass of
transformer levels with neighbourhood attention where the grid is fine and global attention in the middle.
Letters: B pictures, h x w tokens of C channels, d channels a head. Tokens are kept as (B, h, w, C).
"""

import math
from collections import OrderedDict
from functools import lru_cache, partial
from itertools import pairwise

import torch
import torch.nn as nn
import torch.nn.functional as F

linear = partial(nn.Linear, bias=False)
TILE = 8  # neighbourhood attention: queries a side of a tile (of 4 to 16 the fastest, forward and backward)


def windows(length, kernel_size, tile, device):
    """One axis of neighbourhood attention, in tiles: which queries and keys are in each tile, and who sees whom.

    Query i sees the k keys from clamp(i - k // 2, 0, length - k). Returns q (n, tile), k (n, halo), seen (n, tile, halo).
    """
    halo = min(tile + kernel_size - 1, length)
    first = torch.arange(0, length, tile, device=device)[:, None]
    q = (first + torch.arange(tile, device=device)).clamp(max=length - 1)  # the last tile may repeat the last query
    k = (first - kernel_size // 2).clamp(0, length - halo) + torch.arange(halo, device=device)
    offset = k[:, None] - (q - kernel_size // 2).clamp(0, length - kernel_size)[:, :, None]
    return q, k, (offset >= 0) & (offset < kernel_size)


@lru_cache(maxsize=16)  # the same in every layer, step and picture
@torch.inference_mode(False)  # so that a training may use them, too
def tiles(B, H, W, kernel_size, device):
    """Both axes, in tiles: the tokens (B tiles, tokens) of the queries and of the keys, numbered through the batch, and who
    sees whom, (B tiles, 1, queries, keys)."""
    (q_h, k_h, seen_h), (q_w, k_w, seen_w) = (windows(n, kernel_size, min(TILE, n), device) for n in (H, W))

    def tokens(rows, cols):
        token = (rows[:, None, :, None] * W + cols[:, None]).flatten(2).flatten(0, 1)  # (tiles, tokens)
        return (token + H * W * torch.arange(B, device=device)[:, None, None]).flatten(0, 1)

    seen = (seen_h[:, None, :, None, :, None] & seen_w[:, None, :, None]).flatten(4).flatten(2, 3).flatten(0, 1)
    return tokens(q_h, q_w), tokens(k_h, k_w), seen.repeat(B, 1, 1)[:, None]


def neighborhood_attention(q, k, v, kernel_size):
    """softmax(q . k) v, where each query sees kernel_size x kernel_size keys; at the borders the window moves inward.

    q, k, v: (B, H, W, heads, d) -> same, scale 1. Exact, in memory linear in H W: each tile of queries attends to the keys
    around it. ValueError if the grid is smaller than the window.
    """
    B, H, W, heads, d = q.shape
    if not 1 <= kernel_size <= min(H, W):
        raise ValueError(f"expected at least {kernel_size} x {kernel_size} tokens, the window, got {H} x {W}: enlarge")
    queries, keys, seen = tiles(B, H, W, kernel_size, q.device)

    def gather(z, token):  # -> (B tiles, heads, tokens, d); as an embedding, since its backward is the fast one
        return F.embedding(token, z.reshape(-1, heads * d)).unflatten(-1, (heads, d)).transpose(1, 2)

    q, k, v = gather(q, queries), gather(k, keys), gather(v, keys)
    z = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=1.0).transpose(1, 2)
    rows, cols = min(TILE, H), min(TILE, W)
    z = z.reshape(B, -(-H // rows), -(-W // cols), rows, cols, heads, d).transpose(2, 3)
    return z.flatten(3, 4).flatten(1, 2)[:, :H, :W]


def global_attention(q, k, v):
    """softmax(q . k) v over all tokens. q, k, v: (B, h, w, heads, d) -> same, scale 1."""
    z = F.scaled_dot_product_attention(*(z.flatten(1, 2).transpose(1, 2) for z in (q, k, v)), scale=1.0)
    return z.transpose(1, 2).unflatten(1, q.shape[1:3])


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def rotation(h, w, heads, d_head, device, dtype=torch.float32):
    """cos and sin, each (h, w, heads, d_head / 4), of the axial RoPE: angles of the row, then of the column.

    Positions are the cells' centres in a box whose longer side is [-1, 1] (so the mean of 2 x 2 is the centre of the
    merged token). Frequencies go from pi to 10 pi (excluded), evenly in the logarithm, dealt to the heads in turn.
    """
    first, last, like = math.log(math.pi), math.log(10 * math.pi), dict(device=device, dtype=dtype)
    freqs = torch.linspace(first, last, heads * d_head // 8 + 1, **like)[:-1].exp()
    row, col = (torch.arange(1 - n, n, 2, **like) / max(h, w) for n in (h, w))
    row, col = (p[:, None, None] * freqs.view(-1, heads).T for p in (row, col))  # (h or w, heads, d_head / 8)
    theta = torch.cat([row[:, None].expand(-1, w, -1, -1), col.expand(h, -1, -1, -1)], -1)
    return theta.cos(), theta.sin()


def rotate(x, cos, sin):
    """Turn the first two quarters of each head as pairs. x: (B, h, w, heads, d)."""
    a, b, rest = x.split([cos.shape[-1], cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]], -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


class RMSNorm(nn.Module):
    """x over its root mean square, times a learnt gain."""

    def __init__(self, width):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], eps=1e-6) * self.scale


class AdaRMSNorm(nn.Module):
    """RMS norm with gain 1 + a linear function of the condition, (B, mapping_width)."""

    def __init__(self, width, cond_width):
        super().__init__()
        self.linear = linear(cond_width, width)

    def forward(self, x, cond):
        return F.rms_norm(x, x.shape[-1:], eps=1e-6) * (self.linear(cond) + 1)[:, None, None]


class FeedForward(nn.Module):
    """x + down(value * GELU(gate)), with value and gate the halves of up(norm(x)), each 3 x width."""

    def __init__(self, width, norm):
        super().__init__()
        self.norm, self.up_proj, self.down_proj = norm, linear(width, 6 * width), linear(3 * width, width)

    def forward(self, x, *cond):
        value, gate = self.up_proj(self.norm(x, *cond)).chunk(2, -1)
        return x + self.down_proj(value * F.gelu(gate))


class SelfAttention(nn.Module):
    """x + cosine attention with a learnt scale for each head and axial RoPE. kernel_size None: over all tokens."""

    def __init__(self, width, d_head, cond_width, kernel_size):
        super().__init__()
        self.heads, self.kernel_size = width // d_head, kernel_size
        self.scale = nn.Parameter(torch.full([self.heads], 10.0))
        self.norm = AdaRMSNorm(width, cond_width)
        self.qkv_proj, self.out_proj = linear(width, 3 * width), linear(width, width)

    def forward(self, x, turn, cond):
        q, k, v = self.qkv_proj(self.norm(x, cond)).unflatten(-1, (3, self.heads, -1)).unbind(3)  # (B, h, w, heads, d)
        q, k = (rotate(self.normalise(z), *turn).to(v.dtype) for z in (q, k))
        z = neighborhood_attention(q, k, v, self.kernel_size) if self.kernel_size else global_attention(q, k, v)
        return x + self.out_proj(z.flatten(3))

    def normalise(self, z):
        """To the length sqrt(scale), so that q . k is scale times their cosine."""
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        return z * (self.scale.sqrt()[:, None] * torch.rsqrt(z.square().sum(-1, keepdim=True) + 1e-6))


class Level(nn.ModuleList):
    """Transformer layers of one width on one grid. x: (B, h, w, C), cond: (B, mapping_width) -> like x."""

    def __init__(self, depth, width, kernel_size, d_head, cond_width):
        super().__init__()
        self.d_head = d_head
        for _ in range(depth):
            attention = SelfAttention(width, d_head, cond_width, kernel_size)
            self.append(nn.ModuleDict(dict(self_attn=attention, ff=FeedForward(width, AdaRMSNorm(width, cond_width)))))

    def forward(self, x, cond):
        dtype = torch.promote_types(x.dtype, torch.float32)  # bfloat16 is too coarse for angles
        turn = rotation(*x.shape[1:3], x.shape[3] // self.d_head, self.d_head, x.device, dtype)
        for layer in self:
            x = layer["ff"](layer["self_attn"](x, turn, cond), cond)
        return x


class TokenMerge(nn.Module):
    """p x p tokens (or pixels) to one: (B, h, w, C) -> (B, h / p, w / p, C')."""

    def __init__(self, n_in, n_out, p=2):
        super().__init__()
        self.p, self.proj = p, linear(n_in * p * p, n_out)

    def forward(self, x):
        x = x.unflatten(2, (-1, self.p)).unflatten(1, (-1, self.p)).transpose(2, 3)  # (B, h / p, w / p, p, p, C)
        return self.proj(x.flatten(3))


class TokenSplit(nn.Module):
    """One token to p x p: (B, h, w, C) -> (B, p h, p w, C'); with a skip: from it to the result by the fraction `fac`."""

    def __init__(self, n_in, n_out, p=2, skip=True):
        super().__init__()
        self.p, self.proj = p, linear(n_in, n_out * p * p)
        if skip:
            self.fac = nn.Parameter(torch.full([1], 0.5))

    def forward(self, x, skip=None):
        x = self.proj(x).unflatten(3, (self.p, self.p, -1)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return x if skip is None else torch.lerp(skip, x.to(skip.dtype), self.fac.to(skip.dtype))


class FourierFeatures(nn.Module):
    """cos and sin of 2 pi w t, for random w that belong to the weights: t (B,) -> (B, width)."""

    def __init__(self, width):
        super().__init__()
        self.register_buffer("weight", torch.randn(width // 2, 1))

    def forward(self, t):
        angle = 2 * math.pi * t.to(self.weight.dtype)[:, None] * self.weight[:, 0]
        return torch.cat([angle.cos(), angle.sin()], -1)


class HDiT(nn.Module):
    """v(x_t, t): an hourglass of transformer levels, wider where the grid is coarser, with skips between equal grids.

    patch_size: pixels a side of a token; widths, depths, kernel_sizes: of each level, the last being the middle (kernel
    None: global attention); d_head: channels a head, a multiple of 8; mapping_*: size of the network that embeds t.
    """

    def __init__(
        self, in_channels, out_channels, patch_size, widths, depths, kernel_sizes, d_head, mapping_width, mapping_depth
    ):
        super().__init__()
        self.config = dict(in_channels=in_channels, out_channels=out_channels, patch_size=patch_size)
        self.config |= dict(widths=list(widths), depths=list(depths), kernel_sizes=list(kernel_sizes), d_head=d_head)
        self.config |= dict(mapping_width=mapping_width, mapping_depth=mapping_depth)
        if not len(widths) == len(depths) == len(kernel_sizes) or d_head % 8 or any(w % d_head for w in widths):
            raise ValueError(f"expected widths of whole heads, each with depth and kernel, got {self.config}")
        level = partial(Level, d_head=d_head, cond_width=mapping_width)
        *outer, middle = zip(depths, widths, kernel_sizes, strict=True)
        self.patch_in = TokenMerge(in_channels, widths[0], patch_size)
        self.time_emb = FourierFeatures(mapping_width)
        self.time_in_proj, self.aug_in_proj = (linear(mapping_width, mapping_width) for _ in range(2))
        norm = partial(RMSNorm, mapping_width)
        blocks = nn.Sequential(*(FeedForward(mapping_width, norm()) for _ in range(mapping_depth)))
        self.mapping = nn.Sequential(OrderedDict(in_norm=norm(), blocks=blocks, out_norm=norm()))
        self.down_levels, self.up_levels = (nn.ModuleList(level(*sizes) for sizes in outer) for _ in range(2))
        self.mid_level = level(*middle)
        self.merges = nn.ModuleList(TokenMerge(fine, coarse) for fine, coarse in pairwise(widths))
        self.splits = nn.ModuleList(TokenSplit(coarse, fine) for fine, coarse in pairwise(widths))
        self.out_norm = RMSNorm(widths[0])
        self.patch_out = TokenSplit(widths[0], out_channels, patch_size, skip=False)
        for name, weight in self.named_parameters():  # at first v is 0, and no layer adds anything
            if name.endswith(("norm.linear.weight", "out_proj.weight", "down_proj.weight", "patch_out.proj.weight")):
                nn.init.zeros_(weight)
        self.register_load_state_dict_pre_hook(drop_buffers)

    def forward(self, x, t):
        """x: (B, C, H, W), t: (B,) in [0, 1] -> v (B, C', H, W). ValueError if tokens cannot be merged: resize x."""
        C, cell = self.config["in_channels"], self.config["patch_size"] * 2 ** len(self.merges)
        if x.ndim != 4 or x.shape[1] != C or x.shape[2] % cell or x.shape[3] % cell:
            raise ValueError(f"expected (B, {C}, H, W), sides multiples of {cell}, got {tuple(x.shape)}: resize first")
        dtype = self.time_in_proj.weight.dtype
        time = self.time_emb(t).to(dtype)
        aug = (torch.arange(time.shape[1], device=t.device) < time.shape[1] // 2).to(dtype)  # features of zeros
        cond = self.mapping(self.time_in_proj(time) + self.aug_in_proj(aug))  # (B, mapping_width)
        x, skips = self.patch_in(x.permute(0, 2, 3, 1).to(dtype)), []  # (B, h, w, C)
        for level, merge in zip(self.down_levels, self.merges, strict=True):
            skips.append(level(x, cond))
            x = merge(skips[-1])
        x = self.mid_level(x, cond)
        for level, split in zip(reversed(self.up_levels), reversed(self.splits), strict=True):
            x = level(split(x, skips.pop()), cond)
        return self.patch_out(self.out_norm(x)).permute(0, 3, 1, 2)


def drop_buffers(module, state_dict, prefix, *_):
    """Before loading: leave out the published buffers that follow from the sizes, so that strict loading holds."""
    for key in [k for k in state_dict if k.startswith(prefix) and k.endswith(("pos_emb.freqs", "aug_emb.weight"))]:
        del state_dict[key]
