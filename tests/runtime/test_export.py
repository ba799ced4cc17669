"""Exported programs serve other heights and widths than the one they were traced at, padded and cropped as needed."""

import pytest
import torch

import tokenmix
from tokenmix.fast import window_attention

pytestmark = pytest.mark.usefixtures("one_thread")

SPEC = """\
tokenmix: 1
name: exported
input: [3, 128, 128]
stem: conv(out=16, kernel=4, stride=4, padding=0)
stages:
  - {{blocks: {block}}}
head: norm_mean_head(classes=4)
"""
# Windows of 5 and patches of 4 and 6 divide some of the maps and not others.
BLOCKS = {
    "mixformer": '"mixing_block(heads=2, window=5)"',
    "emsnet": '"ems_block(expand=2, ratio=[1, 2, 1])"',
}


# Through the op, be its kernel built or not: of windows of unknown number torch reasons for minutes.
@pytest.mark.parametrize(("name", "kernels"), [("mixformer", "fast"), ("emsnet", "fast"), ("emsnet", "reference")])
def test_a_program_serves_every_height_and_width(name, kernels, tmp_path, monkeypatch):
    monkeypatch.setattr(window_attention, "WindowAttention", window_attention.FastWindowAttention)
    path = tmp_path / "exported.yaml"
    path.write_text(SPEC.format(block=BLOCKS[name]))
    torch.manual_seed(0)
    module = tokenmix.build(path, kernels=kernels).eval()
    sides = {2: 32 * torch.export.Dim("height", max=32), 3: 32 * torch.export.Dim("width", max=32)}
    with torch.no_grad():
        program = torch.export.export(module, (torch.randn(2, 3, 192, 224),), dynamic_shapes=(sides,)).module()
        for size in ((160, 320), (288, 96), (192, 224)):
            images = torch.randn(2, 3, *size)
            torch.testing.assert_close(program(images), module(images), rtol=1e-5, atol=1e-5)
