"""Node processes on this machine, as somebody would start them on three boxes."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from splitnet.errors import NodeUnavailable

__all__ = ["running_nodes"]

_START_S = 60.0
_STOP_S = 15.0
_PATIENT = ("--patience", "5")  # they share the cores of one machine, with whatever else runs there: one that is late is not lost


@contextlib.contextmanager
def running_nodes(names: Sequence[str], threads: int = 1, options: Sequence[str] = ()) -> Iterator[dict[str, str]]:
    """`options`: more of `splitnet node`. Starts `splitnet node` once per name on a free port of the loopback interface; yields name -> address. Stops them at the
    end, and removes what they stored. Raises NodeUnavailable, with the end of its log, for a node that does not start."""
    with tempfile.TemporaryDirectory(prefix="splitnet-demo-") as folder, contextlib.ExitStack() as stack:
        started = [(name, stack.enter_context(_process(name, Path(folder) / name, threads, options))) for name in names]
        yield {name: _address(name, process, Path(folder) / name) for name, process in started}


@contextlib.contextmanager
def _process(name: str, home: Path, threads: int, options: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    home.mkdir()
    command = [
        sys.executable, "-m", "splitnet", "node", "--listen", "127.0.0.1:0", "--name", name, "--threads", str(threads),
        "--data", str(home / "data"), "--announce", str(home / "address"), "--log-json", *_PATIENT, *options,
    ]  # fmt: skip
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _address(name: str, process: subprocess.Popen[bytes], home: Path) -> str:
    announced, deadline = home / "address", time.monotonic() + _START_S
    while process.poll() is None and time.monotonic() < deadline:
        if announced.exists() and (address := announced.read_text().strip()):
            return address
        time.sleep(0.02)
    tail = (home / "log").read_text(errors="replace")[-2000:]
    raise NodeUnavailable(f"node {name!r} did not start:\n{tail}", remedy="run `splitnet doctor`")
