"""A module that cannot be exported is told in one message: torch's own dump of its half-made graph is not."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from partitioner.quiet import quiet_torch

_BAD = """
import torch
class Bad(torch.nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x
        return -x
def bad():
    return Bad(), (torch.randn(2, 3),)
"""


def test_the_command_says_only_its_own(tmp_path: Path) -> None:
    (tmp_path / "branching_model.py").write_text(_BAD)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TORCH")}
    ended = subprocess.run(
        [sys.executable, "-m", "splitnet", "profile", "py:branching_model:bad", "-o", "out.json"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert ended.returncode == 2, ended.stderr
    assert ended.stdout == ""
    assert "cannot be exported" in ended.stderr
    assert "branching_model.py:5" in ended.stderr
    assert "def forward" not in ended.stderr
    assert len(ended.stderr.splitlines()) <= 3, ended.stderr


def test_only_this_thread_and_only_torch_is_silent(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_LOGS", raising=False)
    stream = sys.stderr
    other = threading.Thread(target=lambda: print("from elsewhere", file=sys.stderr))
    handler = logging.StreamHandler(stream)
    logging.getLogger().addHandler(handler)
    try:
        with quiet_torch():
            print("from here", file=sys.stderr)
            logging.getLogger("torch.export").warning("torch's")
            logging.getLogger("torchish").warning("mine")
            other.start()
            other.join()
    finally:
        logging.getLogger().removeHandler(handler)
    said = capsys.readouterr().err
    assert sys.stderr is stream
    assert "from elsewhere" in said
    assert "mine" in said
    assert "from here" not in said
    assert "torch's" not in said
    assert handler.filters == []


def test_who_asks_torch_for_its_log_gets_it(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_LOGS", "export")
    with quiet_torch():
        print("here", file=sys.stderr)
    assert "here" in capsys.readouterr().err
