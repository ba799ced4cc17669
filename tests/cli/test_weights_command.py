"""`tokenmix weights` as a user types it."""

import json
import os

import pytest
import torch

import tokenmix
from tests.runtime.released import OURS
from tokenmix.cli import main

SPEC = "tokenmix: 1\nname: small\nextends: atmnet\nwith: {{channels: {channels}, depths: {depths}, expand: {expand}, "
SPEC += "share: {share}, interval: {interval}, classes: 5}}\n"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(SPEC.format(**OURS["atmnet"]))
    torch.save({"model": tokenmix.build("small.yaml").state_dict()}, "small.pth")
    return tmp_path


def run(capsys, *arguments):
    try:
        status = main(["weights", *arguments])
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_convert_writes_what_loads(capsys, folder):
    before = os.umask(0o027)
    try:
        status, out, err = run(capsys, "convert", "small.yaml", "small.pth", "-o", "small.safetensors")
    finally:
        os.umask(before)
    assert (folder / "small.safetensors").stat().st_mode & 0o777 == 0o640
    assert (status, err) == (0, "") and "loaded        249" in out and "written: small.safetensors" in out
    module = tokenmix.build("small.yaml")
    tokenmix.load_weights(module, "small.safetensors", "tokenmix")
    saved = torch.load("small.pth", weights_only=True)["model"]
    assert all(torch.equal(tensor, saved[key]) for key, tensor in module.state_dict().items())
    status, out, _ = run(capsys, "convert", "small.yaml", "small.pth", "-o", "small.safetensors", "--format", "json")
    record = json.loads(out)  # its own file it may replace
    assert status == 0 and len(record["report"]["loaded"]) == 249
    assert sorted(os.listdir(folder)) == ["small.pth", "small.safetensors", "small.yaml"]


def test_convert_replaces_no_file_of_the_users(capsys, folder):
    before = (folder / "small.pth").read_bytes()
    status, _, err = run(capsys, "convert", "small.yaml", "small.pth", "-o", "small.pth")
    assert status == 1 and "TM1701" in err and "--force" in err and (folder / "small.pth").read_bytes() == before
    assert run(capsys, "convert", "small.yaml", "small.pth", "-o", "small.pth", "--force")[0] == 0
    for output in (".", "no/such.safetensors"):
        status, _, err = run(capsys, "convert", "small.yaml", "small.pth", "-o", output)
        assert status == 1 and "TM1701" in err


def test_convert_of_what_does_not_fit_writes_nothing(capsys, folder):
    arguments = ("convert", "small.yaml", "small.pth", "-o", "out.safetensors", "--set", "classes=3")
    status, out, err = run(capsys, *arguments)
    assert status == 1 and out == "" and err.startswith("error: the checkpoint does not fit") and "[3, 64]" in err
    assert "out.safetensors" not in os.listdir(folder)
    status, out, err = run(capsys, *arguments, "--allow", "head.classifier.*")
    assert (status, err) == (0, "") and "fresh           2" in out


def test_convert_for_a_dense_backbone(capsys):
    arguments = ("convert", "small.yaml", "small.pth", "-o", "dense.safetensors", "--dense", "--allow", "norms.*")
    assert run(capsys, *arguments)[0] == 1
    assert run(capsys, *arguments, "--allow", "head.*")[0] == 0


def test_inspect_speaks_four_formats_and_tells_the_fit(capsys):
    status, out, err = run(capsys, "inspect", "small.pth", "--spec", "small.yaml")
    assert (status, err) == (0, "") and "stem.weight" in out and "16x3x7x7" in out
    assert "nested entry model: 249 tensors (shown)" in out and "fits small.yaml" in out
    _, out, _ = run(capsys, "inspect", "small.pth", "--format", "json")
    record = json.loads(out)
    assert record["kind"] == "torch" and record["entries"] == {"model": 249}
    assert record["rows"][0] == {"entry": "stem.weight", "shape": "16x3x7x7", "dtype": "float32"}
    _, out, _ = run(capsys, "inspect", "small.pth", "--format", "csv")
    assert out.splitlines()[:2] == ["entry,shape,dtype", "stem.weight,16x3x7x7,float32"]
    assert run(capsys, "inspect", "small.pth", "--format", "markdown")[1].startswith("| entry |")


def test_inspect_of_a_file_that_does_not_fit(capsys):
    status, out, err = run(capsys, "inspect", "small.pth", "--spec", "mixformer_b0")
    assert status == 1 and "stem.weight" in out and "fits no layout" in err
    status, out, _ = run(capsys, "inspect", "small.pth", "--spec", "mixformer_b0", "--format", "json")
    record = json.loads(out)
    assert status == 1 and record["fits"] is False and "fits no layout" in record["problem"]


def test_inspect_answers_before_it_lists(capsys, folder):
    _, out, _ = run(capsys, "inspect", "small.pth", "--spec", "small.yaml")
    assert out.index("fits small.yaml") < out.index("stem.weight")
    for flags in (("--layout", "official"), ("--allow", "head.*"), ("--dense",), ("--set", "classes=3")):
        status, out, err = run(capsys, "inspect", "small.pth", *flags)
        assert (status, out) == (2, "") and "--spec SPEC" in err and flags[0] in err
    state = {key: tensor * float("nan") for key, tensor in tokenmix.build("small.yaml").state_dict().items()}
    torch.save(state, "nan.pth")
    assert "not finite    249" in run(capsys, "inspect", "nan.pth", "--spec", "small.yaml")[1]
    assert "NaN or infinity in stem.weight" in run(capsys, "inspect", "nan.pth")[1]
    assert len(json.loads(run(capsys, "inspect", "nan.pth", "--format", "json")[1])["not_finite"]) == 249


def test_a_file_without_tensors_is_answered_alike(capsys):
    torch.save({"epoch": 3}, "empty.pth")
    for arguments in (
        ("inspect", "empty.pth"),
        ("inspect", "empty.pth", "--spec", "small.yaml"),
        ("convert", "small.yaml", "empty.pth", "-o", "out.safetensors"),
    ):
        status, out, err = run(capsys, *arguments)
        assert (status, out) == (2, "") and "empty.pth holds no tensors" in err


def test_wrong_files_specs_and_layouts_are_answered_in_words(capsys, folder):
    (folder / "bad.pth").write_bytes(b"PK\x03\x04" + bytes(30))
    (folder / "bad.yaml").write_text("layout: 1\nkeys:\n  a.{i: b\n")
    for arguments, status, words in (
        (("inspect", "bad.pth"), 2, "error: bad.pth is cut off"),
        (("inspect", "no.pth"), 2, "error: there is no file no.pth"),
        (("inspect", "small.pth", "--spec", "atmnet_xtt"), 1, "TM1005"),
        (("convert", "atmnet_xt", "no.pth", "-o", "x"), 2, "error: there is no file no.pth"),
        (("convert", "small.yaml", "small.pth", "-o", "x", "--layout", "bad.yaml"), 1, "TM1801"),
        (("convert", "small.yaml", "small.pth", "-o", "x", "--layout", "offical"), 1, "did you mean `official`"),
        (("convert", "small.yaml", "small.pth", "-o", "x", "--entry", "ema"), 2, "has no entry `ema`"),
        (("convert", "small.yaml", "small.pth"), 2, "-o"),
        ((), 2, "ACTION"),
    ):
        found, _, err = run(capsys, *arguments)
        assert found == status and words in err and "Traceback" not in err, (arguments, err)
