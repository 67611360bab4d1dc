"""A node with numpy and onnxruntime, where torch cannot be imported, loads and serves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
from small_models import chain, split, stages_by

import splitnet
from nodes.testing import LocalCluster
from splitnet.install import deploy

#: Starts a node where importing torch fails, as on a box that has none.
NODE = """
import importlib.util, sys

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "networkx", "onnx"):
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, NoTorch())
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in ("torch", "transformers", "onnx") else found(name, package)
from splitnet.cli import main
sys.exit(main())
"""


def test_a_box_without_torch_serves(tmp_path: Path) -> None:
    address = tmp_path / "address"
    script = tmp_path / "node.py"
    script.write_text(NODE)
    command = [sys.executable, str(script), "node", "--listen", "127.0.0.1:0", "--name", "a", "--engine", "onnx", "--threads", "1"]
    with (tmp_path / "log").open("wb") as log:
        node = subprocess.Popen([*command, "--data", str(tmp_path / "data"), "--announce", str(address)], stdout=log, stderr=log)
    try:
        with LocalCluster(1, names=["a"]) as stand_in:  # only to have a cluster's shape
            cluster = stand_in.cluster()
        for _ in range(600):
            if address.exists() or node.poll() is not None:
                break
            try:
                node.wait(0.05)
            except subprocess.TimeoutExpired:
                continue
        assert address.exists(), (tmp_path / "log").read_text()
        from dataclasses import replace

        there = replace(cluster, nodes=(replace(cluster.node("a"), address=address.read_text().strip()),))
        made = split(chain(), there, tmp_path / "shards", stages_by(a="*"))
        deploy(made.plan, made.shards, name="chain")
        with splitnet.Client(made.address, deployment="chain") as client:
            given = made.inputs(3)
            np.testing.assert_allclose(client.infer(given)["output"], made.whole(given)["output"], rtol=1e-5, atol=1e-6)
        mapped = Path(f"/proc/{node.pid}/maps").read_text()
        assert "onnxruntime" in mapped
        assert "libtorch" not in mapped
    finally:
        node.terminate()
        node.wait(20)
    assert "rror" not in (tmp_path / "log").read_text().replace("errors=0", "")
