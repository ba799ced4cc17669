"""Commands as a user types them: output, exit status, and what is left on disk."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tokenmix.cli import COMMANDS, main
from tokenmix.compiler.spec import shipped_specs
from tokenmix.runtime.files import replacing

SPECS = [str(p) for name, p in shipped_specs().items()]


def run(capsys, *arguments):
    try:
        status = main([str(a) for a in arguments])
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_help_of_every_command_shows_a_real_example(capsys):
    for command in COMMANDS:
        status, out, _ = run(capsys, command, "--help")
        assert status == 0 and "example" in out and f"tokenmix {command}" in out.split("example", 1)[1]


def test_flops_of_all_specs_reports_and_passes(capsys):
    status, out, err = run(capsys, "flops", *SPECS)
    assert (status, err) == (0, "")
    assert "mixformer_b4" in out and "34.798" in out and "3.6G off by -3.5%" in out and "35M rounds" in out


def test_flops_json_has_one_row_per_spec_and_size(capsys):
    status, out, _ = run(capsys, "flops", "mixformer_b4", "atmnet_l", "--format", "json")
    report = json.loads(out)
    assert status == 0 and report["schema"] == 1
    rows = {(r["name"], *r["input"]): r for r in report["rows"]}
    assert set(rows) == {("mixformer_b4", 3, 224, 224), ("atmnet_l", 3, 224, 224), ("atmnet_l", 3, 384, 384)}
    row = rows["mixformer_b4", 3, 224, 224]
    assert row["params"] == 34797572
    assert {"mac": 3475237888, "flops": 6950475776, "fvcore": 3508531296}.items() <= row["costs"].items()
    assert set(row["costs"]) >= {"mac", "flops", "fvcore", "mmcv", "paddle"}
    figures = {f["quantity"]: f for f in row["published"]}
    assert figures["params"] == {
        "quantity": "params", "printed": "35M", "table": "3", "rule": "parameters", "value": 34797572,
        "status": "rounds",
    }  # fmt: skip
    assert figures["flops"]["status"] == "off" and figures["flops"]["gap"] == pytest.approx(-0.0347, abs=1e-3)


@pytest.mark.parametrize("by", ["stage", "block", "op"])
@pytest.mark.parametrize("format", ["table", "json", "csv", "markdown"])
def test_breakdowns_add_up(capsys, by, format):
    status, out, _ = run(capsys, "flops", "mixformer_b4", "--by", by, "--format", format, "--convention", "mac,fvcore")
    assert status == 0
    if format == "json":
        rows = json.loads(out)["rows"]
        assert sum(r["params"] for r in rows) == 34797572
        assert sum(r["costs"]["fvcore"] for r in rows) == 3508531296
        if by == "stage":
            assert all(r["peak_live_bytes"] > 0 for r in rows)
    elif format in ("table", "markdown"):
        assert "34.798" in out and "3.509" in out


def test_other_sizes_and_the_dense_backbone(capsys):
    _, out, _ = run(capsys, "flops", "mixformer_b4", "--size", "800x1280,512x2048", "--dense", "--format", "json")
    rows = json.loads(out)["rows"]
    assert [(r["input"], r["params"], r["costs"]["mac"]) for r in rows] == [
        ([3, 800, 1280], 32860828, 73326981952),
        ([3, 512, 2048], 32860828, 77106325904),
    ]


def test_a_missed_exact_target_fails(capsys, tmp_path):
    text = Path(SPECS[0]).with_name("mixformer_b0.yaml").read_text().replace("params: 5098767", "params: 5098768")
    (tmp_path / "wrong.yaml").write_text(text)
    status, _, err = run(capsys, "flops", "wrong.yaml")
    assert status == 1 and "TM1601" in err and "5,098,767" in err and "wrong.yaml:9:13" in err


def test_impossible_sizes_and_unknown_conventions(capsys):
    status, _, err = run(capsys, "flops", "mixformer_b4", "--size", "60x60")
    assert status == 1 and "TM1404" in err and "Traceback" not in err
    status, _, err = run(capsys, "flops", "mixformer_b4", "--convention", "mca")
    assert status == 2 and "mca" in err
    status, _, err = run(capsys, "flops", "mixformer_b4", "--size", "big")
    assert status == 2


def test_audit_finds_nothing_at_two_sizes(capsys):
    status, out, err = run(capsys, "flops", "mixformer_b0", "atmnet_xt", "--audit", "--format", "json")
    rows = json.loads(out)["audit"]
    assert (status, err) == (0, "") and len(rows) == 4 and all(r["status"] == "equal" for r in rows)


def test_check_speaks_three_formats(capsys, tmp_path):
    (tmp_path / "bad.yaml").write_text("tokenmix: 1\nname: bad\nstages:\n  - blocks: mixing_blok(heads=2)\n")
    status, out, err = run(capsys, "check", "bad.yaml")
    assert status == 1 and out == "" and "bad.yaml:4:13" in err and "mixing_block" in err
    _, out, _ = run(capsys, "check", "bad.yaml", "--format", "json")
    assert json.loads(out)["findings"][0]["id"] == "TM1203"
    _, _, err = run(capsys, "check", "bad.yaml", "--format", "github")
    assert err.startswith("::error file=bad.yaml,line=4,col=13")
    assert run(capsys, "check", *SPECS)[0] == 0


def test_build_writes_the_source_runs_an_image_and_reports(capsys, tmp_path):
    status, out, err = run(capsys, "build", "mixformer_b1")
    assert (status, err) == (0, "")
    source = (tmp_path / "mixformer_b1.py").read_text()
    assert source.startswith("# Emitted by tokenmix")
    assert "stages.2" in out and "printed 8M in table 3" in out and "result 1x1000, all finite" in out
    status, out, _ = run(capsys, "build", "mixformer_b1", "--standalone", "-o", "mixformer_b1.py", "--set", "classes=7")
    assert status == 0 and "result 1x7" in out  # its own file it may replace
    assert os.listdir(tmp_path) == ["mixformer_b1.py"]


def test_build_replaces_no_file_of_the_users(capsys, tmp_path):
    (tmp_path / "mixformer_b1.py").write_text("precious = 1\n")
    status, _, err = run(capsys, "build", "mixformer_b1")
    assert status == 1 and "TM1701" in err
    assert (tmp_path / "mixformer_b1.py").read_text() == "precious = 1\n"


def test_files_take_the_permissions_of_the_umask_or_keep_their_own(capsys, tmp_path):
    spec = tmp_path / "mine.yaml"
    spec.write_text("tokenmix:   1\nname: mine\nextends: atmnet_xt\n")
    spec.chmod(0o600)
    link = tmp_path / "link.yaml"
    link.symlink_to(spec)
    before = os.umask(0o077)
    try:
        assert run(capsys, "build", "atmnet_xt", "-o", "private.py")[0] == 0
        assert run(capsys, "fmt", link)[0] == 0
    finally:
        os.umask(before)
    assert (tmp_path / "private.py").stat().st_mode & 0o777 == 0o600
    assert link.is_symlink() and spec.read_text().startswith("tokenmix: 1") and spec.stat().st_mode & 0o777 == 0o600
    assert sorted(os.listdir(tmp_path)) == ["link.yaml", "mine.yaml", "private.py"]


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.py"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as beside:
        beside.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.py"]


def test_build_of_a_wrong_spec_writes_nothing(capsys, tmp_path):
    (tmp_path / "bad.yaml").write_text("tokenmix: 1\nname: bad\nextends: mixformer_b1\nwith: {heads: [3, 4, 8, 16]}\n")
    status, out, err = run(capsys, "build", "bad.yaml")
    assert status == 1 and out == "" and "heads" in err
    assert os.listdir(tmp_path) == ["bad.yaml"]


def test_build_takes_a_picture_and_refuses_what_is_none(capsys, tmp_path):
    from PIL import Image

    Image.new("L", (50, 40), 128).save(tmp_path / "grey.png")
    assert run(capsys, "build", "mixformer_b0", "--image", "grey.png")[0] == 0
    (tmp_path / "no.png").write_text("no picture")
    status, _, err = run(capsys, "build", "mixformer_b0", "--image", "no.png")
    assert status == 2 and "not a picture" in err
    assert run(capsys, "build", "mixformer_b0", "--image", "absent.png")[0] == 2


def test_show_and_list(capsys):
    _, out, _ = run(capsys, "show", "mixformer_b4", "--size", "256x320", "--depth", "2")
    assert "[4, 8, 16, 32]" in out and "map 512x8x10" in out
    _, out, _ = run(capsys, "show", "block", "mixing_attention")
    assert "Window attention and depth-wise convolution side by side" in out and "require C % 8 == 0" in out
    _, out, _ = run(capsys, "show", "op", "axial_sample")
    assert out.startswith("axial_sample(x: map, offsets: map; axis: height | width)")
    status, _, err = run(capsys, "show", "block", "mixing_atention")
    assert status == 1 and "did you mean `mixing_attention`" in err
    _, out, _ = run(capsys, "show", "atmnet")
    assert "(to be given)" in out
    _, out, _ = run(capsys, "list", "--format", "json")
    listed = json.loads(out)
    assert all(row["doc"] for kind in ("specs", "blocks", "ops") for row in listed[kind])


def test_list_goes_family_by_family(capsys):
    _, out, _ = run(capsys, "list", "specs", "--format", "json")
    rows = json.loads(out)["specs"]
    names = [row["name"] for row in rows]
    assert sorted(names) == sorted(shipped_specs()) and len(names) == len(set(names))
    kinds = {row["name"]: row["kind"] for row in rows}
    assert [kinds[n] for n in ("mixformer", "mixformer_b1", "mixformer_b1_kernel_5")] == [
        "family", "variant", "ablation"
    ]  # fmt: skip
    assert names.index("mixformer") < names.index("mixformer_b1") < names.index("mixformer_b1_kernel_5")
    assert names.index("atmnet_xt_b") < names.index("mixformer")


def test_a_reconstruction_is_called_one_wherever_it_is_shown(capsys):
    lines = ["A reconstruction.", "Stated: ", "Forced by the numbers: three tokens", "Assumed: the three tokens"]
    _, out, _ = run(capsys, "show", "atmnet_xt_b")
    assert all(line in out for line in lines)
    _, out, _ = run(capsys, "build", "atmnet_xt_b", "--set", "depths=[2,2,2,2]")
    assert all(line in out for line in lines)
    assert all(line in Path("atmnet_xt_b.py").read_text() for line in lines)
    _, out, _ = run(capsys, "flops", "atmnet_xt_b", "mixformer_b4", "--format", "json")
    rebuilt, released = json.loads(out)["rows"]
    assert rebuilt["reconstruction"] is True and rebuilt["status"].keys() == {"stated", "forced", "assumed"}
    _, out, _ = run(capsys, "flops", "atmnet_xt_b", "mixformer_b4")
    assert "\nReconstructions: atmnet_xt_b;" in out
    assert released["reconstruction"] is False and released["status"].startswith("stated;")
    _, out, _ = run(capsys, "table", "atmnet")
    assert "Reconstructions: " in out and "atmnet_xt_b" in out.split("Reconstructions: ")[1].split("\n")[0]


def test_table_groups_a_papers_rows_by_its_tables(capsys):
    status, out, err = run(capsys, "table", "mixformer")
    assert (status, err) == (0, "")
    tables = [line for line in out.splitlines() if line.startswith("Table ")]
    places = [tables.index(f"Table {name}, input 3x224x224") for name in ("3", "7", "8", "9", "10")]
    assert places == sorted(places)
    by_spec = {line.split()[1]: line.split() for line in out.split("Table 3,")[1].split("\n\n")[0].splitlines()[2:]}
    assert " ".join(by_spec["mixformer_b1"][2:]) == "8M 7.888 rounds 0.7G 0.699 rounds 78.9"
    ablation = next(line for line in out.splitlines() if "mixformer_b1_successive" in line and "77.4" in line)
    assert ablation.startswith("successive, no interactions") and ablation.split()[4:8] == ["-", "7.887", "-", "0.730"]
    assert "1.9G" in out and "off by -5.0%" in out and "  [1] the paper does not state its rule" in out


def test_table_speaks_markdown_csv_and_json(capsys):
    _, out, _ = run(capsys, "table", "atmnet", "--format", "markdown")
    assert out.startswith("## atmnet: Active Token Mixer (AAAI 2023)\n") and "### AAAI 1, arXiv 1\n" in out
    assert (
        "| row | spec | input | params | computed [M] | status | FLOPs | computed [G, fvcore] | status | top1 |" in out
    )
    _, out, _ = run(capsys, "table", "atmnet", "--format", "csv")
    rows = list(csv.DictReader(out.splitlines()))
    row = next(r for r in rows if r["spec"] == "atmnet_l" and r["input"] == "3x224x224" and r["printed params"])
    assert (row["params"], row["params status"]) == ("76238032", "rounds")
    assert (row["FLOPs"], row["rule"], row["FLOPs status"]) == ("12386313984", "fvcore", "cut off")
    _, out, _ = run(capsys, "table", "atmnet", "--format", "json")
    (paper,) = json.loads(out)["papers"]
    assert sum(paper["figures"].values()) == 20 and paper["figures"]["unexplained"] == 0
    row = next(r for r in paper["tables"]["AAAI 5, arXiv 8"] if r["row"] == "full")
    assert (row["flops"], row["rule"], row["printed"]["mIoU"]) == (3971552256, "fvcore", "45.8")
    assert row["published"][0]["status"] == "rounds"


def test_table_alone_lists_the_papers_and_all_prints_them(capsys):
    status, out, _ = run(capsys, "table")
    assert status == 0 and {"atmnet", "mixformer"} <= {line.split()[0] for line in out.splitlines()[1:]}
    _, out, _ = run(capsys, "table", "--format", "json")
    assert json.loads(out)["papers"]["mixformer"]["unexplained"] == 0
    _, out, _ = run(capsys, "table", "--all")
    assert out.startswith("Of ") and "\natmnet: " in out and "\nmixformer: " in out


def test_table_of_an_unknown_paper_names_the_known_ones(capsys):
    status, _, err = run(capsys, "table", "mixfomer")
    assert status == 1 and "did you mean `mixformer`?" in err
    status, _, err = run(capsys, "table", "zzz")
    assert status == 1 and "atmnet" in err and "mixformer" in err


def test_fmt_checks_shows_and_rewrites(capsys, tmp_path):
    (tmp_path / "a.mix").write_text("block a(x):\n    return x|>linear( C*2 )   # wide\n")
    status, out, _ = run(capsys, "fmt", "--check", "a.mix")
    assert status == 1 and "not in canonical form" in out
    assert run(capsys, "fmt", "--diff", "a.mix")[0] == 1
    assert run(capsys, "fmt", "a.mix")[0] == 0
    assert (tmp_path / "a.mix").read_text() == "block a(x):\n    return x |> linear(C * 2)  # wide\n"
    (tmp_path / "b.mix").write_text("block b(x:\n")
    status, _, err = run(capsys, "fmt", "b.mix")
    assert status == 1 and "TM1106" in err and (tmp_path / "b.mix").read_text() == "block b(x:\n"


def test_shipped_texts_are_canonical(capsys):
    import tokenmix

    blocks = Path(tokenmix.__file__).parent.joinpath("blocks").glob("*.mix")
    assert run(capsys, "fmt", "--check", *SPECS, *blocks)[0] == 0


def test_wrong_usage_exits_with_2(capsys):
    assert run(capsys)[0] == 2
    assert run(capsys, "nonsense")[0] == 2
    assert run(capsys, "flops", "mixformer_b4", "--set", "junk")[0] == 2


def test_a_bug_of_ours_exits_with_3_and_no_traceback(capsys, monkeypatch):
    monkeypatch.setattr("tokenmix.cli.flops_command.run", lambda options: 1 / 0)
    status, _, err = run(capsys, "flops", "mixformer_b4")
    assert status == 3 and "bug of tokenmix" in err and "Traceback" not in err


def test_a_reader_that_stops_early_is_no_error():
    command = f"{sys.executable} -m tokenmix list ops | head -1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True)
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


def test_everything_before_emission_does_without_torch():
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(['torch', 'numpy', 'fvcore', 'PIL']))\n"  # as if not installed
        "from tokenmix.cli import main\n"
        "import tokenmix\n"
        "assert main(['flops', 'mixformer_b4', 'atmnet_t', '--by', 'stage']) == 0\n"
        "assert main(['check', 'mixformer_b4']) == main(['show', 'atmnet_t']) == main(['list']) == 0\n"
        "assert main(['table', 'mixformer']) == main(['table']) == 0\n"
        "model = tokenmix.load('mixformer_b1'); model.source(); model.graph; model.cost(256)\n"
        "sys.exit(main(['build', 'mixformer_b1']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, "pip install 'tokenmix[torch]'" in done.stderr) == (2, True), done.stderr
    assert not list(Path().iterdir())
