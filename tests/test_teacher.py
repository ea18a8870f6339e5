"""teacher.py with swinir.py and hdit.py: Eq. 1-4, numbers of the public PMRF code (golden/), loading of its files."""

import argparse
import json
import logging
import math
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from nets import hdit
from plumbing.published import HDIT, SWINIR, read_pmrf
from teacher import PMRF, HDiT, SwinIR, flow_matching_loss, neighborhood_attention, path, posterior_mean_loss

GOLDEN = Path(__file__).parent / "golden"


def golden(name):
    with safe_open(GOLDEN / name, "pt") as f:
        return {k: f.get_tensor(k) for k in f.keys()}, json.loads(f.metadata()["metadata"])


def worst(a, b):
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def small_pmrf(seed=0, **k):
    """The small nets of the golden file's kind, every weight random (the zero ones too)."""
    torch.manual_seed(seed)
    net = HDiT(
        3, 3, 4, widths=[16, 32], depths=[1, 1], kernel_sizes=[5, None], d_head=8, mapping_width=16, mapping_depth=1
    )
    pmrf = PMRF(SwinIR(12, [2], [2], num_feat=8), net, **k).eval()
    for name, p in pmrf.named_parameters():
        if not name.endswith(("scale", "fac")) and p.ndim > 1:
            nn.init.normal_(p, std=p[0].numel() ** -0.5 * (0.2 if "patch_out" in name else 1))
    return pmrf


class Field(nn.Module):
    """A velocity given by a formula of x (B, 3, H, W) and t (B, 1, 1, 1)."""

    def __init__(self, v):
        super().__init__()
        self.v, self.seen = v, []

    def forward(self, x, t):
        self.seen.append((x, t))
        return self.v(x, t.view(-1, 1, 1, 1))


def transport(v, x, eps=None, **k):
    return PMRF(nn.Identity(), Field(v)).transport(x, torch.zeros_like(x) if eps is None else eps, **k)


# ------------------------------------------------------------------------------- Eq. 1-4


def test_eq1_euler_has_first_order_and_the_closed_form_of_a_linear_field():
    x_0, c = torch.rand(2, 3, 4, 4, dtype=torch.float64), 0.4
    end = c + (x_0 - c) * math.exp(-1)  # of dx/dt = c - x
    error = {k: worst(transport(lambda x, t: c - x, x_0, steps=k), end) for k in (25, 50, 100)}
    assert worst(transport(lambda x, t: c - x, x_0, steps=25), c + (x_0 - c) * (1 - 1 / 25) ** 25) < 1e-12
    assert error[25] / error[50] == pytest.approx(2, rel=0.05) and error[50] / error[100] == pytest.approx(2, rel=0.03)


def test_eq1_velocity_is_asked_at_the_left_end_of_each_step():
    x_0 = torch.zeros(1, 3, 2, 2, dtype=torch.float64)
    for k in (1, 4, 25):
        assert worst(transport(lambda x, t: t + 0 * x, x_0, steps=k), x_0 + (1 - 1 / k) / 2) < 1e-12
    e = 0.2  # from t_eps on: sum of t_i dt with t_i = e + i dt, dt = (1 - e) / K
    want = (1 - e) * (e + (1 - e) * (4 - 1) / 8)
    assert worst(transport(lambda x, t: t + 0 * x, x_0, steps=4, t_eps=e), x_0 + want) < 1e-12


def test_eq1_starts_at_the_posterior_mean_plus_sigma_s_noise():
    x, eps = torch.rand(2, 1, 3, 4, 4)
    assert torch.equal(transport(lambda x, t: 0 * x, x, eps, sigma_s=0.0), x)
    assert torch.equal(transport(lambda x, t: 0 * x, x, eps, sigma_s=0.3), (x + 0.3 * eps).clamp(0, 1))
    assert torch.equal(transport(lambda x, t: 0 * x, x, eps), (x + 0.1 * eps).clamp(0, 1))


def test_eq2_the_minimiser_is_the_conditional_mean():
    """y takes two values; a net that is free for each of them has its minimum where it gives the mean of x given y."""
    y = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0]).view(5, 1, 1, 1)
    x = torch.rand(5, 3, 4, 4, dtype=torch.float64)
    table = torch.zeros(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    loss = posterior_mean_loss(lambda y: table[y.flatten().long()], y, x)
    (slope,) = torch.autograd.grad(loss, table)
    count = torch.tensor([3.0, 2.0], dtype=torch.float64).view(2, 1, 1, 1)
    newton = -slope / (2 * count / x.numel())  # the loss is quadratic in the table: one step from anywhere
    assert worst(newton, torch.stack([x[:3].mean(0), x[3:].mean(0)])) < 1e-12
    assert loss.item() == pytest.approx(x.square().mean().item())


def test_eq2_the_posterior_mean_is_clipped_and_the_network_is_not():
    pmrf, y = small_pmrf(), torch.rand(1, 3, 64, 64)
    pmrf.mmse_model.conv_last.bias.data = torch.tensor([-2.0, 0.0, 2.0])
    with torch.no_grad():  # with gradient, torch takes another kernel for attention
        x_hat = pmrf.mmse_model(y)
    assert x_hat.min() < -1 and x_hat.max() > 2
    assert torch.equal(pmrf.posterior_mean(y), x_hat.clip(0, 1))


def test_eq2_the_light_form_starts_as_the_identity_and_learns():
    """num_feat 0: one convolution and a pixel shuffle, under the names of public SwinIR's "pixelshuffledirect"."""
    torch.manual_seed(0)
    net = SwinIR(12, [2], [2], num_feat=0)
    x = torch.rand(2, 3, 64, 128)
    y = (x + 0.3 * torch.rand(2, 3, 1, 1)).clamp(0, 1)
    before = posterior_mean_loss(net, y, x)
    assert worst(net(y), y) < 1e-6  # y - mean + 0 + mean
    before.backward()
    with torch.no_grad():
        for p in net.parameters():
            p -= 0.5 * p.grad
    assert posterior_mean_loss(net, y, x) < 0.95 * before
    tail = {
        k: tuple(v.shape) for k, v in net.state_dict().items() if k.startswith(("upsample", "conv_last", "conv_up"))
    }
    assert tail == {"upsample.0.weight": (192, 12, 3, 3), "upsample.0.bias": (192,)}


def test_eq2_swinir_starts_without_attention_and_its_light_form_keeps_the_strength_of_detail():
    net = SwinIR(64, [2, 2], [2, 2], num_feat=0)
    blocks = [b for layer in net.layers for b in layer.residual_group["blocks"]]
    assert len(blocks) == 4 and not any(b.attn.proj.weight.any() for b in blocks)
    assert all(b.mlp.fc1.weight.std().item() == pytest.approx(64**-0.5, rel=0.1) for b in blocks)
    assert not any(k.startswith("norm.") for k in net.state_dict())
    assert {k for k in SwinIR(8, [2], [1]).state_dict() if k.startswith("norm.")} == {"norm.weight", "norm.bias"}


def test_eq3_path_runs_from_source_to_target_and_v_is_its_slope():
    source, target = torch.rand(2, 4, 3, 5, 5, dtype=torch.float64)
    ends = [path(source, target, torch.full((4,), t, dtype=torch.float64))[0] for t in (0.0, 1.0)]
    assert torch.equal(ends[0], source) and torch.equal(ends[1], target)
    t, h = torch.rand(4, dtype=torch.float64), 1e-6
    slope = (path(source, target, t + h)[0] - path(source, target, t - h)[0]) / (2 * h)
    assert worst(slope, path(source, target, t)[1]) < 1e-8


def test_eq3_flow_matching_loss_asks_v_on_the_noisy_path():
    x_mmse, x, eps = torch.rand(3, 4, 3, 8, 8, dtype=torch.float64)
    t, sigma_s = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64), 0.3
    field = Field(lambda x_t, t: x_t * t)
    loss = flow_matching_loss(field, x_mmse, x, t, eps, sigma_s)
    m, c, e, a = x_mmse.numpy(), x.numpy(), eps.numpy(), t.numpy().reshape(4, 1, 1, 1)
    x_t = a * c + (1 - a) * (m + 0.3 * e)
    assert worst(field.seen[0][0], torch.from_numpy(x_t)) < 1e-12 and torch.equal(field.seen[0][1], t)
    assert loss.item() == pytest.approx(np.mean((x_t * a - (c - m - 0.3 * e)) ** 2), rel=1e-12)
    assert flow_matching_loss(lambda x_t, t: x - x_mmse - 0.3 * eps, x_mmse, x, t, eps, 0.3) < 1e-30


def test_eq4_straight_fields_need_one_step():
    x_0, x_1 = torch.rand(2, 2, 3, 4, 4, dtype=torch.float64)
    for k in (1, 25):
        assert worst(transport(lambda x, t: x_1 - x_0, x_0, steps=k), x_1) < 1e-12
        assert worst(transport(lambda x, t: (x_1 - x) / (1 - t), x_0, steps=k), x_1) < 1e-12


def test_eq4_clips_at_the_end_and_not_in_between():
    x = torch.full((1, 3, 2, 2), 0.5)
    there_and_back = transport(lambda x, t: torch.where(t < 0.5, 4.0, -4.0) + 0 * x, x, steps=4)  # over 2.5
    assert torch.equal(there_and_back, x)
    assert transport(lambda x, t: 4 + 0 * x, x, steps=4).max() == 1
    assert transport(lambda x, t: -4 + 0 * x, x, steps=4).min() == 0


@pytest.mark.parametrize("steps", [0, -1, 2.5])
def test_eq4_refuses_numbers_of_steps(steps):
    with pytest.raises(ValueError, match="steps"):
        transport(lambda x, t: x, torch.rand(1, 3, 2, 2), steps=steps)


def test_eq1_to_eq4_give_the_numbers_of_the_public_code():
    t, m = golden("teacher_flow.safetensors")
    nets = {"model": HDiT(**m["hdit"]), "mmse_model": SwinIR(**m["swinir"])}
    for name, net in nets.items():
        net.load_state_dict({k.removeprefix(name + "."): v for k, v in t.items() if k.startswith(name + ".")})
    pmrf = PMRF(swinir=nets["mmse_model"], hdit=nets["model"]).eval()
    assert worst(pmrf.posterior_mean(t["y"]), t["mmse"]) < 1e-5
    x_0 = t["mmse"] + 0.1 * t["eps"]
    assert worst(x_0 + pmrf.velocity(x_0, 0.0) / 25, t["x_step1"]) < 1e-5
    assert worst(pmrf.transport(t["mmse"], t["eps"], steps=25, sigma_s=0.1), t["xhat"]) < 1e-4
    t_5 = torch.full((1,), 0.2)
    assert torch.equal(pmrf.velocity(x_0, 0.2), pmrf.model(x_0, t_5)) and not torch.equal(pmrf.velocity(x_0, 0.7), t_5)


# ------------------------------------------------------------------------------- seeds


def test_noise_of_a_picture_depends_on_its_seed_alone():
    pmrf = PMRF(nn.Identity(), Field(lambda x, t: 0.1 * x))
    y = torch.rand(4, 3, 8, 8)
    together = pmrf.restore(y, steps=3, seed=[5, 6, 7, 2**40])
    alone = torch.cat([pmrf.restore(y[i : i + 1], steps=3, seed=s) for i, s in enumerate((5, 6, 7, 2**40))])
    assert torch.equal(together, alone)
    assert torch.equal(pmrf.restore(y[[2, 0]], steps=3, seed=(7, 5)), together[[2, 0]])
    same = pmrf.restore(y[:1].expand(3, -1, -1, -1), seed=9)
    assert torch.equal(same[0], same[1]) and not torch.equal(same[0], pmrf.restore(y[:1], seed=8)[0])
    noise = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(5))
    field = Field(lambda x, t: 0 * x)
    PMRF(nn.Identity(), field, sigma_s=0.2).restore(y[:1], steps=1, seed=5)
    assert torch.equal(field.seen[0][0], y[:1] + 0.2 * noise)
    assert torch.equal(pmrf.restore(y, seed=-1), pmrf.restore(y, seed=2**70 - 1))  # the generator has 32 bits of seed
    with pytest.raises(ValueError, match="one seed"):
        pmrf.restore(y, seed=[1, 2])


def test_restoring_is_deterministic_and_nearly_independent_of_the_batch():
    pmrf, y, seeds = small_pmrf(), torch.rand(5, 3, 64, 64), [3, 1, 4, 1, 5]
    x_hat = pmrf.restore(y, steps=3, seed=seeds)
    assert torch.equal(x_hat, pmrf.restore(y, steps=3, seed=seeds))
    alone = torch.cat([pmrf.restore(y[i : i + 1], steps=3, seed=s) for i, s in enumerate(seeds)])
    assert worst(x_hat, alone) < 1e-5 < x_hat.std()
    assert x_hat.min() >= 0 and x_hat.max() <= 1 and not x_hat.requires_grad
    with torch.inference_mode():
        assert torch.equal(x_hat, pmrf.restore(y, steps=3, seed=seeds))


def test_velocity_takes_one_t_or_one_a_picture_and_has_a_gradient():
    pmrf, x = small_pmrf(), torch.rand(2, 3, 64, 64, requires_grad=True)
    v = pmrf.velocity(x, torch.tensor([0.2, 0.7]))
    assert worst(v[1:], pmrf.velocity(x[1:], 0.7)) < 1e-5 and worst(v[1:], pmrf.velocity(x[1:], 0.2)) > 1e-4
    v.square().sum().backward()
    assert x.grad.abs().sum() > 0 and all(p.grad is not None for p in pmrf.model.parameters())
    for t in (torch.rand(3), torch.rand(2, 1)):
        with pytest.raises(ValueError, match="one t"):
            pmrf.velocity(x, t)


# ------------------------------------------------------------------------------- HDiT


def brute_force(q, k, v, kernel_size):
    out = torch.empty_like(v)
    H, W = q.shape[1:3]
    for i in range(H):
        for j in range(W):
            a, b = (min(max(p - kernel_size // 2, 0), n - kernel_size) for p, n in ((i, H), (j, W)))
            box = slice(a, a + kernel_size), slice(b, b + kernel_size)
            keys, values = (z[:, *box].flatten(1, 2) for z in (k, v))
            weights = torch.einsum("bhd,bkhd->bhk", q[:, i, j], keys).softmax(-1)
            out[:, i, j] = torch.einsum("bhk,bkhd->bhd", weights, values)
    return out


@pytest.mark.parametrize(
    "B,H,W,heads,dim,kernel_size",
    [
        (2, 9, 17, 2, 8, 7),
        (1, 7, 7, 1, 4, 7),
        (1, 8, 25, 3, 4, 3),
        (1, 16, 12, 1, 8, 11),
        (2, 5, 6, 2, 4, 4),
        (1, 3, 9, 1, 4, 1),
    ],
)
def test_neighborhood_attention_is_its_definition_with_gradients(B, H, W, heads, dim, kernel_size):
    torch.manual_seed(H)
    qkv = [torch.randn(B, H, W, heads, dim, requires_grad=True) for _ in range(3)]
    ours, brute = (f(*qkv, kernel_size) for f in (neighborhood_attention, brute_force))
    assert worst(ours, brute) < 1e-5
    g = torch.randn_like(ours)
    for a, b in zip(torch.autograd.grad(ours, qkv, g), torch.autograd.grad(brute, qkv, g), strict=True):
        assert worst(a, b) < 1e-5


def test_neighborhood_attention_gives_the_numbers_of_natten():
    t, kernel_size = golden("teacher_natten.safetensors")
    for name, k in kernel_size.items():
        assert worst(neighborhood_attention(*(t[f"{name}.{z}"] for z in "qkv"), k), t[f"{name}.out"]) < 1e-5


@pytest.mark.parametrize("grid", [(6, 20), (20, 6)])
def test_neighborhood_attention_refuses_a_window_larger_than_the_grid(grid):
    q = torch.rand(1, *grid, 1, 4)
    with pytest.raises(ValueError, match="7 x 7"):
        neighborhood_attention(q, q, q, 7)


class Largest(TorchDispatchMode):
    """Keeps the number of elements of the largest tensor that an operation made."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.n = max(getattr(self, "n", 0), out.numel())
        return out


def test_neighborhood_attention_needs_memory_linear_in_the_tokens():
    largest = []
    for side in (32, 64, 128):
        q = torch.empty(1, side, side, 1, 8, device="meta")
        with Largest() as mode:
            neighborhood_attention(q, q, q, 7)
        largest.append(mode.n)
    assert largest[1] <= 4 * largest[0] and largest[2] <= 4 * largest[1] < 128**4 / 50


@pytest.mark.parametrize("h,w", [(4, 6), (6, 4), (8, 8)])
def test_rotation_multiplies_by_complex_numbers_at_cell_centres(h, w):
    """Positions as the reference makes them: edges of a box with the picture's shape, centres between, means of 2 x 2."""
    heads, d_head = 3, 16
    x = torch.randn(1, h // 2, w // 2, heads, d_head)
    edges = [np.linspace(-n / max(h, w), n / max(h, w), n + 1) for n in (h, w)]
    fine = np.stack(np.meshgrid(*((e[1:] + e[:-1]) / 2 for e in edges), indexing="ij"), -1)
    coarse = fine.reshape(h // 2, 2, w // 2, 2, 2).mean((1, 3))  # where tokens have been merged
    count = heads * d_head // 8
    freqs = np.pi * 10 ** (np.arange(count) / count)  # head n has those n, n + heads, ...
    want = x.numpy().copy().astype(np.float64)
    for n in range(heads):
        theta = np.concatenate([coarse[..., :1] * freqs[n::heads], coarse[..., 1:] * freqs[n::heads]], -1)
        pair = (want[0, :, :, n, :4] + 1j * want[0, :, :, n, 4:8]) * np.exp(1j * theta)
        want[0, :, :, n, :4], want[0, :, :, n, 4:8] = pair.real, pair.imag
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-13)):
        ours = hdit.rotate(x.to(dtype), *hdit.rotation(h // 2, w // 2, heads, d_head, "cpu", dtype))
        assert ours.dtype == dtype and worst(ours.double(), torch.from_numpy(want)) < tolerance


def test_rotation_has_the_published_frequencies():
    freqs = golden("teacher_flow.safetensors")[0][
        "model.down_levels.1.0.self_attn.pos_emb.freqs"
    ]  # (heads, d_head / 8)
    cos, sin = hdit.rotation(8, 8, 2, 32, "cpu")
    position = torch.tensor([-7, -5, -3, -1, 1, 3, 5, 7]) / 8
    theta = position[:, None, None] * freqs
    assert worst(cos[:, 3, :, :4], theta.cos()) < 1e-5 and worst(sin[3, :, :, 4:], theta.sin()) < 1e-5


def test_cosine_attention_ignores_the_length_of_queries_and_keys():
    attn = hdit.SelfAttention(16, 8, 4, None)
    z = torch.randn(1, 2, 2, 2, 8)
    unit = attn.normalise(z)
    assert worst(unit, attn.normalise(5 * z)) < 1e-5
    assert worst(unit.norm(dim=-1), torch.full((1, 2, 2, 2), 10.0).sqrt()) < 1e-5
    assert torch.equal(attn.normalise(0 * z), 0 * z)


def test_norms_have_the_eps_of_the_public_code():
    """Where the mean square is eps, a norm divides by sqrt(2 eps) instead of sqrt(eps)."""
    x = torch.full((1, 2, 2, 8), 1e-3)
    half = torch.full_like(x, 0.5**0.5)
    assert worst(hdit.RMSNorm(8)(x), half) < 1e-6
    norm = hdit.AdaRMSNorm(8, 4)
    nn.init.constant_(norm.linear.weight, 0.5)
    assert worst(norm(x, torch.ones(1, 4)), 3 * half) < 1e-5  # the gain is 4 * 0.5 + 1
    attn, z = hdit.SelfAttention(8, 8, 4, None), torch.full((1, 2, 2, 1, 8), 1e-3) / 8**0.5  # the sum of squares
    assert worst(attn.normalise(z), torch.full_like(z, (10 / 2 / 8) ** 0.5)) < 1e-6
    for net in [m for m in SwinIR(8, [2], [1]).modules() if isinstance(m, nn.LayerNorm)]:
        x = 1e-5**0.5 * torch.tensor([1.0, -1.0] * 4)
        assert worst(net(x), 0.5**0.5 * x.sign()) < 1e-5


def test_hdit_begins_as_zero_and_learns():
    torch.manual_seed(0)
    net = HDiT(3, 3, 4, [16, 32], [1, 1], [3, None], d_head=8, mapping_width=16, mapping_depth=1)
    x_mmse, x, eps, t = *torch.rand(2, 2, 3, 32, 32), torch.randn(2, 3, 32, 32), torch.tensor([0.3, 0.8])
    assert net(x, t).abs().max() == 0
    assert net.splits[0].fac == 0.5 and torch.equal(net.mid_level[0]["self_attn"].scale, torch.full([4], 10.0))
    optimizer, losses = torch.optim.AdamW(net.parameters(), lr=3e-3), []
    for _ in range(10):
        losses.append(flow_matching_loss(net, x_mmse, x, t, eps, 0.1))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    assert all(p.grad.abs().sum() > 0 for p in net.parameters())


@pytest.mark.parametrize("shape", [(1, 3, 60, 64), (1, 3, 64, 68), (1, 4, 64, 64), (3, 64, 64)])
def test_hdit_refuses_pictures_that_it_cannot_cut(shape):
    with pytest.raises(ValueError, match="expected.*got"):
        small_pmrf().model(torch.rand(shape), torch.rand(1))


def test_networks_run_in_bfloat16():
    pmrf, y = small_pmrf(), torch.rand(1, 3, 64, 64)
    exact = pmrf.restore(y, steps=2)
    with torch.autocast("cpu", torch.bfloat16):
        x_hat = pmrf.restore(y, steps=2)
        assert pmrf.velocity(y, 0.5).dtype == torch.float32  # so that the sum of the steps is not rounded
    assert 0 < (x_hat - exact).abs().mean() < 0.01  # the largest deviation depends on the CPU, up to 0.07
    assert pmrf.bfloat16().velocity(y.bfloat16(), 0.5).dtype == torch.bfloat16


def test_networks_in_float64_round_to_float32_nowhere(monkeypatch):
    """Angles are the only values that no dtype comes with; the other ones are rounded if a small change is lost."""
    pmrf, y, rotation = small_pmrf().double(), torch.rand(1, 3, 64, 64, dtype=torch.float64), hdit.rotation
    v = pmrf.velocity(y, 0.3)
    monkeypatch.setattr(hdit, "rotation", lambda *a: rotation(*a[:5], torch.float64))
    assert torch.equal(v, pmrf.velocity(y, 0.3))
    for net in (
        pmrf.posterior_mean,
        lambda x: pmrf.velocity(x, 0.3),
        lambda x: pmrf.velocity(y, 0.3 + (x - y)[0, 0, 0, 0]),
    ):
        small, large = (net(y + h) - net(y) for h in (1e-9, 2e-9))
        assert small.dtype == torch.float64 and 0 < small.abs().max() < 1e-6 and worst(large, 2 * small) < 1e-12


# ------------------------------------------------------------------------------- SwinIR


def test_swinir_pads_by_reflection_to_a_multiple_of_8():
    net, y = small_pmrf().mmse_model, torch.rand(1, 3, 60, 121)
    padded = np.pad(y.numpy(), ((0, 0), (0, 0), (0, 4), (0, 7)), mode="reflect")
    with torch.no_grad():
        x_hat = net(y)
        assert x_hat.shape == (1, 3, 64, 128) and torch.equal(x_hat, net(torch.from_numpy(padded)))
        assert net(torch.rand(1, 3, 128, 64)).shape == (1, 3, 128, 64)


@pytest.mark.parametrize("shape", [(1, 3, 56, 64), (1, 3, 64, 72), (1, 3, 0, 64), (1, 1, 64, 64), (3, 64, 64)])
def test_swinir_refuses_sizes_that_its_windows_do_not_fit(shape):
    with pytest.raises(ValueError, match="expected.*got.*resize"):
        small_pmrf().mmse_model(torch.rand(shape))


def test_shifted_windows_see_only_what_was_near():
    """After a cyclic shift by 4, two tokens of a window may see each other if they were in one window before it wrapped."""
    h, w = 16, 24
    row, col = (z.roll((-4, -4), (0, 1)) for z in torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"))

    def far(z):
        z = z.view(h // 8, 8, w // 8, 8).transpose(1, 2).reshape(-1, 64)
        return (z[:, None] - z[:, :, None]).abs() >= 8

    block = SwinIR(8, [2], [1]).layers[0].residual_group["blocks"][1]
    mask = block.get_attn_mask(torch.zeros(1, h, w, 8))
    assert torch.equal(mask, torch.where(far(row) | far(col), -100.0, 0.0))


def test_swin_attention_has_one_bias_for_each_relative_position():
    attn = SwinIR(4, [1], [1]).layers[0].residual_group["blocks"][0].attn
    for layer in (attn.qkv, attn.proj):
        nn.init.zeros_(layer.bias)
    nn.init.zeros_(attn.qkv.weight)
    attn.qkv.weight.data[8:] = attn.proj.weight.data[:] = torch.eye(4)  # so that scores are the biases alone
    nn.init.normal_(attn.relative_position_bias_table)
    x = torch.randn(1, 64, 4)
    table = attn.relative_position_bias_table.detach().view(15, 15)
    bias = [[table[7 + i // 8 - j // 8, 7 + i % 8 - j % 8].item() for j in range(64)] for i in range(64)]
    assert worst(attn(x), torch.tensor(bias).softmax(-1) @ x) < 1e-5


# ------------------------------------------------------------------------------- files


def test_full_size_networks_have_the_published_keys():
    with torch.device("meta"):
        nets = {"hdit": HDiT(**HDIT), "swinir": SwinIR(**SWINIR)}
    computed = re.compile(r"attn_mask|relative_position_index|pos_emb\.freqs|aug_emb\.weight")
    for name, want in json.loads((GOLDEN / "teacher_keys.json").read_text()).items():
        parameters = dict(nets[name].named_parameters())
        ours = {}
        for key, p in nets[name].state_dict().items():
            kind = "parameter" if key in parameters else "buffer"
            line = f"{re.sub(r'[.][0-9]+(?=[.])', '.#', key)} {'x'.join(map(str, p.shape))} {kind}"
            ours[line] = ours.get(line, 0) + 1
        assert ours == {k: n for k, n in want["keys"].items() if not computed.search(k)}
        assert sum(want["keys"].values()) == want["num_keys"]
        assert sum(p.numel() for p in parameters.values()) == want["num_parameters"]
        assert list(parameters) == want.get("parameter_order", list(parameters))  # the averaged weights have no names


PUBLISHED = {"arch": "hdit_ImageNet256Sp4", "mmse_model_arch": "swinir_L", "stage": "flow", "conditional": False}


def published(pmrf):
    """config, state_dict of a small teacher as the public code would write them, with its metrics and its buffers."""
    config = PUBLISHED | {"mmse_noise_std": 0.2, "num_flow_steps": 50, "eps": 0.1, "betas": [0.9, 0.95]}
    config |= {"hdit": pmrf.model.config, "swinir": pmrf.mmse_model.config}
    state = dict(pmrf.state_dict()) | {"fid.inception.conv.weight": torch.ones(3), "inception_score.x": torch.ones(2)}
    state["model.aug_emb.weight"] = torch.randn(8, 9)
    state["model.mid_level.0.self_attn.pos_emb.freqs"] = torch.randn(4, 1)
    state["mmse_model.layers.0.residual_group.blocks.1.attn_mask"] = torch.zeros(64, 64, 64)
    state["mmse_model.layers.0.residual_group.blocks.0.attn.relative_position_index"] = torch.zeros(
        64, 64, dtype=torch.long
    )
    return config, state


def write_folder(folder, config, state):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors")
    return folder


def refused(source, *words):
    with pytest.raises(OSError) as e:
        PMRF.from_pretrained(source)
    assert "\n" not in str(e.value) and len(str(e.value)) < 600
    assert all(word in str(e.value) for word in words), str(e.value)


def test_load_a_published_folder(tmp_path):
    pmrf, y = small_pmrf(), torch.rand(1, 3, 64, 64)
    loaded = PMRF.from_pretrained(write_folder(tmp_path / "hub", *published(pmrf)))
    assert (loaded.sigma_s, loaded.t_eps, loaded.training) == (0.2, 0.1, False)
    pmrf.sigma_s, pmrf.t_eps = 0.2, 0.1
    assert torch.equal(loaded.restore(y, steps=3), pmrf.restore(y, steps=3))


def test_offline_hub_is_one_line(tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    name = "ohayonguy/PMRF_blind_face_image_restoration"
    refused(name, name, "model.safetensors", "0.7 GB", f"hf download {name}")
    assert huggingface_hub.logging.get_verbosity() >= logging.ERROR  # online, its retries would be twelve lines
    for place in (tmp_path / "nowhere", "nowhere", "runs/a/nowhere"):  # none of them owner/name
        refused(place, "nowhere", "check the path")


def test_sizes_are_the_published_ones_unless_config_has_others(tmp_path):
    config, state = published(small_pmrf())
    for k in ("hdit", "swinir"):
        del config[k]
    refused(write_folder(tmp_path / "a", config, state), "size mismatch for model", "256")
    settings, *_ = read_pmrf(tmp_path / "a")
    assert settings["hdit"] == HDIT and settings["swinir"] == SWINIR
    refused(
        write_folder(tmp_path / "b", config | {"arch": "unet"}, state),
        "arch",
        "unet",
        "hdit_ImageNet256Sp4",
    )


def test_broken_folders_are_one_line(tmp_path):
    config, state = published(small_pmrf())
    good = write_folder(tmp_path / "good", config, state)
    data = (good / "model.safetensors").read_bytes()
    for name, change in {"cut": data[: len(data) // 2], "foreign": b"GIF89a", "empty": b""}.items():
        (write_folder(tmp_path / name, config, state) / "model.safetensors").write_bytes(change)
        refused(tmp_path / name, name)
    del state["model.out_norm.scale"]
    refused(write_folder(tmp_path / "hole", config, state), "Missing", "model.out_norm.scale")
    (good / "config.json").write_text("{")
    refused(good, "JSON")
    (good / "config.json").write_text('{"hdit": {"width": 3}}')
    refused(good, "width")
    (good / "config.json").write_text("[]")
    refused(good, "list instead of a dict")
    (good / "config.json").unlink()
    refused(good, "config.json")


def lightning(pmrf):
    """A training checkpoint whose named weights are stale: the averaged ones are a list without names."""
    config, state = published(pmrf)
    shadow = [p.detach().clone() for p in pmrf.model.parameters()]
    state |= {f"model.{k}": p + 1 for k, p in pmrf.model.named_parameters()}
    ema = {"decay": 0.999, "num_updates": 7, "shadow_params": shadow, "collected_params": None}
    return {"state_dict": state, "hyper_parameters": config, "ema": ema, "epoch": 3}


def test_load_a_lightning_checkpoint_with_its_average(tmp_path):
    pmrf, y = small_pmrf(), torch.rand(1, 3, 64, 64)
    torch.save(lightning(pmrf), tmp_path / "last.ckpt")
    loaded = PMRF.from_pretrained(str(tmp_path / "last.ckpt"))
    pmrf.sigma_s, pmrf.t_eps = 0.2, 0.1
    assert torch.equal(loaded.restore(y, 3, seed=4), pmrf.restore(y, 3, seed=4))


class Code:
    """Runs when it is unpickled without care."""

    def __reduce__(self):
        return os.mkdir, ("code was run",)


def test_broken_checkpoints_are_one_line(tmp_path, monkeypatch):
    file, ckpt = tmp_path / "x.ckpt", lightning(small_pmrf())
    monkeypatch.chdir(tmp_path)
    refused(file, "x.ckpt", "check the path")
    for odd in (Code(), argparse.Namespace(arch="hdit")):
        for whole in (True, False):
            torch.save(ckpt | {"callbacks": odd}, file, _use_new_zipfile_serialization=whole)
            refused(file, "x.ckpt", "mkdir" if isinstance(odd, Code) else "argparse.Namespace")
    file.write_bytes(pickle.dumps(Code(), protocol=2))
    refused(file, "x.ckpt")
    assert not Path("code was run").exists()
    without = [{k: v for k, v in ckpt.items() if k != gone} for gone in ("ema", "state_dict", "hyper_parameters")]
    for odd in (*without, [], ckpt["state_dict"], ckpt | {"ema": {"shadow_params": None}}):
        torch.save(odd, file)
        refused(file, "without hyper_parameters, state_dict or ema.shadow_params")
    short = ckpt["ema"] | {"shadow_params": ckpt["ema"]["shadow_params"][1:]}
    torch.save(ckpt | {"ema": short}, file)
    refused(file, "averaged parameters")
    turned = ckpt["ema"] | {"shadow_params": ckpt["ema"]["shadow_params"][::-1]}
    torch.save(ckpt | {"ema": turned}, file)
    refused(file, "size mismatch")
    torch.save(ckpt, file)
    file.write_bytes(file.read_bytes()[:3000])
    refused(file, "x.ckpt")
    file.write_bytes(b"")
    refused(file, "x.ckpt")


def test_save_then_load(tmp_path):
    pmrf, y = small_pmrf(sigma_s=0.15, t_eps=0.2), torch.rand(1, 3, 64, 64)
    pmrf.save_pretrained(tmp_path / "half")
    pmrf.save_pretrained(tmp_path / "half")  # once more, over the first
    assert sorted(f.name for f in (tmp_path / "half").iterdir()) == ["config.json", "model.safetensors"]
    saved = load_file(tmp_path / "half" / "model.safetensors")
    assert (
        saved["model.time_emb.weight"].dtype == torch.float32
        and saved["model.patch_in.proj.weight"].dtype == torch.float16
    )
    loaded = PMRF.from_pretrained(tmp_path / "half")
    assert loaded.sigma_s == 0.15
    for (name, a), b in zip(pmrf.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a.half().float(), b) and b.requires_grad, name
    pmrf.save_pretrained(tmp_path / "exact", torch.float32)
    assert torch.equal(PMRF.from_pretrained(tmp_path / "exact").restore(y, 2), pmrf.restore(y, 2))
    F.mse_loss(loaded.velocity(y, 0.5), y).backward()  # loaded weights can be trained on
