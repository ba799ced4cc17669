"""Stages that differ from the rest, under their number."""

import textwrap

import pytest

import tokenmix

FAMILY = """
tokenmix: 1
name: family
input: [3, 32, 32]
stem: conv(out=8, kernel=4, stride=4)
stages:
  for: i in 0..3
  down: {when: i > 0, block: "conv(out=8 * 2**i, kernel=2, stride=2, padding=0)"}
  blocks: mlp(expand=2)
  repeat: 2
"""
LIST = """
tokenmix: 1
name: family
input: [3, 32, 32]
stages:
  - {blocks: mlp(expand=2), repeat: 2}
  - {blocks: mlp(expand=3)}
"""


def load(folder, stages, family=FAMILY):
    (folder / "family.yaml").write_text(family)
    path = folder / "variant.yaml"
    path.write_text("tokenmix: 1\nname: variant\nextends: family\nstages:\n" + textwrap.indent(stages, "  "))
    return tokenmix.load(path)


def sites(model):
    assert model.findings == (), "\n".join(str(f) for f in model.findings)
    return {site.name: site for site in model.plan.trunk() if site.name != "stem"}


def test_a_numbered_stage_says_only_what_differs(tmp_path):
    found = sites(load(tmp_path, "2: {down: null, blocks: mlp(expand=i + j), repeat: 3}\n"))
    assert [n for n in found if "down" in n] == ["stages.1.down"]
    assert [s.arguments["expand"] for n, s in found.items() if "blocks" in n] == [2, 2, 2, 2, 2, 3, 4]


def test_a_stage_of_a_list_is_changed_by_its_number(tmp_path):
    found = sites(load(tmp_path, "1: {blocks: layer_norm, repeat: 2}\n", LIST))
    assert [s.call.callee for s in found.values()] == ["mlp", "mlp", "layer_norm", "layer_norm"]


def test_a_body_takes_the_place_of_blocks_and_their_number(tmp_path):
    assert list(sites(load(tmp_path, "body: mlp(expand=2)\n"))) == [
        "stages.0.body", "stages.1.down", "stages.1.body", "stages.2.down", "stages.2.body",
    ]  # fmt: skip
    found = sites(load(tmp_path, "1: {body: mlp(expand=2)}\n"))
    assert "stages.1.body" in found and "stages.1.blocks.0" not in found and "stages.2.blocks.1" in found


def test_numbers_pile_up_from_base_to_variant(tmp_path):
    load(tmp_path, "1: {blocks: layer_norm, repeat: 1}\n")
    path = tmp_path / "third.yaml"
    path.write_text("tokenmix: 1\nname: third\nextends: variant\nstages:\n  1: {repeat: 3}\n  for: i in 0..2\n")
    found = sites(tokenmix.load(path))
    assert [s.call.callee for n, s in found.items() if "blocks" in n] == ["mlp"] * 2 + ["layer_norm"] * 3


def test_an_exact_match_of_base_and_variant_is_counted_and_built_alike(tmp_path):
    model = load(tmp_path, "0: {blocks: mlp(expand=4)}\n")
    assert sum(p.numel() for p in tokenmix.build(model).parameters()) == model.cost().params


@pytest.mark.parametrize(
    ("stages", "family", "id", "words"),
    [
        ("3: {repeat: 1}\n", FAMILY, "TM1202", "there is no stage 3"),
        ("7: {repeat: 1}\n", LIST, "TM1202", "there is no stage 7"),
        ("1: {repeats: 1}\n", FAMILY, "TM1201", "stage 1 has no key `repeats`"),
        (f"{'9' * 30}: {{repeat: 1}}\n", FAMILY, "TM1202", "there is no stage 9999"),
        ("1: mlp\n", FAMILY, "TM1301", "stage 1 is a map"),
        ("1: {for: i in 0..2}\n", FAMILY, "TM1201", "stage 1 has no key `for`"),
    ],
)
def test_mistakes_in_numbered_stages_are_findings(tmp_path, stages, family, id, words):
    findings = load(tmp_path, stages, family).findings
    assert [f.id for f in findings] == [id] and words in findings[0].message


def test_blocks_that_get_other_channels_are_built_one_by_one(tmp_path):
    path = tmp_path / "widening.yaml"
    path.write_text(
        "tokenmix: 1\nname: widening\ninput: [4, 8, 8]\nstages:\n  - {blocks: wide, repeat: 3}\n"
        "definitions: |\n  block wide(x):\n      return x |> linear(12)\n"
    )
    model = tokenmix.load(path)
    module = tokenmix.build(model)
    assert [layer.linear.in_features for layer in module.stages[0].blocks] == [4, 12, 12]
    assert sum(p.numel() for p in module.parameters()) == model.cost().params


def test_a_parameter_that_begins_at_a_whole_number_can_learn(tmp_path):
    path = tmp_path / "whole.yaml"
    path.write_text(
        "tokenmix: 1\nname: whole\ninput: [4, 8, 8]\nstages:\n  - blocks: scaled(start=2)\n"
        "definitions: |\n  block scaled(x; start: float):\n"
        "      return x * (a: parameter(C, start)) + (b: parameter(C, 0))\n"
    )
    module = tokenmix.build(path)
    assert all(p.is_floating_point() and p.requires_grad for p in module.parameters())
