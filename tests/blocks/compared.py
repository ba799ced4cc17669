"""Two ways to compute one thing, held against each other in float64."""

import torch

__all__ = ["draw", "same"]


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def same(ours, truth, inputs):
    """Values and gradients of two ways to compute one thing."""
    torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-10)
    weight = torch.linspace(-1, 1, truth.numel(), dtype=truth.dtype).view_as(truth)
    for a, b in zip(
        torch.autograd.grad((ours * weight).sum(), inputs, retain_graph=True),
        torch.autograd.grad((truth * weight).sum(), inputs, retain_graph=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
