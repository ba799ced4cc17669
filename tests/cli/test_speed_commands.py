"""`tokenmix bench`, `profile` and `doctor`: what they report, not how fast anything is."""

import argparse
import json

import pytest
import torch

from tokenmix.blocks.kernels import FAST
from tokenmix.cli import bench_command, main
from tokenmix.runtime.bench import Setting, Timing, gemm_rate, interleaved, opponent, peak_bytes, tensor_float32

SPEC = """\
tokenmix: 1
name: small
input: [3, 32, 32]
stem: conv(out=8, kernel=4, stride=4, padding=0)
stages:
  - {blocks: mlp(expand=2), repeat: 2}
head: norm_mean_head(classes=4)
"""


@pytest.fixture
def spec(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(SPEC)
    return str(path)


def test_bench_reports_every_contestant(spec, tmp_path, capsys):
    rival = tmp_path / "rival.py"
    rival.write_text(
        "from torch import nn\n\n\nclass Rival(nn.Sequential):\n"
        "    def __init__(self):\n        super().__init__(nn.Flatten(), nn.Linear(3072, 4))\n"
    )
    arguments = [spec, "--batch", "1,2", "--rounds", "3", "--format", "json"]
    assert main(["bench", *arguments, "--against", "reference", "--against", f"{rival}:Rival"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(r["model"], r["batch"]) for r in rows] == [
        (name, batch) for batch in (1, 2) for name in ("small", "reference", f"{rival}:Rival")
    ]
    assert all(len(r["times_ms"]) == 3 and r["peak_bytes"] > 0 and r["images_per_second"] > 0 for r in rows)
    assert all(r["page_faults"] >= 0 for r in rows)
    assert rows[3]["macs"] == 2 * rows[0]["macs"] and "macs" not in rows[2]
    for batch in (rows[:3], rows[3:]):
        assert [r["time_relative_to_first"] for r in batch] == [r["median_ms"] / batch[0]["median_ms"] for r in batch]


def test_a_rival_that_takes_twice_as_long_shows_2(capsys):
    setting, first, rival = Setting(1, (8, 8)), Timing("ours", (1.0,), 0), Timing("rival", (2.0,), 0)
    options = argparse.Namespace(format="table", kernels=None)
    bench_command._print([(setting, first, first, 1.0), (setting, rival, first, 1.0)], {}, options)
    out = capsys.readouterr().out
    assert out.splitlines()[-1].split()[-1] == "2.00" and "time / first" in out and "2.00 takes twice as long" in out


@pytest.mark.parametrize("allowed", [True, False])
def test_convolutions_and_products_are_rounded_alike_and_as_before_afterwards(allowed):
    def settings():
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    before = settings()
    with tensor_float32(allowed):
        assert settings() == (allowed, allowed)
    assert settings() == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("extra", [[], ["--tf32"]])
def test_the_rounding_on_a_gpu_is_told(spec, extra, capsys):
    assert main(["bench", spec, "--rounds", "1", "--device", "cuda", *extra]) == 0
    assert f"tf32: {'on' if extra else 'off'} in convolutions" in capsys.readouterr().out


@pytest.mark.parametrize("extra", [["--train"], ["--dtype", "bfloat16"], ["--size", "32x64"], ["--for-inference"]])
def test_bench_runs_every_kind_of_pass(spec, extra, capsys):
    assert main(["bench", spec, "--rounds", "1", *extra]) == 0
    out = capsys.readouterr().out
    assert "small" in out and ("training step" in out) == ("--train" in extra)


@pytest.mark.parametrize(
    ("against", "message"),
    [
        ("timm:no_such_model", "timm"),
        ("nothing", '"reference", "timm:NAME" or "FILE.py:CLASS"'),
        ("missing.py:Model", "there is no file missing.py"),
        ("broken.py:Model", "broken.py:Model cannot be made: NameError"),
        ("broken.py:open('x').read()", "write FILE.py:CLASS, or FILE.py:CLASS(width=64)"),
        ("broken.py:Model(depths=depths)", "with constants"),
    ],
)
def test_an_opponent_that_does_not_exist_is_refused(spec, against, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text("nonsense\n")
    assert main(["bench", spec, "--against", against, "--rounds", "1"]) == 2
    assert message in capsys.readouterr().err


def test_an_opponent_gets_its_arguments_and_finds_the_files_beside_it(spec, tmp_path, capsys):
    (tmp_path / "layers_of_rival.py").write_text("from torch import nn\n\nLayer = nn.Linear\n")
    (tmp_path / "rival.py").write_text(
        "from dataclasses import dataclass\n\nfrom torch import nn\n\nfrom layers_of_rival import Layer\n\n\n"
        "@dataclass\nclass Options:\n    widths: 'list[int]'\n\n\n"
        "class Rival(nn.Sequential):\n"
        "    def __init__(self, classes, widths=()):\n"
        "        sizes = [3072, *Options(widths).widths, classes]\n"
        "        super().__init__(nn.Flatten(), *(Layer(*pair) for pair in zip(sizes, sizes[1:])))\n"
    )
    name = f"{tmp_path}/rival.py:Rival(4, widths=[8, 16])"
    rival = opponent(name, None)
    assert [tuple(p.shape) for p in rival.parameters() if p.ndim == 2] == [(8, 3072), (16, 8), (4, 16)]
    assert main(["bench", spec, "--rounds", "1", "--against", name]) == 0
    assert name in capsys.readouterr().out


def test_a_checkpointed_step_stands_beside_the_plain_one(spec, capsys):
    arguments = ["bench", spec, "--rounds", "1", "--batch", "2", "--format", "json"]
    assert main([*arguments, "--train", "--checkpoint"]) == 0
    plain, checkpointed = json.loads(capsys.readouterr().out)["rows"]
    assert (plain["model"], checkpointed["model"]) == ("small", "small, checkpointed")
    assert checkpointed["macs"] == plain["macs"] and checkpointed["peak_bytes"] < plain["peak_bytes"]
    assert main([*arguments, "--checkpoint"]) == 2
    assert "give --train" in capsys.readouterr().err


@pytest.mark.parametrize("format", ["table", "csv", "markdown", "json"])
def test_kernels_run_alone(format, capsys):
    arguments = ["--kernels", "axial_sample", "--rounds", "1", "--batch", "1", "--threads", "1", "--format", format]
    assert main(["bench", *arguments, "--train"]) == 0
    out = capsys.readouterr().out
    assert out.count("axial_sample") == 16 and out.count("1x56x56x64, width") == 2
    if format == "json":
        rows = json.loads(out)["rows"]
        assert [r["pass"] for r in rows[:2]] == ["forward", "forward and backward"]
        assert rows[0]["bytes"] == 4 * 56 * 56 * (64 + 32 + 64) and rows[0]["share_of_copy"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give specs, or --kernels"),
        (["--kernels", "nothing"], "there is no fast kernel nothing; there are"),
        (["resnet18", "--kernels"], "no specs with it"),
        (["--kernels", "--size", "224"], "no --size with it"),
        (["--for-inference", "--kernels"], "no --for-inference with it"),
    ],
)
def test_specs_or_kernels(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["bench", "profile"])
@pytest.mark.parametrize("works", [True, False])
def test_memory_is_kept_or_it_is_told_why_not(spec, command, works, monkeypatch, capsys):
    from tokenmix.runtime import memory

    monkeypatch.setattr(memory, "keep_memory", lambda: works)
    assert main([command, spec, "--rounds", "1", "--keep-memory"]) == (0 if works else 2)
    assert ("--keep-memory needs glibc" in capsys.readouterr().err) is not works


def test_bench_tells_what_is_wrong_with_a_spec(tmp_path, capsys):
    path = tmp_path / "bad.yaml"
    path.write_text(SPEC.replace("expand=2", "expnad=2"))
    assert main(["bench", str(path)]) == 1
    assert "expnad" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_told(spec, capsys):
    assert main(["bench", spec, "--device", "cuda"]) == 2
    assert main(["profile", spec, "--device", "cuda"]) == 2
    assert main(["bench", spec, "--device", "foo"]) == 2
    err = capsys.readouterr().err
    assert err.count("no CUDA device") == 3 and "foo is no device" in err


def test_profile_names_blocks_as_the_graph_does_and_writes_a_trace(spec, tmp_path, capsys):
    assert main(["profile", spec, "--rounds", "1", "--format", "json"]) == 0
    blocks = json.loads(capsys.readouterr().out)["blocks"]
    assert [b["name"] for b in blocks] == ["stem", "stages.0.blocks.0", "stages.0.blocks.1", "head"]
    assert blocks[1]["macs"] == 2 * 64 * 8 * 16 and all(b["seconds"] > 0 for b in blocks)
    assert main(["profile", spec, "--rounds", "1", "--tensorboard", str(tmp_path / "traces")]) == 0
    assert "total" in capsys.readouterr().out
    assert list((tmp_path / "traces").glob("*.pt.trace.json"))


def test_doctor_names_every_fast_kernel(capsys):
    assert main(["doctor", "--format", "json"]) == 0
    report = json.loads(capsys.readouterr().out)
    named = {(k["kernel"], k["device"]) for k in report["kernels"]}
    assert named == {(kernel, device) for kernel in FAST for device in ("cpu", "cuda")}
    assert all(k["runs"] for k in report["kernels"]) and report["machine"]["torch"] == torch.__version__
    assert report["machine"]["allocator"]
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "why not faster" in out and "allocator" in out


def test_doctor_tells_why_kernels_cannot_be_built(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    assert main(["doctor", "--build-kernels"]) == 1
    assert "false failed" in capsys.readouterr().out


def test_peak_memory_is_what_lives_at_once():
    x = torch.zeros(1000)

    def chain():
        a = x
        for _ in range(10):
            a = a + 1  # the one before is still held while the next is made
        return a

    assert peak_bytes(chain, "cpu") == 2 * 4000
    assert peak_bytes(lambda: x.view(10, 100).t(), "cpu") == 0


def test_calls_take_turns():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    times = interleaved(calls, 2, warm_up=1)
    assert order == ["b", "a", "a", "b", "b", "a"] and {k: len(v) for k, v in times.items()} == {"a": 2, "b": 2}
    assert gemm_rate("cpu", "float32", side=64, rounds=1) > 0


def test_reference_kernels_give_the_same_result(spec):
    import tokenmix

    model = tokenmix.load("atmnet_xt", depths=[2, 2, 2, 2])
    fast, plain = tokenmix.build(model).eval(), opponent("reference", model).eval()
    plain.load_state_dict(fast.state_dict())
    images = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        torch.testing.assert_close(fast(images), plain(images), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="kernels is"):
        tokenmix.build(model, kernels="quick")
    assert Setting(1, (32, 32)).device == "cpu"


def test_build_writes_the_folded_source(tmp_path, capsys):
    output = tmp_path / "folded.py"
    assert main(["build", "resnet18", "--for-inference", "-o", str(output)]) == 0
    assert "BatchNorm2d(" not in output.read_text() and "all finite" in capsys.readouterr().out


def test_a_batch_too_small_to_train_is_told(tmp_path, capsys):
    path = tmp_path / "small.yaml"
    stage = "  - {down: 'conv(out=8, kernel=8, stride=8, padding=0)', blocks: squash}\n"
    text = SPEC.replace("  - {blocks", f"{stage}  - {{blocks")
    path.write_text(text + "definitions: |\n  block squash(x):\n      return x |> conv(C, 3) |> batch_norm\n")
    assert main(["bench", str(path), "--train", "--rounds", "1"]) == 2
    assert "give --batch 2 or more" in capsys.readouterr().err
