"""Layers with an activation, fused or in place, against the layer and then the activation."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tokenmix.blocks.kernels import channels_last as reference
from tokenmix.fast import fused_layers as fast

ACTIVATIONS = ["gelu", "relu", "relu6", "sigmoid", "silu"]

# Constructor arguments of convolutions: dense, strided, depth-wise, grouped, 1x1, one channel.
CONVOLUTIONS = [
    ((8, 12, 3), {"padding": 1}),
    ((8, 4, 4), {"stride": 2}),
    ((8, 8, 3), {"padding": 1, "stride": 2, "groups": 8}),
    ((8, 4, 1), {"groups": 2, "bias": False}),
    ((1, 5, 3), {"padding": 1}),
]

pytestmark = pytest.mark.usefixtures("one_thread")


def pair(kind, sizes, activation, **settings):
    torch.manual_seed(0)
    plain = getattr(reference, kind)(*sizes, activation=activation, **settings)
    ours = getattr(fast, kind)(*sizes, activation=activation, **settings)
    ours.load_state_dict(plain.state_dict())
    return plain.requires_grad_(False), ours.requires_grad_(False)


def maps(channels):
    """Odd sizes; channels cut out of wider ones, every other position, channels first in memory."""
    yield torch.randn(2, 7, 9, channels)
    yield torch.randn(1, 9, 6, 3 * channels)[..., channels : 2 * channels]
    yield torch.randn(1, 9, 10, channels)[:, :, ::2]
    yield torch.randn(2, channels, 6, 5).permute(0, 2, 3, 1)


@pytest.fixture(params=[0, 1 << 40], ids=["fused", "in place"])
def small(request, monkeypatch):
    """Both ways for every size."""
    monkeypatch.setattr(fast, "_SMALL", request.param)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("sizes", "settings"), CONVOLUTIONS)
def test_convolutions(small, activation, sizes, settings):
    plain, ours = pair("FusedConv2d", sizes, activation, **settings)
    for x in maps(sizes[0]):
        before = x.clone()
        y = ours(x)
        torch.testing.assert_close(y, plain(x), rtol=1e-4, atol=1e-5)
        assert torch.equal(x, before)
        assert ours.double()(x.double()).dtype == torch.float64
        torch.testing.assert_close(ours(x.double()), plain.double()(x.double()), rtol=1e-12, atol=1e-12)
        ours.float(), plain.float()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", ["FusedLinear", "FusedPointwise"])
def test_linear_layers(small, activation, kind):
    plain, ours = pair(kind, (8, 5), activation)
    for x in (*maps(8), torch.randn(8), torch.randn(3, 8), torch.randn(8, 4).t(), torch.randn(0, 8)):
        torch.testing.assert_close(ours(x), plain(x), rtol=1e-4, atol=1e-5)
    low = torch.randn(3, 8).bfloat16()
    torch.testing.assert_close(ours.bfloat16()(low), plain.bfloat16()(low))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_no_number_is_not_hidden(small, activation):
    plain, ours = pair("FusedLinear", (8, 8), activation)
    x = torch.randn(3, 8)
    x[1] = float("nan")
    assert torch.equal(ours(x).isnan(), plain(x).isnan()) and plain(x)[1].isnan().all()


def test_gradients_go_through_the_plain_layers(small):
    for kind, sizes in (("FusedLinear", (8, 8)), ("FusedConv2d", (8, 8, 3))):
        plain, ours = pair(kind, sizes, "gelu")
        x = torch.randn(2, 5, 5, 8, requires_grad=True)
        (expected,) = torch.autograd.grad(plain(x).square().sum(), x)
        (got,) = torch.autograd.grad(ours(x).square().sum(), x)
        torch.testing.assert_close(got, expected)
        ours.requires_grad_(True)(x.detach()).sum().backward()
        assert ours.weight.grad is not None


def test_autocast_decides_on_the_dtype(small):
    plain, ours = pair("FusedLinear", (8, 8), "gelu")
    with torch.autocast("cpu", torch.bfloat16):
        y = ours(torch.ones(3, 8))
        assert y.dtype == torch.bfloat16 and torch.equal(y, plain(torch.ones(3, 8)))


def test_traces_hold_plain_operators(small):
    plain, ours = pair("FusedConv2d", (8, 8, 3), "gelu")
    x = torch.randn(2, 5, 7, 8)
    program = torch.export.export(ours, (x,), dynamic_shapes=({1: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO},))
    assert "mkldnn" not in str(program.graph)
    larger = torch.randn(2, 9, 6, 8)
    torch.testing.assert_close(program.module()(larger), plain(larger))
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), plain(x))


def test_flops_are_counted(small):
    for kind, sizes in (("FusedLinear", (8, 6)), ("FusedConv2d", (8, 6, 3))):
        counts = []
        for layer in pair(kind, sizes, "gelu"):
            with FlopCounterMode(display=False) as counter:
                layer(torch.randn(2, 5, 7, 8))
            counts.append(counter.get_total_flops())
        assert counts[0] == counts[1] > 0


def test_status_is_told(monkeypatch):
    assert set(fast.status()) == {"cpu", "cuda"}
    monkeypatch.setattr(fast, "_WORKS", False)
    assert fast.status()["cpu"] == ("in place", "this torch has no fused oneDNN operators")
    plain, ours = pair("FusedLinear", (8, 5), "gelu")
    x = torch.randn(4096, 8)
    torch.testing.assert_close(ours(x), plain(x))
