"""The attacker sees the raw input, less of it behind the model, and less with noise; `splitnet privacy` says so."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from partitioner.inversion import invert, likeness
from partitioner.privacy_command import privacy
from splitnet.cli import run_command
from splitnet.noise import Noise
from splitnet.releasing import release

_FACTORY = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 4))
    return net.eval(), (torch.zeros(2, 1, 8, 8),)

class Mixing(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = self.first(x)
        return self.last(x - x.mean(0, keepdim=True))

def mixing():
    return Mixing().eval(), (torch.zeros(4, 4),)
"""


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """Smooth pictures, so that there is something to learn."""
    coarse = torch.rand(240, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, size=(8, 8), mode="bilinear").numpy()


def test_the_attacker_sees_less_behind_the_model_and_with_noise(images: np.ndarray) -> None:
    learn, test = images[:180], images[180:]
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3), torch.nn.Tanh()).eval()

    def seen(known: np.ndarray, there: np.ndarray) -> float:
        return likeness(test, invert(known, learn, there)).psnr_db

    def noised(values: np.ndarray, epsilon: float) -> np.ndarray:
        return release({"x": values}, Noise(epsilon, 1e-6, 8.0), {"x": 0})["x"]

    guessing = likeness(test, np.broadcast_to(learn.mean(0), test.shape)).psnr_db
    raw = seen(learn, test)
    with torch.no_grad():
        behind = seen(net(torch.from_numpy(learn)).numpy(), net(torch.from_numpy(test)).numpy())
    some, much = (seen(noised(learn, epsilon), noised(test, epsilon)) for epsilon in (1000.0, 1.0))
    assert raw > 40
    assert raw > behind + 10 > guessing + 10
    assert raw > some + 5 > much + 5
    assert much < guessing + 0.7


def test_likeness() -> None:
    x = np.random.default_rng(0).random((4, 1, 8, 8)).astype(np.float32)
    same, off = likeness(x, x), likeness(x, np.clip(x + 0.1, 0, 1.2))
    assert same.psnr_db == 99
    assert same.ssim == pytest.approx(1)
    assert off.psnr_db == pytest.approx(20 + 20 * np.log10(float(x.max() - x.min())), abs=0.5)
    assert likeness(x, x[::-1]).ssim < 0.5


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"exposed_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(_FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def test_the_command_measures_each_cut(factory: str, images: np.ndarray, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez("x.npz", input=images[:96])
    arguments = [
        f"py:{factory}:build",
        "--data",
        "x.npz",
        "--metric",
        "top1",
        "--at",
        "4",
        "--epsilon",
        "1",
        "--epsilon",
        "10000",
    ]
    assert run_command(privacy, prog_name="splitnet privacy", args=[*arguments, "--json"]) == 0
    (cut,) = json.loads(capsys.readouterr().out)["cuts"]
    assert [one["epsilon"] for one in cut["exposed"]] == [None, 10000, 1]
    assert cut["clip_norm"] == cut["norms"][1] > 0
    assert cut["values"] == 64
    plain, little, much = cut["exposed"]
    assert plain["loss"] == 0 <= little["loss"] <= 1
    assert plain["seen"]["psnr_db"] > cut["guessed"]["psnr_db"] + 5
    assert much["seen"]["psnr_db"] < plain["seen"]["psnr_db"] - 5


def test_samples_that_depend_on_each_other_are_refused(factory: str, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez("x.npz", x=np.random.default_rng(0).standard_normal((40, 4)).astype(np.float32))
    assert (
        run_command(
            privacy,
            prog_name="splitnet privacy",
            args=[f"py:{factory}:mixing", "--data", "x.npz", "--metric", "mse", "--at", "last", "--no-attack"],
        )
        != 0
    )
    assert "depends on the others in its batch" in capsys.readouterr().err
