"""Talking-heads attention as a torch custom op: C++ on the CPU where it was built, Triton on CUDA, else the reference.

The op is `torch.ops.tokenmix.talking_heads_attention`; its gradients are an op as well, which computes the weights of
attention again. Neither holds the scores of all pairs: the C++ kernel has those of a block of queries at a time, the
Triton kernels those of a tile of queries and keys.
Source: Talking-Heads Attention (Shazeer et al. 2020), section 3.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from tokenmix.blocks.kernels import talking_heads as kernels
from tokenmix.fast.arguments import DTYPES, exact, integers, pointers
from tokenmix.fast.cases import Case
from tokenmix.fast.native import library, missing

__all__ = ["TalkingHeadsAttention", "cases", "reference", "status"]

reference = kernels.talking_heads_attention

_NATIVE = library()
_TRITON = importlib.util.find_spec("triton") is not None


def status() -> dict[str, tuple[str, str]]:
    """Device -> (which implementation runs there, why not a faster one)."""
    return {
        "cpu": ("C++", "") if _NATIVE else ("products of whole matrices", missing()),
        "cuda": ("Triton", "") if _TRITON else ("products of whole matrices", "triton is not installed"),
    }


def cases(batch: int) -> Iterator[Case]:
    """PartialFormer-B1's foregrounds at 224x224, joined by the query token; q, k and v are thirds of a wider tensor."""
    for tokens, channels, heads in ((50, 32, 2), (50, 64, 4), (40, 128, 8), (21, 256, 16)):
        qkv = torch.randn(batch, tokens, 3 * channels).chunk(3, -1)
        maps = list(kernels.TalkingHeadsAttention(heads, 2 * heads).parameters())
        yield Case(f"{batch}x{tokens}x{channels}, {heads} heads", (*qkv, *maps), _run, reference)


@torch.library.custom_op("tokenmix::talking_heads_attention", mutates_args=())
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    logit_mixing: Tensor,
    logit_bias: Tensor,
    weight_mixing: Tensor,
    weight_bias: Tensor,
) -> Tensor:
    """The reference, on devices without a kernel of their own."""
    return _reference_forward(q, k, v, logit_mixing, logit_bias, weight_mixing, weight_bias)


def _reference_forward(q: Tensor, k: Tensor, v: Tensor, *maps: Tensor) -> Tensor:
    dtype = exact(q, k, v, *maps)
    return reference(*(t.to(dtype) for t in (q, k, v, *maps))).to(v.dtype).contiguous()


@torch.library.custom_op("tokenmix::talking_heads_attention_backward", mutates_args=())
def _attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    logit_mixing: Tensor,
    logit_bias: Tensor,
    weight_mixing: Tensor,
    weight_bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, logit_mixing, weight_mixing and weight_bias; that of logit_bias is zero."""
    return _reference_backward(grad, q, k, v, logit_mixing, logit_bias, weight_mixing, weight_bias)


def _reference_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    logit_mixing: Tensor,
    logit_bias: Tensor,
    weight_mixing: Tensor,
    weight_bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    # With S = s q k^T, W = softmax(P_l S + b_l), A = P_w W + b_w and dA = dO v^T: dW = P_w^T dA, dL = W (dW - sum over
    # keys of W dW), dS = P_l^T dL, dq = s dS k, dk = s dS^T q, dv = A^T dO. Written out, since autograd does not work
    # below the dispatcher's own.
    inputs = (q, k, v, logit_mixing, weight_mixing, weight_bias)
    dtype = exact(*inputs)
    h = len(weight_mixing)
    scale = (q.shape[-1] // h) ** -0.5
    q, k, v, grad = (t.to(dtype).unflatten(-1, (h, -1)).transpose(1, 2) for t in (q, k, v, grad))
    to_logits, to_weights = logit_mixing.to(dtype), weight_mixing.to(dtype)
    scores = scale * q @ k.transpose(-2, -1)
    inner = (torch.einsum("gh,bhnm->bgnm", to_logits, scores) + logit_bias.to(dtype)[:, None, None]).softmax(-1)
    weights = torch.einsum("hg,bgnm->bhnm", to_weights, inner) + weight_bias.to(dtype)[:, None, None]
    slopes = grad @ v.transpose(-2, -1)
    dv = weights.transpose(-2, -1) @ grad
    d_weight_mixing, d_weight_bias = torch.einsum("bhnm,bgnm->hg", slopes, inner), slopes.sum((0, 2, 3))
    slopes = torch.einsum("hg,bhnm->bgnm", to_weights, slopes)
    slopes = inner * (slopes - (inner * slopes).sum(-1, keepdim=True))
    d_logit_mixing = torch.einsum("bgnm,bhnm->gh", slopes, scores)
    slopes = scale * torch.einsum("gh,bgnm->bhnm", to_logits, slopes)
    dq, dk, dv = (t.transpose(1, 2).flatten(2) for t in (slopes @ k, slopes.transpose(-2, -1) @ q, dv))
    grads = (dq, dk, dv, d_logit_mixing, d_weight_mixing, d_weight_bias)
    return tuple(x.to(t.dtype).contiguous() for x, t in zip(grads, inputs, strict=True))  # type: ignore[return-value]


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *maps: Tensor) -> Tensor:
    return v.new_empty(*q.shape[:2], v.shape[2])


@_attend_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return tuple(t.new_empty(t.shape) for t in (q, k, v, a, c, d))  # type: ignore[return-value]


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _grads(ctx, grad: Tensor) -> tuple[Tensor, ...]:
    inputs = ctx.saved_tensors
    dq, dk, dv, to_logits, to_weights, bias = _attend_backward(grad, *inputs)
    return dq, dk, dv, to_logits, torch.zeros_like(inputs[4]), to_weights, bias


_attend.register_autograd(_grads, setup_context=_keep)


@register_flop_formula(torch.ops.tokenmix.talking_heads_attention)
def _flops(q_shape, k_shape, v_shape, logit_mixing_shape, *args, out_shape=None, **kwargs) -> int:
    """torch counts two FLOPs per multiply-add: two products of queries and keys, and two maps at every pair."""
    batch, queries, channels = q_shape
    inner, heads = logit_mixing_shape
    return 2 * batch * queries * k_shape[1] * (channels + v_shape[2] + 2 * inner * heads)


class FastTalkingHeadsAttention(kernels.TalkingHeadsAttention):
    """`TalkingHeadsAttention` through the op."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _attend(q, k, v, self.logit_mixing, self.logit_bias, self.weight_mixing, self.weight_bias)


# C++


def _dense(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor whose channels lie side by side: thirds of a wider one do, and are not copied."""
    x = x.to(dtype)
    return x if x.stride(-1) == 1 else x.contiguous()


def _prepared(q: Tensor, k: Tensor, v: Tensor, maps: tuple[Tensor, ...]) -> tuple[torch.dtype, list[Tensor], list]:
    """What the C++ code reads: the dtype to compute in, tensors, and sizes with strides and the number of threads."""
    dtype = exact(q, k, v, *maps)
    tokens = [_dense(t, dtype) for t in (q, k, v)]
    weights = [t.to(dtype).contiguous() for t in maps]
    inner, heads = weights[0].shape
    (B, N, C), (_, M, values) = q.shape, v.shape
    strides = [step for t in tokens for step in t.stride()[:2]]
    sizes = integers(B, N, M, heads, inner, C // heads, values // heads, *strides)
    return dtype, [*tokens, *weights], [*sizes, torch.get_num_threads()]


def _native_forward(q: Tensor, k: Tensor, v: Tensor, *maps: Tensor) -> Tensor:
    assert _NATIVE is not None
    dtype, inputs, sizes = _prepared(q, k, v, maps)
    if k.shape[1] == 0:  # attention to no tokens
        return v.new_zeros(*q.shape[:2], v.shape[2])
    y = torch.empty(*q.shape[:2], v.shape[2], dtype=dtype)
    if y.numel():
        getattr(_NATIVE, f"talking_heads_forward_{DTYPES[dtype]}")(*pointers(*inputs, y), *sizes)
    return y.to(v.dtype)


def _native_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *maps: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    assert _NATIVE is not None
    dtype, inputs, sizes = _prepared(q, k, v, maps)
    inner, heads = maps[0].shape
    new = torch.empty if grad.numel() and k.shape[1] else torch.zeros
    grads = [new(t.shape, dtype=dtype) for t in (q, k, v)]
    parts = [inner * heads, heads * inner, heads]
    of_maps = new(len(q), sum(parts), dtype=dtype)
    if new is torch.empty:
        grad = grad.to(dtype).contiguous()  # named, so that it lives until the kernel has run
        run = getattr(_NATIVE, f"talking_heads_backward_{DTYPES[dtype]}")
        run(*pointers(*inputs, grad, *grads, of_maps), *sizes)
    logits, weights, bias = of_maps.sum(0).split(parts)
    dq, dk, dv = (g.to(t.dtype) for g, t in zip(grads, (q, k, v), strict=True))
    return (
        dq,
        dk,
        dv,
        logits.view(inner, heads).to(maps[0].dtype, copy=True),
        weights.view(heads, inner).to(maps[2].dtype, copy=True),
        bias.to(maps[3].dtype, copy=True),
    )


# Triton


def _triton_forward(q: Tensor, k: Tensor, v: Tensor, *maps: Tensor) -> Tensor:
    from tokenmix.fast import talking_heads_triton

    if exact(q, k, v, *maps) == torch.float64 or not talking_heads_triton.fits(q, v, maps[0]):
        return _reference_forward(q, k, v, *maps)
    return talking_heads_triton.forward(q, k, v, *maps)


def _triton_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *maps: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from tokenmix.fast import talking_heads_triton

    if exact(q, k, v, *maps) == torch.float64 or not talking_heads_triton.fits(q, v, maps[0]):
        return _reference_backward(grad, q, k, v, *maps)
    dq, dk, dv, logits, weights, bias = talking_heads_triton.backward(grad, q, k, v, *maps)
    return dq, dk, dv, logits.to(maps[0].dtype), weights.to(maps[2].dtype), bias.to(maps[3].dtype)


# What runs where, settled once


if _NATIVE is not None:
    _attend.register_kernel("cpu")(_native_forward)
    _attend_backward.register_kernel("cpu")(_native_backward)

if _TRITON:
    _attend.register_kernel("cuda")(_triton_forward)
    _attend_backward.register_kernel("cuda")(_triton_backward)

# Where no device has a kernel, the reference itself: autograd goes through it without computing it a second time.
_IS_FAST = _NATIVE is not None or (_TRITON and torch.cuda.is_available())
_run = _attend if _IS_FAST else reference
TalkingHeadsAttention = FastTalkingHeadsAttention if _IS_FAST else kernels.TalkingHeadsAttention
