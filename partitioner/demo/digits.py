"""A small convolutional network, trained there and then on scikit-learn's handwritten digits (Alpaydin, Kaynak, UCI 1998)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from splitnet.errors import MissingExtra

__all__ = ["Digits", "load_digits", "model_and_inputs", "train"]

_EPOCHS = 12
_SEED = 7


class Digits(NamedTuple):
    """Images float32 of (n, 1, 8, 8) in [0, 1], labels int64 of (n,)."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def load_digits() -> Digits:
    """1,347 images to train on and 450 held out, always the same."""
    try:
        from sklearn import datasets
    except ImportError:
        raise MissingExtra("the demo needs scikit-learn for its digits", remedy="pip install 'splitnet[demo]'") from None
    raw = datasets.load_digits()
    images = (raw.images[:, None] / 16).astype(np.float32)
    labels = raw.target.astype(np.int64)
    order = np.random.default_rng(_SEED).permutation(len(images))
    held_out, rest = order[:450], order[450:]
    return Digits(images[rest], labels[rest], images[held_out], labels[held_out])


def train(digits: Digits):  # type: ignore[no-untyped-def]  # torch.nn.Module: torch is imported where it is used
    """The trained network in evaluation mode: (n, 1, 8, 8) images to (n, 10) logits. A few seconds on one core."""
    import torch
    from torch import nn

    torch.manual_seed(_SEED)
    net = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64 * 2 * 2, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip
    images, labels = torch.from_numpy(digits.train_images), torch.from_numpy(digits.train_labels)
    optimiser = torch.optim.Adam(net.parameters(), lr=2e-3)
    for _ in range(_EPOCHS):
        for chosen in torch.randperm(len(images)).split(64):
            optimiser.zero_grad()
            nn.functional.cross_entropy(net(images[chosen]), labels[chosen]).backward()
            optimiser.step()
    return net.eval()


def model_and_inputs():  # type: ignore[no-untyped-def]
    """A factory for the command line: `splitnet profile py:partitioner.demo.digits:model_and_inputs`."""
    import torch

    digits = load_digits()
    return train(digits), (torch.from_numpy(digits.test_images[:2]),)
