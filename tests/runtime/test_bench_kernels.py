"""Kernels timed alone: that every kernel says what it is timed at, and that bytes are counted right."""

import pytest
import torch
from torch.utils._pytree import tree_leaves

from tokenmix.fast.cases import Case, find, kernels, module
from tokenmix.runtime import kernel_bench
from tokenmix.runtime.bench import Setting
from tokenmix.runtime.kernel_bench import bench_kernels

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("kernel", kernels())
def test_the_cases_of_a_kernel_compute_what_their_references_do(kernel):
    torch.manual_seed(0)
    cases = list(module(kernel).cases(1))
    assert cases and len({case.name for case in cases}) == len(cases)
    for case in cases:
        with torch.no_grad():
            fast, plain = (tree_leaves(side(*case.inputs)) for side in (case.fast, case.reference))
        for ours, truth in zip(fast, plain, strict=True):
            torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-4)


def test_kernels_are_found_by_file_and_by_what_they_give_to_modules():
    assert find(["axial_sample", "WindowAttention"]) == find(["window_attention", "axial_sample"])
    assert find([]) == kernels()
    with pytest.raises(ValueError, match=r"no fast kernel nothing; there are .*axial_sample"):
        find(["nothing"])


class Doubling:
    """A kernel of one case: a tensor doubled, picked by row numbers that take no gradient."""

    @staticmethod
    def status():
        return {"cpu": ("by two", "")}

    @staticmethod
    def cases(batch):
        inputs = torch.ones(batch, 10, 4), torch.zeros(6, dtype=torch.int64)
        yield Case("small", inputs, lambda x, rows: 2 * x[:, rows], lambda x, rows: x[:, rows] + x[:, rows])


@pytest.fixture
def doubling(monkeypatch):
    monkeypatch.setattr(kernel_bench, "find", lambda names: ["doubling"])
    monkeypatch.setattr(kernel_bench, "module", lambda kernel: Doubling)


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2), ("float64", 8)])
def test_bytes_are_inputs_read_once_and_outputs_written_once(doubling, dtype, size):
    forward, both = bench_kernels([], Setting(2, (0, 0), dtype=dtype, train=True), rounds=3)
    read, rows, written = 2 * 10 * 4 * size, 6 * 8, 2 * 6 * 4 * size
    assert (forward.kernel, forward.case, forward.step, forward.runs) == ("doubling", "small", "forward", "by two")
    assert both.step == "forward and backward"
    assert forward.moved == read + rows + written
    # Once more the inputs and the gradients of the outputs; then the gradient of the map, which rows have none of.
    assert both.moved == forward.moved + read + rows + written + read
    for timing in (forward, both):
        assert len(timing.fast) == len(timing.reference) == len(timing.copy) == 3
        assert timing.bandwidth > 0 and timing.ratio > 0 and timing.share > 0


def test_ratios_are_taken_round_by_round():
    timing = kernel_bench.KernelTiming("k", "c", "forward", "C++", 8, (1.0, 2.0, 4.0), (3.0, 6.0, 4.0), (0.5, 0.5, 4.0))
    assert (timing.ratio, timing.bandwidth, timing.share) == (3.0, 4.0, 0.5)


def test_a_kernel_without_gradients_has_no_backward_pass(doubling, monkeypatch):
    case = Case("orders", (torch.randn(4, 5),), lambda x: x.argsort(), lambda x: x.argsort())
    monkeypatch.setattr(Doubling, "cases", staticmethod(lambda batch: iter([case])))
    assert [t.step for t in bench_kernels([], Setting(1, (0, 0), train=True), rounds=1)] == ["forward"]


def test_evaluation_alone_has_no_backward_pass(doubling):
    assert [t.step for t in bench_kernels([], Setting(1, (0, 0)), rounds=1)] == ["forward"]
