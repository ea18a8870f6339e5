"""Eq. 7-9 against closed forms: a point mass, gradients by hand and by finite differences."""

import pytest
import torch

import sgcl


def generators(n, seed=0):
    return [torch.Generator().manual_seed(seed + i) for i in range(n)]


def test_eq7_perturbation_by_numpy():
    x, eps = torch.rand(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    t = torch.tensor([0.05, 0.25])
    x_t = sgcl.perturb(x, t, eps).numpy()
    for i, ti in enumerate((0.05, 0.25)):
        assert x_t[i] == pytest.approx(ti * x[i].numpy() + (1 - ti) * eps[i].numpy(), abs=1e-6)


def test_eq7_ends_are_source_and_picture():
    x, eps = torch.rand(1, 3, 4, 4), torch.randn(1, 3, 4, 4)
    assert torch.equal(sgcl.perturb(x, torch.zeros(1), eps), eps)
    assert torch.equal(sgcl.perturb(x, torch.ones(1), eps), x)


def test_eq7_bands_of_the_stages_and_statistics():
    assert sgcl.BANDS == {"A": (0.05, 0.25), "B": (0.05, 0.20)}
    t, eps = sgcl.draw(sgcl.BANDS["B"], (3, 8, 8), generators(2000))
    assert 0.05 <= t.min() < 0.051 and 0.199 < t.max() <= 0.20
    assert t.mean().item() == pytest.approx(0.125, abs=3e-3)
    assert eps.mean().abs() < 0.01 and eps.std().item() == pytest.approx(1, abs=0.01)
    with pytest.raises(ValueError, match="band"):
        sgcl.draw((0.3, 0.2), (3, 8, 8), generators(1))


def test_eq7_numbers_of_a_picture_do_not_depend_on_the_batch():
    t, eps = sgcl.draw((0.05, 0.25), (3, 8, 8), generators(4))
    t_2, eps_2 = sgcl.draw((0.05, 0.25), (3, 8, 8), generators(1, seed=2))
    assert torch.equal(t[2:3], t_2) and torch.equal(eps[2:3], eps_2)


def test_eq7_mmse_source_is_the_start_of_the_teachers_path():
    x_mmse, eps = torch.rand(1, 3, 4, 4), torch.randn(1, 3, 4, 4)
    source = sgcl.mmse_source(x_mmse, eps, 0.1)
    assert ((source - x_mmse) / 0.1).numpy() == pytest.approx(eps.numpy(), abs=1e-5)


def test_eq8_clean_estimate_is_exact_for_a_point_mass():
    """If all pictures are mu, v(x_t, t) = (mu - x_t) / (1 - t): one straight step from any x_t ends in mu."""
    mu = torch.rand(1, 3, 4, 4)
    seen = []

    def velocity(x_t, t):
        seen.append(t)
        return (mu - x_t) / (1 - t)[:, None, None, None]

    t = torch.tensor([0.1, 0.2])
    x_clean = sgcl.clean_estimate(torch.randn(2, 3, 4, 4), t, velocity)
    assert torch.allclose(x_clean, mu.expand(2, -1, -1, -1), atol=1e-6)
    assert torch.equal(seen[0], t)


def test_eq8_clean_estimate_is_clamped():
    x_clean = sgcl.clean_estimate(torch.zeros(1, 3, 4, 4), torch.tensor([0.1]), lambda x, t: torch.full_like(x, 5.0))
    assert torch.equal(x_clean, torch.ones(1, 3, 4, 4))
    x_clean = sgcl.clean_estimate(torch.zeros(1, 3, 4, 4), torch.tensor([0.1]), lambda x, t: torch.full_like(x, -5.0))
    assert torch.equal(x_clean, torch.zeros(1, 3, 4, 4))


def test_eq9_gradient_is_two_times_the_difference_over_n():
    """The stop-gradient: x_clean depends on x_hat through x_t and a velocity with parameters, yet no gradient goes there."""
    torch.manual_seed(0)
    net = torch.nn.Conv2d(3, 3, 3, padding=1)
    x_hat = torch.rand(2, 3, 6, 6, requires_grad=True)
    t, eps = sgcl.draw((0.05, 0.25), (3, 6, 6), generators(2))
    loss = sgcl.sgcl_loss(x_hat, lambda x, t: net(x), t, eps)
    loss.backward()
    tb = t[:, None, None, None]
    x_t = tb * x_hat.detach() + (1 - tb) * eps
    x_clean = (x_t + (1 - tb) * net(x_t).detach()).clamp(0, 1)
    expected = 2 * (x_hat.detach() - x_clean) / x_hat.numel()
    assert torch.allclose(x_hat.grad, expected, atol=1e-8)
    assert loss.item() == pytest.approx(((x_hat.detach() - x_clean) ** 2).mean().item(), rel=1e-6)
    assert net.weight.grad is None


def test_eq9_pulls_the_picture_to_the_teachers_mode():
    mu = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    x = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(2)).requires_grad_()
    distances = []
    for step in range(40):
        t, eps = sgcl.draw((0.05, 0.25), (3, 4, 4), generators(1, seed=step))
        loss = sgcl.sgcl_loss(x, lambda x_t, t: (mu - x_t) / (1 - t)[:, None, None, None], t, eps)
        (g,) = torch.autograd.grad(loss, x)
        x = (x - 5 * g).detach().requires_grad_()
        distances.append((x - mu).abs().max().item())
    assert distances[-1] < 1e-2 and distances == sorted(distances, reverse=True)
