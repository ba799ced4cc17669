"""Window attention that addresses windows in the map, in Triton on CUDA; elsewhere the reference.

The op is `torch.ops.tokenmix.window_attention`; its gradients are an op as well. On the CPU the reference stays:
torch's fused attention on copies of the windows was as fast as a C++ kernel without copies. The Triton kernels have
been run by Triton's interpreter and compiled for GPUs, but no GPU was at hand to run them on.
Source: Swin Transformer (Liu et al. 2021), equation 4; MixFormer (Chen et al. 2022), section 3.1.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from tokenmix.blocks.kernels import window_attention as kernels

__all__ = ["WindowAttention", "reference", "status"]

reference = kernels.window_attention

_TRITON = importlib.util.find_spec("triton") is not None


def status() -> dict[str, tuple[str, str]]:
    """Device -> (which implementation runs there, why not a faster one)."""
    fused = "fused attention on copies"
    return {
        "cpu": (fused, "a kernel without copies was not faster"),
        "cuda": ("Triton", "") if _TRITON else (fused, "triton is not installed"),
    }


@torch.library.custom_op("tokenmix::window_attention", mutates_args=())
def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, heads: int, window: int) -> Tensor:
    """The reference, on devices without a kernel of their own."""
    return reference(q, k, v, bias, heads, window).contiguous()


@torch.library.custom_op("tokenmix::window_attention_backward", mutates_args=())
def _attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, heads: int, window: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the bias; the last is empty where there is no bias."""
    return _gradients(grad, q, k, v, bias, heads, window)


def _gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, heads: int, window: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # With P = softmax(s q k^T + b) and dP = dO v^T: db = dS = P (dP - sum over keys of P dP), dv = P^T dO,
    # dq = s dS k, dk = s dS^T q. Written out, since autograd does not work below the dispatcher's own.
    B, H, W, C = q.shape
    h, w, d = heads, window, q.shape[-1] // heads

    def windows(x: Tensor) -> Tensor:  # (B, H, W, C) -> (B * n, h, w*w, d)
        x = x.reshape(B, H // w, w, W // w, w, h, d).permute(0, 1, 3, 5, 2, 4, 6)
        return x.reshape(-1, h, w * w, d)

    def back(x: Tensor) -> Tensor:
        x = x.reshape(B, H // w, W // w, h, w, w, d).permute(0, 1, 4, 2, 5, 3, 6)
        return x.reshape(B, H, W, C).contiguous()

    q, k, v, grad = (windows(x) for x in (q, k, v, grad))
    scores = (q * d**-0.5) @ k.transpose(-2, -1)
    weights = (scores if bias is None else scores + bias.to(q.dtype)).softmax(-1)
    slopes = grad @ v.transpose(-2, -1)
    slopes = weights * (slopes - (weights * slopes).sum(-1, keepdim=True))
    dbias = q.new_empty(0) if bias is None else slopes.sum(0, keepdim=True).to(bias.dtype)
    dq, dk = slopes @ k * d**-0.5, slopes.transpose(-2, -1) @ q * d**-0.5
    return back(dq), back(dk), back(weights.transpose(-2, -1) @ grad), dbias


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, heads: int, window: int) -> Tensor:
    return q.new_empty(q.shape)


@_attend_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, heads: int, window: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    empty = q.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), empty


def _keep(ctx, inputs, output) -> None:
    q, k, v, bias, ctx.heads, ctx.window = inputs
    ctx.save_for_backward(q, k, v, bias)


def _grads(ctx, grad: Tensor) -> tuple:
    q, k, v, bias = ctx.saved_tensors
    *grads, dbias = _attend_backward(grad, q, k, v, bias, ctx.heads, ctx.window)
    return (*grads, dbias if bias is not None else None, None, None)


_attend.register_autograd(_grads, setup_context=_keep)


@register_flop_formula(torch.ops.tokenmix.window_attention)
def _flops(q_shape, k_shape, v_shape, bias_shape, heads, window, *args, out_shape=None, **kwargs) -> int:
    """torch counts two FLOPs per multiply-add; there are two products of every query with its window."""
    batch, height, width, channels = q_shape
    return 4 * batch * height * width * window**2 * channels


class FastWindowAttention(kernels.WindowAttention):
    """`WindowAttention` through the op. Shifted windows keep the reference, which knows their mask."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.shift:
            return super().forward(q, k, v)
        return _attend(q, k, v, self.bias(), self.heads, self.window)


# What runs where, settled once


if _TRITON:

    @_attend.register_kernel("cuda")
    def _(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, heads: int, window: int) -> Tensor:
        from tokenmix.fast import window_attention_triton as triton

        if q.dtype == torch.float64 or not triton.fits(q, heads, window):
            return reference(q, k, v, bias, heads, window).contiguous()
        return triton.forward(q, k, v, bias, heads, window)

    @_attend_backward.register_kernel("cuda")
    def _(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, heads: int, window: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        from tokenmix.fast import window_attention_triton as triton

        if q.dtype == torch.float64 or not triton.fits(q, heads, window):
            return _gradients(grad, q, k, v, bias, heads, window)
        dq, dk, dv, dbias = triton.backward(grad, q, k, v, bias, heads, window)
        return dq, dk, dv, q.new_empty(0) if bias is None or dbias is None else dbias.to(bias.dtype)


WindowAttention = FastWindowAttention if _TRITON and torch.cuda.is_available() else kernels.WindowAttention
