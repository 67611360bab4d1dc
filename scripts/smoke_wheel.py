"""The wheel as a stranger meets it: built, listed, installed without torch into an empty environment, run from another directory,
and talking to nodes that serve a model.

    .venv/bin/python scripts/smoke_wheel.py

Needs the package index, which the tests do not; `make check` runs it.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import numpy as np
import torch

import partitioner
import splitnet
from nodes.testing import LocalCluster

ROOT = Path(__file__).resolve().parent.parent

CLIENT = """
import sys
import numpy, splitnet
assert "site-packages" in splitnet.__file__, splitnet.__file__
address, inputs, outputs = sys.argv[1:]
with splitnet.Client(address) as client:
    answer = client.infer(dict(numpy.load(inputs)))
    assert [spec.name for spec in client.outputs] == list(answer), (client.outputs, list(answer))
numpy.savez(outputs, **answer)
assert not {"torch", "networkx"} & set(sys.modules)
"""


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(16, 64), torch.nn.GELU(), torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 4)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def call(*command: str | Path, cwd: Path, status: int = 0) -> str:
    """Runs a command; its output. Ends this program where the exit status is another than `status`."""
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    if done.returncode != status:
        sys.exit(f"smoke-wheel: {command} ended with {done.returncode}, expected {status}:\n{done.stdout}")
    return done.stdout


def install(wheel: Path, scratch: Path) -> Path:
    """A new environment with the wheel and its core dependencies only; its directory of programs."""
    venv.create(scratch / "venv", with_pip=True)
    programs = scratch / "venv" / "bin"
    pip = (programs / "python", "-m", "pip", "--disable-pip-version-check")
    call(*pip, "install", "-q", "-c", ROOT / "constraints.txt", wheel, cwd=scratch)
    call(*pip, "check", cwd=scratch)
    assert "torch" not in call(*pip, "list", cwd=scratch)
    return programs


def commands_work(programs: Path, elsewhere: Path) -> None:
    assert call(programs / "splitnet", "--version", cwd=elsewhere) == f"splitnet {splitnet.__version__}\n"
    assert "Start a node server" in call(programs / "splitnet", "--help", cwd=elsewhere)
    for command in ("run", "deploy", "status", "doctor"):
        call(programs / "splitnet", command, "--help", cwd=elsewhere)
    told = call(programs / "splitnet", "plan", "py:shop:model", "--cluster", "c.toml", "-o", "plan.json", cwd=elsewhere, status=2)
    assert "splitnet[planner]" in told or "c.toml" in told, told
    told = call(programs / "splitnet", "node", "--listen", "127.0.0.1:0", cwd=elsewhere, status=2)
    assert "pip install 'splitnet[node]'" in told, told
    call(programs / "splitnet", "doctor", cwd=elsewhere, status=1)


def client_works(programs: Path, scratch: Path) -> None:
    torch.manual_seed(0)
    module = Model().eval()
    inputs = torch.randn(5, 16)
    (scratch / "client.py").write_text(CLIENT)
    np.savez(scratch / "inputs.npz", x=inputs.numpy())
    with LocalCluster(3) as nodes:
        model = partitioner.capture(module, {"x": torch.randn(2, 16)})
        plan = partitioner.plan(partitioner.profile(model), nodes.cluster(), objective="throughput")
        splitnet.deploy(plan, partitioner.cut(model, plan, scratch / "shards"))
        call(programs / "python", "client.py", plan.ingress.address, "inputs.npz", "outputs.npz", cwd=scratch)
    (answer,) = np.load(scratch / "outputs.npz").values()
    with torch.inference_mode():
        assert np.array_equal(answer, module(inputs).numpy()), "the client's answer is not the module's"


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="splitnet-smoke-") as directory:
        scratch = Path(directory)
        call(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", scratch, ROOT, cwd=scratch)
        (wheel,) = scratch.glob("*.whl")
        call(Path(sys.executable).parent / "check-wheel-contents", wheel, cwd=ROOT)
        programs = install(wheel, scratch)
        commands_work(programs, scratch)
        client_works(programs, scratch)
    print("smoke-wheel: built, installed without torch, and answered from three nodes")


if __name__ == "__main__":
    main()
