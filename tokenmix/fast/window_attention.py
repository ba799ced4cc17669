"""Window attention that reads windows where they lie in the map: C++ on the CPU, Triton on CUDA, else the reference.

The ops are `torch.ops.tokenmix.window_attention` and, with one token more that asks in every window,
`torch.ops.tokenmix.abstract_window_attention`; their gradients are ops as well. The Triton kernels have been run by
Triton's interpreter and compiled for GPUs, but no GPU was at hand to run them on.
Source: Swin Transformer (Liu et al. 2021), equation 4; MixFormer (Chen et al. 2022), section 3.1; MAT Transformer (Vo
2023), chapter 4.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from tokenmix.blocks.kernels import window_attention as kernels
from tokenmix.fast.arguments import DTYPES, packed, pointers
from tokenmix.fast.cases import Case
from tokenmix.fast.native import library, missing

__all__ = ["WindowAttention", "abstract_reference", "abstract_window_attention", "cases", "reference", "status"]

reference = kernels.window_attention
abstract_reference = kernels.abstract_window_attention

_NATIVE = library()
_TRITON = importlib.util.find_spec("triton") is not None


def status() -> dict[str, tuple[str, str]]:
    """Device -> (which implementation runs there, why not a faster one)."""
    fused = "fused attention on copies"
    return {
        "cpu": ("C++", "") if _NATIVE else (fused, missing()),
        "cuda": ("Triton", "") if _TRITON else (fused, "triton is not installed"),
    }


def cases(batch: int) -> Iterator[Case]:
    """MixFormer-B4's and MAT-3's maps at 224x224; q, k and v are thirds of a wider tensor."""
    for side, channels, heads in ((56, 32, 4), (28, 64, 8), (14, 128, 16), (7, 256, 32)):
        inputs = *torch.randn(batch, side, side, 3 * channels).chunk(3, -1), torch.randn(1, heads, 49, 49)
        fast, plain = (partial(f, heads=heads, window=7, shift=0) for f in (_attend, reference))
        yield Case(f"{batch}x{side}x{side}x{channels}, {heads} heads", inputs, fast, plain)
    for side, channels, heads in ((14, 144, 8), (7, 288, 16)):
        inputs = *torch.randn(batch, side, side, 3 * channels).chunk(3, -1), torch.randn(channels)
        fast, plain = (partial(f, heads=heads, window=7) for f in (_attend_abstract, abstract_reference))
        yield Case(f"{batch}x{side}x{side}x{channels}, {heads} heads, abstract tokens", inputs, fast, plain)


# The ops. On devices without a kernel of their own they are the reference.


@torch.library.custom_op("tokenmix::window_attention", mutates_args=())
def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, heads: int, window: int, shift: int) -> Tensor:
    return reference(q, k, v, bias, heads, window, shift).contiguous()


@torch.library.custom_op("tokenmix::window_attention_backward", mutates_args=())
def _attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, heads: int, window: int, shift: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the bias; the last is empty where there is no bias."""
    return _gradients(grad, None, q, k, v, bias, None, heads, window, shift)


@torch.library.custom_op("tokenmix::abstract_window_attention", mutates_args=())
def _attend_abstract(
    q: Tensor, k: Tensor, v: Tensor, abstract: Tensor, heads: int, window: int
) -> tuple[Tensor, Tensor]:
    y, tokens = abstract_reference(q, k, v, abstract, heads, window)
    return y.contiguous(), tokens.contiguous()


@torch.library.custom_op("tokenmix::abstract_window_attention_backward", mutates_args=())
def _attend_abstract_backward(
    grad: Tensor, grad_tokens: Tensor, q: Tensor, k: Tensor, v: Tensor, abstract: Tensor, heads: int, window: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the abstract token."""
    return _gradients(grad, grad_tokens, q, k, v, None, abstract, heads, window, 0)


def _gradients(
    grad: Tensor, grad_tokens: Tensor | None, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None,
    abstract: Tensor | None, heads: int, window: int, shift: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Those of q, k, v, and of the bias or the abstract token."""
    # With P = softmax(s q k^T + b) and dP = dO v^T: db = dS = P (dP - sum over keys of P dP), dv = P^T dO,
    # dq = s dS k, dk = s dS^T q. Written out, since autograd does not work below the dispatcher's own.
    B, H, W, C = q.shape
    h, scale = heads, (C // heads) ** -0.5
    q, k, v, grad = (kernels.split_windows(x, h, window) for x in (q, k, v, grad))  # (B, n, h, w*w, d)
    if abstract is not None and grad_tokens is not None:
        own = (B, q.shape[1], h, 1, C // h)
        q = torch.cat([q, abstract.to(q.dtype).view(h, 1, -1).expand(own)], dim=3)
        grad = torch.cat([grad, grad_tokens.reshape(own)], dim=3)
    scores = (q * scale) @ k.transpose(-2, -1)
    if bias is not None:
        scores = scores + bias.to(q.dtype)
    if shift > 0 and max(H, W) > window:
        scores = scores + kernels.seam_mask(H, W, window, shift, q)
    weights = scores.softmax(-1)
    slopes = grad @ v.transpose(-2, -1)
    slopes = weights * (slopes - (weights * slopes).sum(-1, keepdim=True))
    dq, dk, dv = slopes @ k * scale, slopes.transpose(-2, -1) @ q * scale, weights.transpose(-2, -1) @ grad
    last = q.new_empty(0)
    if bias is not None:
        last = slopes.sum((0, 1)).unsqueeze(0).to(bias.dtype)
    elif abstract is not None:
        last = dq[..., -1, :].sum((0, 1)).flatten().to(abstract.dtype)
        dq = dq[..., :-1, :]
    return *(kernels.join_windows(x, H, W, window).contiguous() for x in (dq, dk, dv)), last  # type: ignore[return-value]


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, heads: int, window: int, shift: int) -> Tensor:
    return q.new_empty(q.shape)


@_attend_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, heads: int, window: int, shift: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    last = q.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), last


@_attend_abstract.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, abstract: Tensor, heads: int, window: int) -> tuple[Tensor, Tensor]:
    B, H, W, C = q.shape
    return q.new_empty(q.shape), q.new_empty(B, (H // window) * (W // window), C)


@_attend_abstract_backward.register_fake
def _(
    grad: Tensor, grad_tokens: Tensor, q: Tensor, k: Tensor, v: Tensor, abstract: Tensor, heads: int, window: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), abstract.new_empty(abstract.shape)


def _keep(ctx, inputs, output) -> None:
    q, k, v, bias, ctx.heads, ctx.window, ctx.shift = inputs
    ctx.save_for_backward(q, k, v, bias)


def _grads(ctx, grad: Tensor) -> tuple:
    q, k, v, bias = ctx.saved_tensors
    *grads, dbias = _attend_backward(grad, q, k, v, bias, ctx.heads, ctx.window, ctx.shift)
    return (*grads, dbias if bias is not None else None, None, None, None)


_attend.register_autograd(_grads, setup_context=_keep)


def _keep_abstract(ctx, inputs, output) -> None:
    q, k, v, abstract, ctx.heads, ctx.window = inputs
    ctx.save_for_backward(q, k, v, abstract)


def _grads_abstract(ctx, grad: Tensor, grad_tokens: Tensor) -> tuple:
    return (*_attend_abstract_backward(grad, grad_tokens, *ctx.saved_tensors, ctx.heads, ctx.window), None, None)


_attend_abstract.register_autograd(_grads_abstract, setup_context=_keep_abstract)


@register_flop_formula(torch.ops.tokenmix.window_attention)
def _flops(q_shape, k_shape, v_shape, bias_shape, heads, window, shift, *args, out_shape=None, **kwargs) -> int:
    """torch counts two FLOPs per multiply-add; there are two products of every query with its window."""
    batch, height, width, channels = q_shape
    return 4 * batch * height * width * window**2 * channels


@register_flop_formula(torch.ops.tokenmix.abstract_window_attention)
def _flops_abstract(q_shape, k_shape, v_shape, abstract_shape, heads, window, *args, out_shape=None, **kwargs) -> int:
    """One query more in every window."""
    batch, height, width, channels = q_shape
    return 4 * batch * (height * width + (height // window) * (width // window)) * window**2 * channels


# C++. A function for both ops: there is a bias, or an abstract token, or neither.


def _numbers(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, grad: Tensor, heads: int, window: int, shift: int
) -> bytes:
    """As `Call` in window_attention.cpp reads them."""
    B, H, W, C = q.shape
    return packed(
        B, heads, C // heads, shift, torch.get_num_threads(), *((0, 0) if bias is None else bias.stride()[1::2]),
        H // window, W // window, window, window, window, window,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad.stride()[:3],
    )  # fmt: skip


def _readable(
    maps: tuple[Tensor, ...], bias: Tensor | None, abstract: Tensor | None, heads: int, window: int
) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
    """What the C++ code can read: channels side by side, as thirds of a wider tensor have them, and the bias with the
    queries of a key side by side."""
    shape, dtype, pairs = maps[0].shape, maps[0].dtype, (1, heads, window**2, window**2)
    _, H, W, C = shape
    if [x.shape for x in maps].count(shape) < len(maps) or H % window or W % window or C % heads:
        shapes = ", ".join(str(tuple(x.shape)) for x in maps)
        raise ValueError(f"maps of {shapes} are not of one shape that windows of {window} and {heads} heads divide")
    if (bias is not None and bias.shape != pairs) or (abstract is not None and abstract.shape != (C,)):
        raise ValueError(f"a bias is of {pairs} and an abstract token of {C} channels here")
    if bias is not None and ((bias := bias.to(dtype)).stride(2) != 1):
        bias = bias.transpose(2, 3).contiguous().transpose(2, 3)
    if abstract is not None:
        abstract = abstract.to(dtype).contiguous()
    dense = [x if x.stride(3) == 1 and x.dtype is dtype else x.to(dtype).contiguous() for x in maps]
    return dense, bias, abstract


def _native_forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, abstract: Tensor | None, heads: int, window: int, shift: int
) -> tuple[Tensor, Tensor | None]:
    (q, k, v), bias, abstract = _readable((q, k, v), bias, abstract, heads, window)
    B, H, W, C = q.shape
    y = torch.empty(q.shape, dtype=q.dtype)
    tokens = None if abstract is None else y.new_empty(B, (H // window) * (W // window), C)
    if y.numel():
        run = getattr(_NATIVE, f"window_attention_forward_{DTYPES[q.dtype]}")
        run(*pointers(q, k, v, abstract, bias, y, tokens), _numbers(q, k, v, bias, y, heads, window, shift))
    return y, tokens


def _native_backward(
    grad: Tensor, grad_tokens: Tensor | None, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None,
    abstract: Tensor | None, heads: int, window: int, shift: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    (q, k, v, grad), table, token = _readable((q, k, v, grad), bias, abstract, heads, window)
    dq, dk, dv = (torch.empty(q.shape, dtype=q.dtype) for _ in range(3))
    dbias = None if bias is None else torch.zeros(bias.shape, dtype=q.dtype)
    if grad_tokens is not None:
        grad_tokens = grad_tokens.to(q.dtype).contiguous()
    dtoken = None if grad_tokens is None else torch.empty_like(grad_tokens)  # of every window
    if q.numel():
        run = getattr(_NATIVE, f"window_attention_backward_{DTYPES[q.dtype]}")
        run(
            *pointers(q, k, v, token, table, grad, grad_tokens, dq, dk, dv, dtoken, dbias),
            _numbers(q, k, v, table, grad, heads, window, shift),
        )
    last = q.new_empty(0)
    if bias is not None and dbias is not None:
        last = dbias.to(bias.dtype)
    elif abstract is not None and dtoken is not None:
        last = dtoken.sum((0, 1)).to(abstract.dtype)
    return dq, dk, dv, last


class FastWindowAttention(kernels.WindowAttention):
    """`WindowAttention` through the op."""

    def prepare_for_inference(self) -> None:
        super().prepare_for_inference()
        if self.gathered is not None:  # as the C++ code reads it
            self.gathered = self.gathered.transpose(2, 3).contiguous().transpose(2, 3)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _attend(q, k, v, self.bias(), self.heads, self.window, self.shift)


# What runs where, settled once


if _NATIVE is not None:

    @_attend.register_kernel("cpu")
    def _(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, heads: int, window: int, shift: int) -> Tensor:
        if q.dtype not in DTYPES:
            return reference(q, k, v, bias, heads, window, shift).contiguous()
        return _native_forward(q, k, v, bias, None, heads, window, shift)[0]

    @_attend_backward.register_kernel("cpu")
    def _(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, heads: int, window: int, shift: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        run = _native_backward if q.dtype in DTYPES else _gradients
        return run(grad, None, q, k, v, bias, None, heads, window, shift)

    @_attend_abstract.register_kernel("cpu")
    def _(q: Tensor, k: Tensor, v: Tensor, abstract: Tensor, heads: int, window: int) -> tuple[Tensor, Tensor | None]:
        if q.dtype not in DTYPES:
            y, tokens = abstract_reference(q, k, v, abstract, heads, window)
            return y.contiguous(), tokens.contiguous()
        return _native_forward(q, k, v, None, abstract, heads, window, 0)

    @_attend_abstract_backward.register_kernel("cpu")
    def _(
        grad: Tensor, grad_tokens: Tensor, q: Tensor, k: Tensor, v: Tensor, abstract: Tensor, heads: int, window: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        run = _native_backward if q.dtype in DTYPES else _gradients
        return run(grad, grad_tokens, q, k, v, None, abstract, heads, window, 0)


if _TRITON:

    @_attend.register_kernel("cuda")
    def _(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, heads: int, window: int, shift: int) -> Tensor:
        from tokenmix.fast import window_attention_triton as triton

        if q.dtype == torch.float64 or not triton.fits(q, heads, window):
            return reference(q, k, v, bias, heads, window, shift).contiguous()
        return triton.forward(q, k, v, bias, None, heads, window, shift)[0]

    @_attend_backward.register_kernel("cuda")
    def _(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, heads: int, window: int, shift: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        from tokenmix.fast import window_attention_triton as triton

        if q.dtype == torch.float64 or not triton.fits(q, heads, window):
            return _gradients(grad, None, q, k, v, bias, None, heads, window, shift)
        dq, dk, dv, dbias = triton.backward(grad, None, q, k, v, bias, None, heads, window, shift)
        return dq, dk, dv, q.new_empty(0) if bias is None or dbias is None else dbias.to(bias.dtype)

    @_attend_abstract.register_kernel("cuda")
    def _(q: Tensor, k: Tensor, v: Tensor, abstract: Tensor, heads: int, window: int) -> tuple[Tensor, Tensor | None]:
        from tokenmix.fast import window_attention_triton as triton

        if q.dtype == torch.float64 or not triton.fits(q, heads, window):
            y, tokens = abstract_reference(q, k, v, abstract, heads, window)
            return y.contiguous(), tokens.contiguous()
        return triton.forward(q, k, v, None, abstract, heads, window, 0)

    @_attend_abstract_backward.register_kernel("cuda")
    def _(
        grad: Tensor, grad_tokens: Tensor, q: Tensor, k: Tensor, v: Tensor, abstract: Tensor, heads: int, window: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        from tokenmix.fast import window_attention_triton as triton

        if q.dtype == torch.float64 or not triton.fits(q, heads, window):
            return _gradients(grad, grad_tokens, q, k, v, None, abstract, heads, window, 0)
        dq, dk, dv, dtoken = triton.backward(grad, grad_tokens, q, k, v, None, abstract, heads, window, 0)
        assert dtoken is not None
        return dq, dk, dv, dtoken.to(abstract.dtype)


_FAST = _NATIVE is not None or (_TRITON and torch.cuda.is_available())
WindowAttention = FastWindowAttention if _FAST else kernels.WindowAttention
abstract_window_attention = _attend_abstract if _FAST else abstract_reference
