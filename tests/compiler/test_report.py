"""Counts against the papers: exact integers, printed figures, breakdowns, memory."""

import pytest

import tokenmix
from tokenmix.blocks.op import Tensor
from tokenmix.blocks.ops import find_op
from tokenmix.compiler.liveness import live_bytes
from tokenmix.compiler.report import compare, exact_misses, figures, report_sizes, rows_by
from tokenmix.compiler.spec import printed_number, shipped_specs
from tokenmix.compiler.verify import GraphError, dead_values, verify

MODELS = [name for name in shipped_specs() if not tokenmix.load(name).is_family]
ABLATIONS = {name for name, path in shipped_specs().items() if path.parent.name == "ablations"}


def test_names_of_shipped_specs_are_unique_and_those_of_their_files():
    folder = shipped_specs()["mixformer"].parent
    files = [*folder.glob("*.yaml"), *folder.glob("ablations/*.yaml")]
    assert sorted(shipped_specs()) == sorted(path.stem for path in files)
    assert all(tokenmix.load(name).spec.root.get("name").text == name for name in shipped_specs())


def test_ablations_extend_a_model_and_say_what_is_changed():
    for name in ABLATIONS:
        spec = tokenmix.load(name).spec
        assert spec.bases and spec.root.get("doc") is not None and spec.exact, name


def test_families_come_before_their_ablations():
    names = list(shipped_specs())
    assert names.index("mixformer_b1") < names.index("mixformer_b1_successive")


@pytest.mark.parametrize("name", MODELS)
def test_every_exact_target_is_met(name):
    model = tokenmix.load(name)
    assert model.findings == () and exact_misses(model) == []
    assert sum(len(row.values) for row in model.spec.exact) >= 2


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dense", [False, True])
def test_graphs_are_sound(name, dense):
    graph = tokenmix.load(name).elaborate((256, 320), dense=dense)
    verify(graph.flatten())
    assert dead_values(graph) == []


@pytest.mark.parametrize(
    ("value", "printed", "status"),
    [
        (34_797_572, "35M", "rounds"),
        (34_499_999, "35M", "off"),
        (34_500_000, "35M", "rounds"),
        (402_169_668, "0.4G", "rounds"),
        (1_804_057_136, "1.9G", "off"),
        (2_500_000, "2M", "rounds"),  # halves may have been rounded either way
        (2_500_000, "3M", "rounds"),
        (2_500_001, "2M", "cut off"),
        (2_568_242, "2.5M", "cut off"),
        (2_568_242, "2.56M", "cut off"),
        (2_568_242, "2.57M", "rounds"),
        (2_599_999, "2.6M", "rounds"),
        (1_999_999_999, "1G", "cut off"),
        (2_000_000_000, "1G", "off"),
        (889_449_588_736, "889.5G", "off"),
        (1234, "1.2K", "rounds"),
        (5, "5", "rounds"),
        (0, "0", "rounds"),
    ],
)
def test_a_value_rounds_is_cut_off_or_is_off(value, printed, status):
    assert compare(value, printed)[0] == status


def test_a_figure_without_a_letter_has_the_unit_of_its_column():
    assert printed_number("2.5") == ("2.5", 0) and printed_number("2.5", "M") == ("2.5", 6)
    assert printed_number("0.9M", "G") == ("0.9", 6)
    assert compare(2_568_242, "2.5", "M")[0] == "cut off" and compare(540_000_000, "0.54", "G")[0] == "rounds"
    assert [printed_number(text, "M") for text in ("", "M", "2.5.1", "about 3", "3m")] == [None] * 5


ROWS = """\
tokenmix: 1
name: small
stages: [{blocks: mlp(expand=2)}]
input: [16, 4, 4]
published:
  - {table: "1", row: ours, params: 0.001, flops: "16.2K", note: as it is}
  - {table: "2", paper: mat, params: null, flops: null, top1: 70.0}
"""


def test_rows_may_name_a_paper_and_leave_figures_out(tmp_path):
    (tmp_path / "small.yaml").write_text(ROWS)
    model = tokenmix.load(tmp_path / "small.yaml")
    assert model.findings == () and model.spec.family == "small"
    first, second = model.spec.published
    assert (first.paper, first.row, first.table) == ("", "ours", "1")
    assert (second.paper, second.printed) == ("mat", {"top1": "70.0"})
    params, flops = figures(model, (16, 4, 4))
    assert (params.status, params.value, params.note, params.verdict) == ("rounds", 1072, "", "rounds")
    assert (flops.status, flops.value, flops.verdict) == ("off", 16384, "off by +1.1%")
    assert flops.as_dict() | {"gap": 0} == {
        "quantity": "flops", "printed": "16.2K", "table": "1", "rule": "mac", "value": 16384, "status": "off", "gap": 0,
        "note": "as it is",
    }  # fmt: skip


def test_the_family_is_the_end_of_the_chain():
    assert {tokenmix.load(n).spec.family for n in ("atmnet", "atmnet_xt", "atmnet_xt_b")} == {"atmnet"}


STATUS = """\
tokenmix: 1
name: rebuilt
source: {title: T, status: {stated: depths, forced: widths}}
stages: [{blocks: mlp(expand=2)}]
"""


def test_a_status_tells_apart_what_is_stated_forced_and_assumed(tmp_path):
    (tmp_path / "rebuilt.yaml").write_text(STATUS)
    (tmp_path / "other.yaml").write_text(
        "tokenmix: 1\nname: other\nextends: rebuilt\nsource: {status: {assumed: heads}}\n"
    )
    (tmp_path / "told.yaml").write_text("tokenmix: 1\nname: told\nextends: other\nsource: {status: all stated}\n")
    status = {name: tokenmix.load(tmp_path / f"{name}.yaml").spec.status for name in ("rebuilt", "other", "told")}
    assert status["rebuilt"].is_reconstruction
    assert status["rebuilt"].lines() == ["A reconstruction.", "Stated: depths", "Forced by the numbers: widths"]
    assert status["other"].as_json() == {"stated": "depths", "forced": "widths", "assumed": "heads"}
    assert not status["told"].is_reconstruction and status["told"].lines() == ["Status: all stated"]
    assert not tokenmix.load("mixformer_b1").spec.status.is_reconstruction
    source = tokenmix.load(tmp_path / "other.yaml").source()
    assert "A reconstruction.\nStated: depths.\nForced by the numbers: widths.\nAssumed: heads.\n" in source


@pytest.mark.parametrize("year", ["2023", '"2023"'])
def test_a_year_may_stand_in_quotes(tmp_path, year):
    (tmp_path / "rebuilt.yaml").write_text(STATUS.replace("{title: T,", f"{{title: T, year: {year},"))
    assert tokenmix.load(tmp_path / "rebuilt.yaml").spec.paper["year"] == "2023"
    assert tokenmix.load("mat").spec.paper["year"] == tokenmix.load("emsnet").spec.paper["year"] == "2023"


def test_a_status_has_no_other_parts(tmp_path):
    (tmp_path / "rebuilt.yaml").write_text(STATUS.replace("stated", "statd"))
    (finding,) = tokenmix.load(tmp_path / "rebuilt.yaml").findings
    assert finding.id == "TM1201" and "did you mean `stated`?" in finding.help


def test_the_report_calls_b3_to_b6_off_and_no_other_released_model():
    gaps = {"off": set(), "cut off": set(), "rounds": set()}
    for name in MODELS:
        if not name.startswith(("mixformer", "atmnet")) or name in ABLATIONS:
            continue
        model = tokenmix.load(name)
        for size in report_sizes(model):
            for figure in figures(model, (3, *size)):
                assert figure.note or figure.status != "off", figure
                gaps[figure.status].add((name, figure.quantity, figure.printed))
    assert gaps["cut off"] == {("atmnet_l", "flops", "12.3G")}
    assert gaps["off"] == {
        ("mixformer_b3", "flops", "1.9G"),
        ("mixformer_b4", "flops", "3.6G"),
        ("mixformer_b5", "flops", "6.8G"),
        ("mixformer_b6", "flops", "12.7G"),
    }


# Mask R-CNN around MixFormer at 800x1280 under mmcv's rule: what the standard neck and heads add (a constant, and for
# the laterals 256 per channel and position of each stage), and the totals that round to the paper's table 4.
MASK_RCNN_HEADS = 168196171700
MASK_RCNN = {"B1": 183407965128, "B2": 187535724250, "B3": 206926448862, "B4": 242639904642}


@pytest.mark.parametrize("variant", MASK_RCNN)
def test_the_mmcv_convention_reproduces_mask_rcnn_totals(variant):
    model = tokenmix.load(f"mixformer_{variant.lower()}")
    graph = model.elaborate("800x1280", dense=True)
    laterals = sum(256 * output.C * output.N for output in graph.outputs)
    assert MASK_RCNN_HEADS + laterals + model.cost("800x1280", dense=True)["mmcv"] == MASK_RCNN[variant]


@pytest.mark.parametrize("name", ["mixformer_b4", "atmnet_t"])
@pytest.mark.parametrize("by", ["stage", "block", "op"])
def test_breakdowns_add_up_under_every_convention(name, by):
    model = tokenmix.load(name)
    graph = model.elaborate("256x320")
    rows = rows_by(by, graph, model.conventions.values())
    cost = model.cost("256x320")
    assert sum(r.params for r in rows) == cost.params
    for convention in model.conventions:
        assert sum(r.costs[convention] for r in rows) == cost[convention]
    assert sum(r.activation_bytes for r in rows) == 4 * graph.activation_elements


def test_live_memory_of_a_worked_example(tmp_path):
    (tmp_path / "m.yaml").write_text(
        "tokenmix: 1\nname: m\ninput: [2, 3, 4]\nstages: [{body: b()}]\ndefinitions: |\n"
        "  block b(x):\n"
        "      y = x |> linear(4)\n"  # 24 in, 48 out
        "      a, c = y |> split(2)\n"  # views of y
        "      a = a |> gelu\n"  # 24
        "      return a + c + x\n"  # 24, then 24
    )
    live = live_bytes(tokenmix.load(tmp_path / "m.yaml").graph, bytes_per_element=1)
    names = {k.rsplit(".", 1)[-1]: v for k, v in live.items()}
    assert names["linear"] == 24 + 48
    assert names["split"] == 24 + 48
    assert names["gelu"] == 24 + 48 + 24
    assert names["add"] == 24 + 48 + 24 + 24
    assert names["add_2"] == 24 + 24 + 24
    assert names["output"] == 24


def test_the_verifier_notices_what_must_not_be():
    graph = tokenmix.load("mixformer_b0").graph
    verify(graph)
    broken = graph.copy()
    broken.nodes["stem.norm1"]["tally"] = type(broken.nodes["stem.norm1"]["tally"])(batch_norm=1)
    with pytest.raises(GraphError, match="tally"):
        verify(broken)
    broken = graph.copy()
    broken.add_edge("head.mean", "stem.norm1", uses=[(0, 0)])
    with pytest.raises(GraphError, match="cycle"):
        verify(broken)
    broken = graph.copy()
    broken.remove_edge("head.classifier", "output")
    with pytest.raises(GraphError, match="never reaches"):
        verify(broken)
    broken = graph.copy()
    broken.nodes["stem.norm1"]["outputs"] = (Tensor("map", (12, -3, 5)),)
    with pytest.raises(GraphError, match="is no shape"):
        verify(broken)


def test_a_shape_rule_that_gives_no_shape_is_noticed_where_its_op_is_placed(tmp_path, monkeypatch):
    monkeypatch.setattr(find_op("max_pool"), "check", lambda *_, **__: None)
    (tmp_path / "m.yaml").write_text(
        "tokenmix: 1\nname: m\ninput: [8, 8, 8]\nstages: [{blocks: pooled()}]\n"
        "definitions: |\n  block pooled(x):\n      return x |> max_pool(12, ceil_mode = true)\n"
    )
    with pytest.raises(GraphError, match="max_pool"):
        tokenmix.load(tmp_path / "m.yaml").elaborate()


def test_a_deep_stage_is_analysed_once():
    graph = tokenmix.load("mixformer_b6").elaborate()
    targets = {id(n.target) for n in graph.nodes if n.name.startswith("stages.2.blocks.")}
    assert len(targets) == 1


def test_cost_is_read_by_convention_or_tally():
    cost = tokenmix.load("mixformer_b4").cost("256x320")
    assert cost.input == (3, 256, 320) and cost["flops"] == 2 * cost["mac"]
    assert cost["mac"] == cost["macs_conv"] + cost["macs_linear"] + cost["macs_attention"]
    with pytest.raises(KeyError):
        cost["nonsense"]
