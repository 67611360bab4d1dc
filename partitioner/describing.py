"""From lowered operators to the structure that planning reads: bytes, estimates, what is cheap, and the model's hash."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch

from partitioner.exporting import BATCH
from partitioner.expressions import render
from partitioner.graph import used_weights
from partitioner.kinds import CHEAP_PARAM_BYTES, estimate_flops, is_cheap_kind
from partitioner.lowering import Lowered
from partitioner.sizes import symbols_of
from partitioner.structure import Structure, Vertex
from splitnet.graph import Ref, references
from splitnet.plan import OutputSpec
from splitnet.tensors import TensorSpec

__all__ = ["describe"]


def describe(
    name: str, lowered: Lowered, weights: Mapping[str, torch.Tensor], example: Mapping[str, torch.Tensor], results: list[Ref],
    paths: list[str], symbols: dict[str, int], measured: Mapping[str, tuple[tuple[int, ...], int]], notes: tuple[str, ...] = (),
) -> Structure:  # fmt: skip
    """`measured`: value -> (shape, bytes) at the example inputs."""
    specs = {v.name: TensorSpec(v.name, v.dtype, v.shape) for v in lowered.values.values()}
    sizes = {value: render(tree) for value, tree in lowered.sizes.items()}
    vertices = [Vertex(n, "input", (specs[n],), value_bytes=(t.nbytes,), activation_bytes=t.nbytes) for n, t in example.items()]
    carriers: dict[str, str] = {}
    for spec in sorted((specs[n] for n in example), key=lambda s: (example[s.name].nbytes, s.name)):
        for size in spec.shape:
            for symbol in sorted(symbols_of(str(size), symbols)):
                carriers.setdefault(symbol, spec.name)
    for value, text in sizes.items():
        used = tuple(sorted({carriers[symbol] for symbol in symbols_of(text, symbols)}))
        vertices.append(Vertex(value, "size", (specs[value],), inputs=used, value_bytes=(8,), activation_bytes=8, cheap=True))
    bytes_of = {n: t.nbytes for n, t in example.items()} | dict.fromkeys(sizes, 8) | {v: b for v, (_, b) in measured.items()}
    shapes = {n: tuple(t.shape) for n, t in (*example.items(), *weights.items())} | {v: s for v, (s, _) in measured.items()}
    cheap = set(sizes)
    constant: set[str] = set()
    for op in lowered.operators:
        arguments = list(references((op.args, op.kwargs)))
        used = tuple(dict.fromkeys(r.name for r in arguments if isinstance(r, Ref)))
        params = used_weights(op)
        param_bytes = sum(weights[p].nbytes for p in params)
        is_constant = not used or all(value in constant for value in used)
        is_cheap = is_constant or (
            is_cheap_kind(op.op) and param_bytes <= CHEAP_PARAM_BYTES and all(value in cheap or value in example for value in used)
        )
        cheap.update(op.results if is_cheap else ())
        constant.update(op.results if is_constant else ())
        value_bytes = tuple(bytes_of.get(value, 0) for value in op.results)
        tensors = [shapes[r.name] for r in arguments if r.name in shapes]
        vertices.append(
            Vertex(
                name=lowered.names[op.results[0]],
                op=op.op,
                values=tuple(specs[value] for value in op.results),
                inputs=used,
                params=params,
                param_bytes=param_bytes,
                value_bytes=value_bytes,
                activation_bytes=sum(value_bytes) + sum(bytes_of.get(value, 0) for value in used),
                flops=estimate_flops(op.op, tensors, shapes.get(op.results[0], ())),
                cheap=is_cheap,
                scope=lowered.scopes[op.results[0]],
            )
        )
    used_names = {p for v in vertices for p in v.params}
    return Structure(
        name=name,
        sha256=_digest(lowered, {n: weights[n] for n in sorted(used_names)}, results, paths) if measured else "",
        batch=symbols.get(BATCH, 1),
        vertices=tuple(vertices),
        inputs=tuple(specs[n] for n in example),
        outputs=tuple(
            OutputSpec(r.name, TensorSpec(path, specs[r.name].dtype, specs[r.name].shape)) for r, path in zip(results, paths, strict=True)
        ),
        param_sizes={n: weights[n].nbytes for n in weights if n in used_names},
        sizes=sizes | {v.name: "" for v in lowered.values.values() if v.kind == "int" and v.name not in sizes and v.name in bytes_of},
        symbols=symbols,
        notes=notes,
    )


def _digest(lowered: Lowered, weights: Mapping[str, torch.Tensor], results: list[Ref], paths: list[str]) -> str:
    digest = hashlib.sha256()
    for part in (lowered.operators, sorted(lowered.sizes.items()), sorted(lowered.values.items()), results, paths):
        digest.update(repr(part).encode())
    for name, weight in weights.items():
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        if weight.numel():
            data = weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(memoryview(data.numpy()))
    return digest.hexdigest()
