"""The five mixers beside each other: within a stage, across stages, at any size."""

import pytest
import torch

import tokenmix
from tokenmix.compiler.verify import verify
from tokenmix.runtime.audit import audit

# Block -> its call at 16 * 2**i channels, which every mixer here can split as it needs.
MIXERS = {
    "mixformer": "mixing_block(heads=2, window=7, expand=2, drop=ramp(0.1, depths, i)[j])",
    "atmnet": "atm_block(share=4, expand=2, drop=ramp(0.1, depths, i)[j])",
    "emsnet": "ems_block(expand=2, drop=ramp(0.1, depths, i)[j])",
    "mat": "mat_block(heads=2, window=7, expand=2, drop=ramp(0.1, depths, i)[j])",
    "partialformer": (
        "partialformer_block(heads=2, share_over=1, share_under=8, expand=2, drop=ramp(0.1, depths, i)[j])"
    ),
}
# Even, not square, not divisible by any window or patch; the last gives 7x11, 4x6 and 2x3 maps.
SIZES = ["64x64", "96x64", "100x167", "28x41"]


def spec_of(folder, stages):
    """A model of some stages, each a row of mixers."""
    lines = ["tokenmix: 1", "name: hybrid", "input: [3, 64, 64]", f"parameters: {{depths: {[len(s) for s in stages]}}}"]
    lines += ["stem: conv(out=16, kernel=7, stride=4)", "stages:"]
    for i, row in enumerate(stages):
        lines.append(f"  - repeat: {len(row)}")
        lines += ['    down: "conv(out=16 * 2**i, kernel=3, stride=2)"'] if i else []
        lines += ["    blocks:", *(f"      - {MIXERS[name]}" for name in row)]
    lines += ["features: layer_norm", "head: norm_mean_head(classes=7)"]
    path = folder / "hybrid.yaml"
    path.write_text("\n".join(lines) + "\n")
    return path


NAMES = list(MIXERS)
LAYOUTS = {
    "all five within each stage": [NAMES, NAMES[::-1]],
    "one per stage": [[name] for name in NAMES[:4]],
    "one per stage, the other way": [[name] for name in NAMES[:0:-1]],
}


@pytest.fixture(params=LAYOUTS, scope="module")
def model(request, tmp_path_factory):
    model = tokenmix.load(spec_of(tmp_path_factory.mktemp("hybrid"), LAYOUTS[request.param]))
    assert model.findings == ()
    return model


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("size", SIZES)
def test_hybrid_is_counted_exactly_and_runs(model, size):
    sides = tuple(int(s) for s in size.split("x"))
    verify(model.elaborate(sides).flatten())
    assert audit(model, sides).findings == []
    torch.manual_seed(0)
    module = tokenmix.build(model).double()
    assert sum(p.numel() for p in module.parameters()) == model.cost(sides).params
    images = torch.randn(3, 3, *sides, dtype=torch.float64)
    module.train()(images).square().mean().backward()
    without = [name for name, p in module.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []
    module.eval()
    with torch.no_grad():
        together = module(images)
        alone = torch.cat([module(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-9)


def test_hybrid_is_a_dense_backbone(model):
    module = tokenmix.build(model, features_only=True).eval()
    with torch.no_grad():
        maps = module(torch.randn(1, 3, 100, 167))
    outputs = model.elaborate("100x167", dense=True).outputs
    assert [tuple(m.shape[1:]) for m in maps] == [output.dims for output in outputs]


def test_every_pair_of_mixers_stands_side_by_side(tmp_path):
    for first in NAMES:
        for second in NAMES:
            model = tokenmix.load(spec_of(tmp_path, [[first, second]]))
            assert model.findings == (), (first, second)
            assert model.cost("36x52").params == model.cost("224").params
