"""Sec. 3.3.1: the zero-initialised linear is the identity at the start and learns all the same."""

import pytest
import torch

from adapter import SemanticAdapter


def test_sec331_zero_at_the_start_with_the_papers_size():
    adapter = SemanticAdapter()
    assert sum(p.numel() for p in adapter.parameters()) == 768 * 768 + 768 == 590_592
    out = adapter(torch.randn(2, 768))
    assert out.shape == (2, 1, 768) and not out.any()


def test_sec331_gradient_of_the_zero_linear_is_the_outer_product():
    """dL/dW = (dL/dc) e^T by hand: not zero at W = 0, since the token is not zero."""
    adapter = SemanticAdapter(5, 4)
    e, g = torch.randn(3, 5), torch.randn(3, 77, 4)
    (adapter(e).expand(-1, 77, -1) * g).sum().backward()
    assert torch.allclose(adapter.linear.weight.grad, g.sum(1).T @ e, atol=1e-5)
    assert torch.allclose(adapter.linear.bias.grad, g.sum((0, 1)), atol=1e-5)


def learned(adapter, steps=60):
    """Fits a known linear map; returns how much of the loss is left."""
    torch.manual_seed(0)
    truth, e = torch.randn(4, 5), torch.randn(64, 5)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.4)
    first = None
    for _ in range(steps):
        loss = ((adapter(e)[:, 0] - e @ truth.T) ** 2).mean()
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item() / first


def test_sec331_zero_linear_learns_while_gate_and_projection_both_at_zero_never_move():
    assert learned(SemanticAdapter(5, 4)) < 0.02
    gate = SemanticAdapter(5, 4, "scalar-gate")
    assert learned(gate) < 0.9 and gate.gate.item() != 0  # the gate moves first, then the projection
    both = SemanticAdapter(5, 4, "scalar-gate")
    torch.nn.init.zeros_(both.linear.weight)
    torch.nn.init.zeros_(both.linear.bias)
    assert learned(both) == 1 and not any(p.any() for p in both.parameters())


def test_kinds():
    assert not list(SemanticAdapter(5, 4, "none").parameters())
    assert not SemanticAdapter(5, 4, "none")(torch.randn(2, 5)).any()
    with pytest.raises(ValueError, match="zero-linear"):
        SemanticAdapter(5, 4, "gate")
