"""What an honest but curious node can make of what it is sent: a decoder that is trained to tell inputs from activations.

The attacker knows the model (a node holds a part of it, and weights leak), has samples like those that it attacks, and makes pairs of input and activation itself. With them it
fits two decoders, ridge regression and a network with one hidden layer, and keeps what does better on pairs that it has set aside. This is black-box inversion as
of He, Zhang & Lee, Model Inversion Attacks against Collaborative Inference (ACSAC 2019). A stronger attacker may see more: what this one sees is the least that is seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

__all__ = ["MOST_VALUES", "Likeness", "invert", "likeness"]

MOST_VALUES = 16384  #: of an input that is attacked; larger ones take longer than this is worth
_FEATURES = 4096  # of an activation; larger ones are projected at random
_HIDDEN = 512
_EPOCHS = 30
_RIDGES = (1e-3, 1e-1, 1e1, 1e3)


@dataclass(frozen=True, slots=True)
class Likeness:
    """How alike pictures (or other inputs) are. `psnr_db`: peak signal to noise, from the mean squared error of all; 99 at most. `ssim`: of images, structural similarity (Wang, Bovik,
    Sheikh & Simoncelli 2004, uniform windows of 7, or as large as the image): 1 for the same; nan where the input is no image."""

    psnr_db: float
    ssim: float


def invert(known: np.ndarray, inputs: np.ndarray, seen: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """What the attacker takes the inputs of `seen` for. `known` are activations (n, ...) of `inputs` (n, ...); float32, in the shape of the inputs."""
    with torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(seed)
        a, b = _features(known, seen, seed)
        x = torch.from_numpy(np.ascontiguousarray(inputs.reshape(len(inputs), -1), np.float32))
        middle, spread = a.mean(0), a.std(0).clamp_min(1e-6)
        a, b = (a - middle) / spread, (b - middle) / spread
        mean = x.mean(0)
        held = torch.arange(len(a)) % 8 == 0  # by which it chooses
        fits: list[torch.nn.Module] = [_ridge(a[~held], (x - mean)[~held], by) for by in _RIDGES]
        fits.append(_network(a[~held], (x - mean)[~held], a[held], (x - mean)[held]))
        with torch.no_grad():
            errors = [float(((fit(a[held]) - (x - mean)[held]) ** 2).mean()) for fit in fits]
            found = fits[int(np.argmin(errors))](b) + mean
        low, high = float(x.min()), float(x.max())
        guess: np.ndarray = found.clamp(low, high).numpy().reshape(len(seen), *inputs.shape[1:])
        return guess


def likeness(truth: np.ndarray, found: np.ndarray) -> Likeness:
    """Peak and window constants are of the range that the true inputs have."""
    span = float(truth.max() - truth.min()) or 1.0
    error = float(np.square(truth.astype(np.float64) - found).mean())
    psnr = 99.0 if error == 0 else min(10 * np.log10(span**2 / error), 99.0)
    if truth.ndim != 4 or min(truth.shape[2:]) < 3:
        return Likeness(float(psnr), float("nan"))
    window = min(7, *truth.shape[2:])
    x, y = (torch.from_numpy(np.ascontiguousarray(side, np.float64)) for side in (truth, found))

    def mean(values: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(values, window, 1)

    mx, my = mean(x), mean(y)
    vx, vy, both = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
    alike = (2 * mx * my + c1) * (2 * both + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return Likeness(float(psnr), float(alike.mean()))


def _features(known: np.ndarray, seen: np.ndarray, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = (torch.from_numpy(np.ascontiguousarray(side.reshape(len(side), -1), np.float32)) for side in (known, seen))
    if a.shape[1] > _FEATURES:
        down = torch.randn(a.shape[1], _FEATURES, generator=torch.Generator().manual_seed(seed)) / a.shape[1] ** 0.5
        a, b = a @ down, b @ down
    return a, b


def _ridge(a: torch.Tensor, x: torch.Tensor, by: float) -> torch.nn.Linear:
    """In the dual, where there are fewer pairs than features."""
    if len(a) < a.shape[1]:
        weights = a.T @ torch.linalg.solve(a @ a.T + by * torch.eye(len(a)), x)
    else:
        weights = torch.linalg.solve(a.T @ a + by * torch.eye(a.shape[1]), a.T @ x)
    fit = torch.nn.Linear(a.shape[1], x.shape[1], bias=False)
    fit.weight.data = weights.T.contiguous()
    return fit


def _network(a: torch.Tensor, x: torch.Tensor, a_held: torch.Tensor, x_held: torch.Tensor) -> torch.nn.Module:
    """As it was when it did best on what was set aside."""
    net = torch.nn.Sequential(torch.nn.Linear(a.shape[1], _HIDDEN), torch.nn.ReLU(), torch.nn.Linear(_HIDDEN, x.shape[1]))
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=1e-2)
    best, kept = float("inf"), {name: value.clone() for name, value in net.state_dict().items()}
    for _ in range(_EPOCHS):
        for chosen in torch.randperm(len(a)).split(64):
            optimiser.zero_grad()
            torch.nn.functional.mse_loss(net(a[chosen]), x[chosen]).backward()
            optimiser.step()
        with torch.no_grad():
            error = float(((net(a_held) - x_held) ** 2).mean())
        if error < best:
            best, kept = error, {name: value.clone() for name, value in net.state_dict().items()}
    net.load_state_dict(kept)
    return net
