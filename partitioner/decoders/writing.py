"""Cuts a decoder model into shards: tensors go from the model's files to the shard's one at a time, as they are, in another type, or in 8 or 4 bits."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from partitioner.decoders.model import GROUP_SIZE, DecoderModel
from splitnet.decoder_format import DECODER_MEMBER, DecoderSpec
from splitnet.decoder_weights import quantize, stored_bytes
from splitnet.errors import BadInput, BadModel, BadPlan
from splitnet.plan import Plan, StageSpec
from splitnet.shard import STORED_DTYPES, Shard, write_shard
from splitnet.tensors import DTYPES

__all__ = ["cut_decoder", "span_of", "stored_arrays", "write_span"]

_PART_BYTES = 1 << 30  # of a file of weights: what is sent again when one did not arrive whole
_SAFETENSORS = {name: stored for stored, name in STORED_DTYPES.items()}

OnBytes = Callable[[int, int], None]


def cut_decoder(model: DecoderModel, plan: Plan, directory: str | Path, on_bytes: OnBytes | None = None) -> dict[str, Shard]:
    """Writes each stage's shard into a folder of the stage's name. Holds one tensor at a time. Raises BadPlan for a plan of another model."""
    if plan.model_sha256 != model.sha256 or plan.generation is None:
        raise BadPlan(
            f"the plan is for the model {plan.model!r} ({plan.model_sha256[:12]}), not for {model.name!r} ({model.sha256[:12]})",
            remedy="make the plan again for this model",
        )
    dtype = plan.generation.dtype
    spans = {stage.name: span_of(model, stage) for stage in plan.stages}
    forms = plan.generation.weights
    total = sum(model.param_bytes(a, b, forms[name], dtype) for name, (a, b) in spans.items())
    written = 0
    shards = {}
    for stage in plan.stages:
        a, b = spans[stage.name]

        def moved(more: int) -> None:
            nonlocal written
            written += more
            if on_bytes:
                on_bytes(written, total)

        spec = model.spec(a, b, form=forms[stage.name], dtype=dtype, context_length=plan.generation.context_length)
        shards[stage.name] = write_span(
            model, spec, (a, b), forms[stage.name], Path(directory) / stage.name, stage.name, stage.activation_bytes, moved
        )
    return shards


def span_of(model: DecoderModel, stage: StageSpec) -> tuple[int, int]:
    """Which of the model's vertices a stage runs. Raises BadPlan."""
    names = model.vertices
    if stage.operators and stage.operators[0] in names:
        a = names.index(stage.operators[0])
        if names[a : a + len(stage.operators)] == stage.operators:
            return a, a + len(stage.operators)
    raise BadPlan(f"stage {stage.name!r} is no stretch of the model's layers", remedy="make the plan again for this model")


def write_span(
    model: DecoderModel, spec: DecoderSpec, span: tuple[int, int], form: str, directory: Path, name: str, activation_bytes: int,
    on_bytes: Callable[[int], None] | None = None,
) -> Shard:  # fmt: skip
    """One shard. Raises BadModel for weights that cannot be stored so, StorageFailure where a file cannot be read."""
    directory.mkdir(parents=True, exist_ok=True)
    members: dict[str, bytes | Path] = {DECODER_MEMBER: spec.to_bytes()}
    parts = list(_parts(model, span, form, spec.dtype))
    for i, part in enumerate(parts):
        file = "weights.safetensors" if len(parts) == 1 else f"weights-{i + 1:05}-of-{len(parts):05}.safetensors"
        _write(model, part, spec.dtype, directory / file, on_bytes)
        members[file] = directory / file
    return write_shard(
        directory, model=model.name, model_sha256=model.sha256, stage=name, engine="decoder", inputs=spec.inputs(), outputs=spec.outputs(),
        members=members, param_bytes=model.param_bytes(*span, form, spec.dtype), activation_bytes=activation_bytes,
    )  # fmt: skip


_Part = list[tuple[str, str, str]]


def _parts(model: DecoderModel, span: tuple[int, int], form: str, dtype: str) -> Iterator[_Part]:
    part: _Part = []
    held = 0
    for name, source, one in model.stored(*span, form, dtype):
        size = stored_bytes(model.checkpoint.shape(source), one, GROUP_SIZE)
        if part and held + size > _PART_BYTES:
            yield part
            part, held = [], 0
        part.append((name, source, one))
        held += size
    yield part


def _write(model: DecoderModel, part: _Part, dtype: str, path: Path, on_bytes: Callable[[int], None] | None) -> None:
    """A safetensors file: the header first, whose sizes are known beforehand, then the data in its order."""
    header: dict[str, Any] = {}
    offset = 0
    for name, source, one in part:
        for stored, (kind, shape) in stored_arrays(name, model.checkpoint.shape(source), one).items():
            size = int(np.prod(shape, dtype=np.int64)) * DTYPES[kind].itemsize
            header[stored] = {"dtype": _SAFETENSORS[kind], "shape": list(shape), "data_offsets": [offset, offset + size]}
            offset += size
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 64)
    temporary = path.with_name(path.name + ".part")
    with temporary.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for name, source, one in part:
            place = model.checkpoint.places[source]
            if STORED_DTYPES.get(place.stored.dtype) == one:
                for piece in model.checkpoint.pieces(source):
                    file.write(piece)
                    _told(on_bytes, len(piece))
                continue
            for array in _converted(model, name, source, one).values():
                file.write(array.reshape(-1).view(np.uint8))
                _told(on_bytes, array.nbytes)
    temporary.replace(path)


def _told(on_bytes: Callable[[int], None] | None, more: int) -> None:
    if on_bytes:
        on_bytes(more)


def stored_arrays(name: str, shape: tuple[int, ...], form: str) -> Mapping[str, tuple[str, tuple[int, ...]]]:
    """As `splitnet.decoder_weights` says: element types and shapes, in the order in which `quantize` gives them."""
    if form == "int8":
        return {f"{name}.int8": ("int8", shape), f"{name}.scale": ("float32", shape[:1])}
    if form == "int4":
        groups = (shape[0], shape[1] // GROUP_SIZE)
        return {
            f"{name}.int4": ("uint8", (shape[0], shape[1] // 2)),
            f"{name}.scale": ("bfloat16", groups),
            f"{name}.zero": ("bfloat16", groups),
        }
    return {name: (form, shape)}


def _converted(model: DecoderModel, name: str, source: str, form: str) -> dict[str, np.ndarray]:
    try:
        return quantize(name, model.checkpoint.read(source), form, GROUP_SIZE)
    except BadInput as error:
        raise BadModel(error.message, remedy="take --weights bfloat16, or another copy of the model") from None
