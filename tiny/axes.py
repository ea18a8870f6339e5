"""Principal axes of patches: the coordinates in which the first and the last layer of a small network learn fast.

In pixels, a patch is nearly all brightness: its standard deviation there is a hundred times that of its fine detail. Adam
gives every weight a step of one size, so in pixels the detail, which is what restoring is about, drowns in noise along the
brightness. In these coordinates the two are of like size. A layer is linear in its weight, so after training the weight is
written back in pixels, and the saved network is an ordinary one. N patches of D numbers; n axes.
"""

from operator import attrgetter

import torch
import torch.nn as nn
from torch.nn.utils import parametrize


@torch.no_grad()
def half_whitened(patches, n=None):
    """The n leading axes of patches (N, D): mean (D,), down (n, D) into the coordinates and up (D, n) back, in float64.

    Each coordinate is divided by the square root of its standard deviation, half-way to whitening: the leading one would
    otherwise outweigh the last hundreds of times in every loss. The coordinates' mean variance is then 1. An axis along which
    nothing varies, as between the colours of gray pictures, counts as if it varied a ten-thousandth as much as the first.
    """
    patches = patches.double()
    mean = patches.mean(0)
    variance, axes = torch.linalg.eigh(torch.cov((patches - mean).T))  # ascending
    variance = variance.clamp_min(1e-8 * variance[-1])
    std, axes = variance.flip(0)[:n].sqrt(), axes.flip(1)[:, :n]  # (n,), (D, n)
    scale = std.sqrt() * std.mean().sqrt()
    return mean, (axes / scale).T, axes * scale


class InAxes(nn.Module):
    """Parametrisation: weight = learnt coordinates times `rows` (n, D) along dimension dim; `back` (D, n) undoes it."""

    def __init__(self, rows, back, dim):
        super().__init__()
        self.register_buffer("rows", rows.float())
        self.register_buffer("back", back.float())
        self.dim = dim

    def forward(self, learnt):
        return torch.tensordot(learnt.movedim(self.dim, -1), self.rows, 1).movedim(-1, self.dim)

    def right_inverse(self, weight):
        return torch.tensordot(weight.movedim(self.dim, -1), self.back, 1).movedim(-1, self.dim)


@torch.no_grad()
def learn_in_axes(layer, name, rows, back, dim):
    """Makes layer.name learn in coordinates; its random start becomes one in them."""
    in_axes = InAxes(rows, back, dim).to(getattr(layer, name).device)
    getattr(layer, name).copy_(in_axes(getattr(layer, name)))
    parametrize.register_parametrization(layer, name, in_axes)


@torch.no_grad()
def in_pixels(module, plain):
    """plain, the same network before learn_in_axes, with the weights that module has learnt since."""
    for name, weight in plain.named_parameters():
        weight.copy_(attrgetter(name)(module))
    return plain
