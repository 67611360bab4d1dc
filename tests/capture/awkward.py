"""Modules that are awkward to divide, each for a reason of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


@dataclass
class Answer:
    hidden: torch.Tensor
    extra: torch.Tensor | None
    parts: tuple[torch.Tensor, ...]


class Nested(nn.Module):
    """Several inputs, a nested dict among them; a dict, a dataclass, a None and a list come back."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(3, 6)

    def forward(self, x: torch.Tensor, more: dict[str, Any], scale: float = 2.0) -> dict[str, Any]:
        a = self.first(x) * scale
        b = self.second(more["left"]) + more["rest"][0]
        return {"sum": a + b, "answer": Answer(a.tanh(), None, (b, a - b)), "none": None, "list": [a.mean(-1)]}


class Shared(nn.Module):
    """One weight used at both ends, as tied embeddings are; a layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 8)
        self.block = nn.Linear(8, 8)
        self.head = nn.Linear(8, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        return self.head(self.block(self.block(x).relu()) + x)


class Branches(nn.Module):
    """Parallel branches, a skip over everything, and a join of three."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.left = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1))
        self.right = nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(8, 8, 1))
        self.norm = nn.BatchNorm2d(8)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.stem(image)
        joined = torch.cat([self.left(x), self.right(x), x], 1)
        return self.norm(joined[:, 4:12] + x).flatten(1), image.mean((2, 3))


class State(nn.Module):
    """Buffers, a constant that is no buffer, a parameter without elements, and one that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("offset", torch.arange(5.0))
        self.register_buffer("table", torch.randn(7, 5, dtype=torch.float64), persistent=False)
        self.constant = torch.tensor([1.5, -2.0, 0.0, float("nan"), float("inf")])
        self.empty = nn.Parameter(torch.zeros(0, 5))
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([x + self.offset, self.empty], 0)
        return torch.maximum(x, self.constant).double() @ self.table.t()


class Passing(nn.Module):
    """Outputs that are an input, a parameter, one value twice, and plain numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: torch.Tensor) -> tuple[Any, ...]:
        y = x @ self.weight
        return x, self.weight, y, y, 7, 0.5, True, x.shape[0], x.shape[0] * 3 + 1


class Dtypes(nn.Module):
    """Every element type that may cross a cut."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        half, brain = x.half() * 3, x.bfloat16().exp()
        whole = (x * 100).long()
        return {
            "half": half.relu(), "brain": brain + 1, "double": x.double().sqrt(), "int8": (whole % 100).to(torch.int8),
            "uint8": (whole % 200).abs().to(torch.uint8), "int16": whole.short() * 2, "int32": whole.int() // 3,
            "bool": (whole > 3) & (x < 0.9), "order": x.argsort(-1), "count": (x > 0).sum(),
            "complex": torch.complex(x, x * 2) * 1j, "back": (half.float() + brain.float()).where(x > 0, x),
        }  # fmt: skip


class Spectrum(nn.Module):
    """Complex values, lazy conjugates, and a window."""

    def forward(self, wave: torch.Tensor) -> torch.Tensor:
        spectrum = torch.fft.rfft(wave * torch.hann_window(16))
        power = (spectrum * spectrum.conj()).real
        return torch.fft.irfft(torch.view_as_complex(torch.stack([power, spectrum.imag], -1)), n=16)


class Layouts(nn.Module):
    """Channels-last activations and weights, expanded, transposed and sliced tensors between the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1).to(memory_format=torch.channels_last)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.matrix = nn.Parameter(torch.randn(6, 8).t())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x.to(memory_format=torch.channels_last))
        wide = x.mean((2, 3), keepdim=True).expand(-1, -1, 6, 6)
        y = self.depthwise(x[:, :, 1:-1, 1:-1] + wide)
        q, k = y.permute(0, 2, 3, 1).flatten(1, 2).chunk(2, dim=1)
        return (q.transpose(1, 2) @ k).softmax(-1) @ self.matrix


class Slicing(nn.Module):
    """Sizes that move with the batch: halves of it, a doubled batch, positions, a causal mask, padding to a multiple."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        b, s, d = x.shape
        doubled = self.linear(torch.cat([x, x.flip(0)], 0))
        first, second = doubled[:b], doubled[b:]
        mask = torch.ones(s, s, dtype=torch.bool).tril() & (torch.arange(s) < s - 1)[None]
        scores = (first @ second.transpose(1, 2)).masked_fill(~mask, float("-inf"))
        positions = torch.arange(b * s).view(b, s, 1) / (b * s)
        return {"out": scores.softmax(-1) @ second + positions, "rows": doubled.reshape(b * 2 * s, d)[: b * s + 1], "last": first[:, -1]}


class Choice(nn.Module):
    """torch.cond on a value of the data."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.cond(x.sum() > 0, lambda t: self.up(t).relu(), lambda t: self.down(t) - 1, (x,))
        return y * 2


class NoGrad(nn.Module):
    """Gradient switches and an autocast that is off inside of forward; in-place writes; a memory that is made empty."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            y = self.linear(x)
        with torch.autocast("cpu", enabled=False):
            z = y.float() @ y.float().t()
        out = torch.empty(x.shape[0], 6)
        out[:, 0] = z.diagonal()
        out[:, 1:] = y
        out.mul_(2).add_(1)
        return out


class Recurrent(nn.Module):
    """LSTM and GRU, a normalised weight, and statistics that come as a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 6, num_layers=2, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(12, 5, batch_first=True)
        self.convolution = nn.utils.parametrizations.weight_norm(nn.Conv1d(5, 5, 3, padding=1), dim=2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        y, (h, _) = self.lstm(x)
        z, _ = self.gru(y)
        z = self.convolution(z.transpose(1, 2))
        values, _ = z.max(-1)
        variance, mean = torch.var_mean(z, -1)
        return F.group_norm(z, 5), h, values - mean + variance


class Transformer(nn.Module):
    """torch's own encoder layer with a mask (its fused kernel is no operator of the graph)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False)

    def forward(self, x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        return self.layers(x, src_key_padding_mask=padding)


class Widening(nn.Module):
    """Data-dependent shapes in the middle: the number of positive entries is known only once they were counted."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = self.linear(x).flatten()
        picked = chosen[chosen > 0]
        return picked * 2, torch.nonzero(chosen > 0.5).squeeze(-1)


def _plain(*shape: int) -> Callable[[int], tuple[torch.Tensor, ...]]:
    return lambda batch: (torch.randn(batch, *shape),)


Inputs = Callable[[int], Any]

AWKWARD: dict[str, tuple[Callable[[], nn.Module], Inputs]] = {
    "nested": (
        Nested,
        lambda b: {"x": torch.randn(b, 4), "more": {"left": torch.randn(b, 3), "rest": [torch.randn(b, 6), torch.randn(b)]}},
    ),
    "shared": (Shared, lambda b: (torch.randint(0, 50, (b, 5)),)),
    "branches": (Branches, _plain(3, 8, 8)),
    "state": (State, _plain(5)),
    "passing": (Passing, _plain(4)),
    "dtypes": (Dtypes, lambda b: torch.rand(b, 6)),
    "spectrum": (Spectrum, _plain(16)),
    "layouts": (Layouts, _plain(4, 8, 8)),
    "slicing": (Slicing, _plain(5, 6)),
    "choice": (Choice, _plain(4)),
    "no_grad": (NoGrad, _plain(5)),
    "recurrent": (Recurrent, _plain(7, 4)),
    "transformer": (Transformer, lambda b: (torch.randn(b, 6, 8), torch.arange(6).expand(b, 6) >= 4)),
    "widening": (Widening, _plain(3)),
}
