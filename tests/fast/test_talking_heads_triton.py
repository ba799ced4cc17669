"""Talking-heads attention on the GPU against the reference: values, all gradients, strides, dtypes."""

import os
import subprocess
import sys

import pytest
import torch

from tests.fast.test_talking_heads import drawn, truth

pytest.importorskip("triton")

from tokenmix.fast import talking_heads_triton as fast

# As in test_talking_heads: fewer and more queries and keys than a tile, heads that are no power of two.
CASES = [(2, 5, 7, 3, 5, 4, 4), (1, 17, 40, 5, 3, 12, 20), (2, 1, 1, 1, 1, 1, 1), (1, 20, 21, 17, 2, 3, 3)]
TOLERANCE = {torch.float32: 5e-6, torch.float16: 1e-2, torch.bfloat16: 4e-2}


def results(inputs, grad):
    return fast.forward(*inputs), *fast.backward(grad, *inputs)


def check(inputs, grad, device):
    ours = results([t.to(device) for t in inputs], grad.to(device))
    for mine, expected in zip(ours, truth(inputs, grad), strict=True):
        assert mine.shape == expected.shape and mine.is_contiguous()
        difference = (mine.cpu().double() - expected).abs().max().item()
        assert difference <= TOLERANCE[inputs[0].dtype] * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("case", CASES)
def test_kernels_equal_the_reference(device, case):
    check(*drawn(*case), device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_computed_in_float32(device, dtype):
    check(*drawn(1, 6, 9, 3, 4, 5, 5, dtype), device)


def test_strided_input_is_read_right(device):
    inputs, grad = drawn(2, 6, 9, 2, 3, 4, 4)
    q, k, v = inputs[:3]
    apart = q.permute(0, 2, 1).contiguous().permute(0, 2, 1)
    turned = k.permute(1, 0, 2).contiguous().permute(1, 0, 2)
    maps = (inputs[3].t().contiguous().t(), inputs[4], inputs[5].t().contiguous().t(), inputs[6])
    check((apart, turned, v[:1].expand_as(v), *maps), torch.ones(()).expand_as(grad), device)


def test_every_element_is_written_and_results_do_not_change(device, monkeypatch):
    """Memory that is only reserved holds NaN here."""
    inputs, grad = drawn(2, 17, 18, 3, 5, 4, 4)
    inputs, grad = [t.to(device) for t in inputs], grad.to(device)
    first = results(inputs, grad)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        second = results(inputs, grad)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(a.isfinite().all() and torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("batch", "queries", "keys"), [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty_rows_give_zeros(device, batch, queries, keys):
    inputs, grad = drawn(batch, queries, keys, 2, 3, 4, 4)
    found = results([t.to(device) for t in inputs], grad.to(device))
    assert found[0].shape == grad.shape and all(not t.any() for t in found)


def test_large_scores_do_not_overflow(device):
    inputs, grad = drawn(1, 5, 6, 2, 3, 4, 4)
    whole = [(30 * t).round() for t in inputs[:2]]
    check((*whole, inputs[2], *(t.round() for t in inputs[3:])), grad, device)


def test_whether_tiles_fit_is_told(device):
    """Four heads do on every GPU, 256 of 256 channels on none."""
    for heads, channels, expected in ((4, 64, True), (256, 65536, device == "cpu")):
        x, maps = torch.empty(1, 1, channels, device=device), torch.empty(2 * heads, heads, device=device)
        assert fast.fits(x, x, maps) == expected


def test_kernels_compile_for_a_gpu():
    """Here without one: what the interpreter lets pass may be no sound program."""
    code = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from tokenmix.fast import talking_heads_triton as kernels
constants = dict(H=4, G=8, D=16, E=16, SCALE=0.25, BH=16, BG=16, BD=16, BE=16, BN=16, BM=16)
integers = {"N", "M"} | {f"{letter}_{i}" for letter in "gqkv" for i in (0, 1)}
for kernel in (kernels._forward, kernels._backward_queries, kernels._backward_keys):
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else "i32" if n in integers else "*fp32" for n in names}
    places = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, places)
    triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"num_warps": 8, "num_stages": 1})
print("compiled")
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "compiled", done.stderr[-3000:]
