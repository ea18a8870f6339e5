"""Eq. 6: its terms and their sum, against numpy and by hand; LPIPS against what its definition demands."""

import numpy as np
import pytest
import torch

import losses


def test_eq6_latent_and_l1_terms_by_numpy():
    a, b = np.random.default_rng(0).normal(size=(2, 2, 4, 3, 3)).astype(np.float32)
    assert losses.latent_loss(torch.tensor(a), torch.tensor(b)).item() == pytest.approx(((a - b) ** 2).mean(), rel=1e-5)
    assert losses.l1_loss(torch.tensor(a), torch.tensor(b)).item() == pytest.approx(np.abs(a - b).mean(), rel=1e-5)
    with pytest.raises(ValueError, match="one shape"):
        losses.latent_loss(torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 1))


def test_eq6_is_the_weighted_sum_and_its_gradient():
    x = torch.tensor(2.0, requires_grad=True)
    terms = {"lat": x**2, "lpips": 3 * x, "l1": x**3, "sgcl": 1 / x}
    lambdas = {"lat": 1.0, "lpips": 0.5, "l1": 2.0, "sgcl": 0.1}
    total = losses.total_loss(terms, lambdas)
    assert total.item() == pytest.approx(4 + 3 + 16 + 0.05)
    total.backward()
    assert x.grad.item() == pytest.approx(2 * 2 + 1.5 + 2 * 3 * 4 - 0.1 / 4)
    assert losses.total_loss({"lat": x**2}, lambdas).item() == pytest.approx(4)


def test_eq6_lpips_is_offline_a_distance_and_follows_its_definition():
    """sum over layers of mean over places of w . (unit features' difference)^2, written out from the network's own layers."""
    lpips_fn = losses.load_lpips()
    g = torch.Generator().manual_seed(0)
    x = torch.rand(1, 3, 64, 64, generator=g)
    near, far = (x + s * torch.randn(x.shape, generator=g) for s in (0.02, 0.3))
    d = [losses.lpips_loss(lpips_fn, x, other).item() for other in (x, near, far)]
    assert d[0] == 0 and 0 < d[1] < d[2]

    def features(z):
        h = ((2 * z - 1) - torch.tensor([-0.030, -0.088, -0.188])[:, None, None]) / torch.tensor([0.458, 0.448, 0.450])[
            :, None, None
        ]
        for s in range(1, 6):
            h = getattr(lpips_fn.net, f"slice{s}")(h)
            yield h / (h.norm(dim=1, keepdim=True) + 1e-10)

    layers = zip(features(x), features(far), strict=True)
    by_hand = sum((lpips_fn.lins[i].model[-1].weight * (a - b) ** 2).sum(1).mean() for i, (a, b) in enumerate(layers))
    assert d[2] == pytest.approx(by_hand.item(), rel=1e-4)
    assert lpips_fn.net.slice1[0].weight.std() > 0.05  # the shipped AlexNet, not random numbers
    assert not any(p.requires_grad for p in lpips_fn.parameters())


def test_eq6_lpips_gives_a_gradient_to_the_picture():
    x = torch.rand(1, 3, 64, 64, requires_grad=True)
    losses.lpips_loss(losses.load_lpips(), x, torch.rand(1, 3, 64, 64)).backward()
    assert x.grad.abs().sum() > 0


def test_missing_features_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(losses, "LPIPS_FEATURES", tmp_path / "lpips_alex.safetensors")
    with pytest.raises(FileNotFoundError, match="lpips_alex"):
        losses.load_lpips()
