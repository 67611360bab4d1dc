from __future__ import annotations

import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

PACKAGES = {"splitnet", "partitioner", "nodes"}


@pytest.fixture(scope="module")
def wheel(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    subprocess.run(command, cwd=repository, check=True, capture_output=True)
    (file,) = out.glob("*.whl")
    return zipfile.ZipFile(file)


def test_it_holds_exactly_three_packages(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert tops >= PACKAGES
    (metadata,) = tops - PACKAGES
    assert metadata.endswith(".dist-info")


def test_it_holds_what_git_holds_of_them(wheel: zipfile.ZipFile, repository: Path) -> None:
    held = {name for name in wheel.namelist() if name.split("/")[0] in PACKAGES}
    listed = subprocess.run(["git", "ls-files", *sorted(PACKAGES)], cwd=repository, check=False, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git working tree")
    assert set(listed.stdout.split()) <= held
    assert all(f"{package}/py.typed" in held for package in PACKAGES)
    assert "splitnet/rpc/v1/node_pb2.py" in held
    assert not [name for name in held if name.endswith((".pyc", ".pkl", ".pt", ".part"))]


def test_its_metadata(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(wheel.read(name).decode())
    assert metadata["License-Expression"] == "Apache-2.0"
    assert any(name.endswith("/licenses/LICENSE") for name in wheel.namelist())
    core = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert not [line for line in core if line.startswith(("torch", "networkx", "transformers", "safetensors", "scipy"))]
