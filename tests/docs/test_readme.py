"""What the README shows is what happens."""

import re
from pathlib import Path

import pytest
import torch

import tokenmix
from tokenmix.cli import main
from tokenmix.runtime.audit import audit

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def fenced(language):
    return [text for info, text in re.findall(r"^```(\w*)\n(.*?)^```$", README, re.M | re.S) if info == language]


@pytest.fixture
def hybrid(tmp_path, monkeypatch):
    (text,) = fenced("yaml")
    monkeypatch.chdir(tmp_path)
    Path("my_hybrid.yaml").write_text(text)
    return "my_hybrid.yaml"


def test_the_report_in_the_readme_is_the_one_that_build_prints(capsys, tmp_path, monkeypatch):
    shown = fenced("")[0]
    monkeypatch.chdir(tmp_path)
    assert main(["build", "mixformer_b4"]) == 0

    def steady(text):  # all but the seconds
        return re.sub(r"\d+\.\d+ s", "_ s", text).strip()

    assert steady(capsys.readouterr().out) == steady(shown)


def test_the_hybrid_is_checked_counted_built_audited_and_trained(hybrid, capsys):
    for line in fenced("sh")[2].splitlines():
        words = line.split("#")[0].split()
        assert words[0] == "tokenmix" and main(words[1:]) == 0, line
    capsys.readouterr()
    assert tokenmix.load(hybrid).cost("800x1280")["mac"] > 40e9
    model = tokenmix.build(hybrid, num_classes=10)
    model(torch.randn(2, 3, 64, 96)).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    maps = tokenmix.build(hybrid, features_only=True)(torch.randn(2, 3, 64, 96))
    assert [m.shape[1] for m in maps] == [64, 128, 256]
    assert audit(tokenmix.load(hybrid), (256, 320)).findings == []


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_ci_runs_the_readmes_test_command():
    assert fenced("sh")[1].strip() in (ROOT / ".ci" / "run").read_text()
