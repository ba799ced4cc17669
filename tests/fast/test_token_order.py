"""Foreground and background without sorting and copies, against the reference."""

import pytest
import torch

from tokenmix.blocks.kernels import token_order as kernels
from tokenmix.fast import token_order as fast


@pytest.fixture
def cpp(compiled, monkeypatch):
    monkeypatch.setattr(fast, "_NATIVE", compiled)
    return fast._native_partition


@pytest.mark.parametrize("first", [0, 1, 5, 36, 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_selection_is_the_partition_of_the_sort(cpp, dtype, first):
    torch.manual_seed(0)
    scores = torch.randn(5, 37, dtype=dtype)
    scores[1] = scores[1].round()  # many equal ones
    scores[2, ::2], scores[2, 1::2] = 0.0, -0.0
    scores[3, [3, 7]], scores[3, 4], scores[3, 9] = float("nan"), float("inf"), -float("inf")
    scores[4] = float("nan")
    wide = torch.empty(37, 5, dtype=dtype).copy_(scores.t()).t()
    truth = kernels.partition(scores, first)
    assert torch.equal(cpp(scores, first), truth) and torch.equal(cpp(wide, first), truth)
    assert torch.equal(truth.sort(1).values, torch.arange(37).expand(5, -1))
    negative = scores.masked_fill(scores == scores, -float("nan"))
    assert torch.equal(cpp(negative, first), kernels.partition(negative, first))


def test_selection_of_many_images_and_of_none(cpp):
    torch.manual_seed(0)
    scores = torch.randn(9, 3136)
    assert torch.equal(cpp(scores, 49), kernels.partition(scores, 49))
    assert cpp(torch.empty(0, 7), 2).shape == (0, 7) and cpp(torch.empty(3, 0), 0).shape == (3, 0)


def test_partition_op_is_sound(compiled):
    scores = torch.randn(2, 9)
    torch.library.opcheck(torch.ops.tokenmix.token_partition, (scores, 3))
    x = torch.randn(2, 3, 5, 4, requires_grad=True)
    run = torch.compile(lambda x: fast._selected(x, x.shape[1]), fullgraph=True, dynamic=True, backend="aot_eager")
    for images in (x, torch.randn(1, 6, 2, 4)):
        assert torch.equal(run(images), kernels.token_partition(images, images.shape[1]))
    assert torch.equal(fast._selected(x.bfloat16(), 4), kernels.token_partition(x.bfloat16(), 4))
    assert set(fast.status()) == {"cpu", "cuda"}


@pytest.mark.parametrize("first", [0, 1, 14, 15])
@pytest.mark.parametrize("queries", [1, 3])
def test_background_is_attended_to_without_copies(first, queries):
    torch.manual_seed(0)
    q = torch.randn(2, queries, 6, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(2, 3, 5, 16, dtype=torch.float64, requires_grad=True)
    k, v = rows.split((6, 10), -1)
    order = kernels.token_partition(rows, first)
    truth = kernels.background_attention(q, k, v, order, first, 2)
    run = torch.compile(fast.background_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    grad = torch.randn_like(truth)
    wanted = torch.autograd.grad(truth, (q, rows), grad)
    for ours in (fast.background_attention(q, k, v, order, first, 2), run(q, k, v, order, first, 2)):
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)
        found = torch.autograd.grad(ours, (q, rows), grad, allow_unused=True) if ours.requires_grad else (None, None)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(torch.zeros_like(b) if a is None else a, b, rtol=1e-12, atol=1e-12)


def test_cases_are_of_one_result():
    for case in fast.cases(1):
        torch.testing.assert_close(case.fast(*case.inputs), case.reference(*case.inputs), rtol=1e-4, atol=1e-5)
