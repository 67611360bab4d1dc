"""A small network that was really trained on scikit-learn's digits, as a user has it: a factory, and held-out images with labels in a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from trained_digits import Trained

from partitioner.capturing import capture
from partitioner.demo.digits import load_digits

_FACTORY = """
import torch
from torch import nn

def build():
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10)
    )
    net.load_state_dict(torch.load({weights!r}, weights_only=True))
    return net.eval(), (torch.zeros(2, 1, 8, 8),)
"""


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("digits")
    digits = load_digits()
    torch.manual_seed(3)
    nn = torch.nn
    layers = [
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    ]
    net = nn.Sequential(*layers)
    images, labels = torch.from_numpy(digits.train_images), torch.from_numpy(digits.train_labels)
    optimiser = torch.optim.Adam(net.parameters(), lr=5e-3)
    for _ in range(5):
        for chosen in torch.randperm(len(images)).split(64):
            optimiser.zero_grad()
            nn.functional.cross_entropy(net(images[chosen]), labels[chosen]).backward()
            optimiser.step()
    net.eval()
    torch.save(net.state_dict(), folder / "net.pt")
    (folder / "digits_net.py").write_text(_FACTORY.format(weights=str(folder / "net.pt")))
    graph = capture(net, (torch.zeros(2, 1, 8, 8),), name="build")
    held_out, right = digits.test_images[:200], digits.test_labels[:200]
    np.savez(folder / "digits.npz", **{graph.structure.inputs[0].name: held_out, "labels": right})
    return Trained(folder, "py:digits_net:build", folder / "digits.npz", net, graph, held_out, right)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: Trained) -> Path:
    """An empty cache, and the current directory that holds the factory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(trained.folder)
    monkeypatch.syspath_prepend(str(trained.folder))
    return tmp_path / "cache"
