from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import splitnet
import splitnet.errors

PACKAGES = ("splitnet", "partitioner", "nodes")


def _modules(repository: Path) -> list[Path]:
    found = [path for package in PACKAGES for path in sorted((repository / package).rglob("*.py"))]
    return [path for path in found if "rpc" not in path.parts]


@pytest.mark.parametrize("package", ["splitnet", "partitioner", "nodes.testing"])
def test_every_public_name_of_a_package_can_be_imported(package: str) -> None:
    module = importlib.import_module(package)
    assert module.__all__ == sorted(set(module.__all__))
    for name in module.__all__:
        assert getattr(module, name) is not None
        assert name in dir(module)


def test_every_error_is_a_public_name() -> None:
    assert {name for name in splitnet.errors.__all__ if name != "error_class"} <= set(splitnet.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'splitnet' has no attribute 'nonsense'"):
        splitnet.nonsense  # noqa: B018
    with pytest.raises(ImportError, match="nonsense"):
        from splitnet import nonsense  # noqa: F401


def test_no_public_name_is_also_a_module(repository: Path) -> None:
    """Importing the module `splitnet.x` would put it in the place of the name `splitnet.x`."""
    for package in ("splitnet", "partitioner"):
        modules = {path.stem for path in (repository / package).iterdir()}
        assert modules & set(importlib.import_module(package).__all__) == set()


@pytest.mark.parametrize(
    "module",
    [
        "splitnet",
        "splitnet.client",
        "splitnet.sync",
        "splitnet.install",
        "splitnet.cli",
        "splitnet.commands.install",
        "splitnet.commands.run",
    ],
)
def test_being_a_client_loads_neither_torch_nor_the_other_packages(module: str) -> None:
    heavy = ("torch", "networkx", "transformers", "safetensors", "sklearn", "partitioner", "nodes")
    program = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_importing_splitnet_alone_loads_not_even_numpy() -> None:
    program = "import sys, splitnet; print([name for name in ('numpy', 'grpc', 'google.protobuf', 'click') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_no_file_is_longer_than_a_reader_can_hold(repository: Path) -> None:
    long = {
        str(path.relative_to(repository)): length for path in _modules(repository) if (length := len(path.read_text().splitlines())) > 400
    }
    assert long == {}, "two nouns live in one room"
