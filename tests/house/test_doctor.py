from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from splitnet import fitness
from splitnet.cli import main


def _findings(capsys: pytest.CaptureFixture[str]) -> tuple[bool, dict[str, dict[str, str]]]:
    document = json.loads(capsys.readouterr().out)
    return document["fit"], {finding["name"]: finding for finding in document["findings"]}


def test_this_box_is_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["doctor", "--json", "--data", str(tmp_path / "new")])
    fit, findings = _findings(capsys)
    assert fit, [finding for finding in findings.values() if finding["state"] == "failure"]
    assert status == 0
    assert "torch-graph" in findings["engines"]["finding"]
    assert "torch" in findings["extra node"]["finding"]
    assert not (tmp_path / "new").exists(), "a doctor changes nothing"


def test_what_is_missing_comes_with_its_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "blocked").write_text("a file where a directory should be")
    monkeypatch.setattr(fitness, "_requirements", lambda: {"": ("numpy",), "node": ("surely-not-installed",), "hf": ("neither-is-this",)})
    monkeypatch.setattr(fitness, "_ASK_TORCH", "import os, signal; os.kill(os.getpid(), signal.SIGILL)")
    monkeypatch.setattr(fitness, "_ASK_ENGINES", "raise ImportError('no engine here')")
    assert main(["doctor", "--json", "--data", str(tmp_path / "blocked" / "data")]) == 1
    fit, findings = _findings(capsys)
    assert not fit
    assert findings["extra node"]["state"] == "failure"
    assert findings["extra node"]["remedy"] == "pip install 'splitnet[node]'"
    assert findings["extra hf"]["state"] == "warning"
    assert "signal 4" in findings["torch"]["finding"]
    assert "no engine here" in findings["engines"]["finding"]
    assert findings["disk"]["state"] == "failure"


def test_a_distribution_with_the_same_package_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "nodes").mkdir()
    (tmp_path / "nodes" / "__init__.py").write_text("")
    stranger = tmp_path / "roman_nodes-1.0.dist-info"
    stranger.mkdir()
    (stranger / "METADATA").write_text("Metadata-Version: 2.1\nName: roman-nodes\nVersion: 1.0\n")
    (stranger / "RECORD").write_text("nodes/__init__.py,,\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    finding = fitness._names()
    assert finding.state == "failure"
    assert "nodes (also from roman-nodes)" in finding.finding


def test_the_report_for_people_says_what_to_do(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    failing = fitness.Finding("disk", "failure", "/srv cannot be written by this user", "choose another directory")
    monkeypatch.setattr(fitness, "examine", lambda data_dir: (fitness.Finding("python", "ok", "Python 3.12"), failing))
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "FAIL  disk" in out
    assert "remedy: choose another directory" in out
    assert out.endswith("This box is not fit to be a node yet.\n")


def test_a_child_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitness, "_CHILD_DEADLINE_S", 0.2)
    with pytest.raises(fitness._ChildFailed, match="no answer"):
        fitness._ask("import time; time.sleep(20)")
    assert sys.executable
