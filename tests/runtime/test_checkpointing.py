"""Activation checkpointing: the same training step in less memory."""

import copy

import pytest
import torch

import tokenmix
from tokenmix.runtime.bench import peak_bytes

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", ["mixformer_b0", "atmnet_xt", "emsnet_xxtiny", "partialformer_b0"])
def test_a_checkpointed_step_is_the_same_step(name):
    torch.manual_seed(0)
    kept = tokenmix.build(name, drop_path=0.2, num_classes=5).double().train()
    anew = tokenmix.build(name, drop_path=0.2, num_classes=5, checkpoint=True).double().train()
    anew.load_state_dict(kept.state_dict())
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    results = []
    for module in (kept, anew):
        torch.manual_seed(1)  # the same images and blocks are dropped
        scores = module(images)
        scores.square().sum().backward()
        results.append(scores)
    torch.testing.assert_close(*results, rtol=0, atol=0)
    for (key, a), b in zip(kept.named_parameters(), anew.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-12, msg=key)
    for (key, a), b in zip(kept.named_buffers(), anew.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, msg=key)  # running statistics moved once


def test_a_checkpointed_step_takes_less_memory():
    images = torch.randn(8, 3, 96, 96)

    def peak(checkpoint):
        module = tokenmix.build("mixformer_b0", checkpoint=checkpoint).train()
        return peak_bytes(lambda: module(images).sum().backward(), "cpu")

    assert peak(True) < 0.6 * peak(False)  # gradients of the weights stand in both


def test_checkpointing_can_be_switched_per_stage_and_survives_copies():
    module = tokenmix.build("mixformer_b0", checkpoint=True, depths=[1, 1, 1, 1])
    twin = copy.deepcopy(module)
    assert all(stage.checkpointed for stage in twin.stages)
    twin.stages[3].checkpointed = False
    assert module.stages[3].checkpointed
    with pytest.raises(ValueError, match="choose one"):
        tokenmix.build("mixformer_b0", checkpoint=True, for_inference=True)


@pytest.mark.parametrize("name", ["mixformer_b0", "atmnet_xt"])
def test_the_compiler_takes_checkpointed_stages(name):
    """With batch norm and without: gradients and statistics of the plain step."""
    settings = {"depths": [1, 1, 1, 1] if name == "mixformer_b0" else [2, 2, 2, 2], "drop_path": 0.0}
    torch.manual_seed(0)
    plain = tokenmix.build(name, **settings).double().train()
    ours = tokenmix.build(name, checkpoint=True, **settings).double().train()
    ours.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    plain(images).square().sum().backward()
    torch.compile(ours, backend="aot_eager")(images).square().sum().backward()
    for a, b in zip(plain.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-9, atol=1e-12)
    for a, b in zip(plain.buffers(), ours.buffers(), strict=True):
        torch.testing.assert_close(b, a)
