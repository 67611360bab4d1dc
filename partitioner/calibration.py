"""The calibration: what a task loses when what crosses a cut goes through a codec, and how many bits that takes. Pure and JSON-able.

One document is of one model, one file of samples and one metric. Planning reads the codecs' figures from it, per operator.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from partitioner.cost import CodecFigures
from partitioner.structure import Structure
from splitnet.codecs import codec_names, get_codec
from splitnet.documents import load_document, save_document
from splitnet.errors import BadInput, BadModel, BadPlan

__all__ = ["CALIBRATION_VERSION", "UNMEASURED", "Calibration", "CodecLoss", "CutLoss"]

CALIBRATION_VERSION = 1
UNMEASURED = 1e9  #: the error of a codec where it was not measured, or makes no numbers: no budget allows it


@dataclass(frozen=True, slots=True)
class CodecLoss:
    """`loss` is the metric's, inf where the answers were no numbers; `encoded_bytes` are those of all samples."""

    loss: float
    encoded_bytes: int


@dataclass(frozen=True)
class CutLoss:
    """A cut: all that crosses it goes through one codec. `after`: the operators after which the model is cut; each gives the same `tensors`.
    `raw_bytes` and `values` are of all samples, what the wire would carry."""

    after: tuple[str, ...]
    tensors: tuple[str, ...]
    scope: str  # the module where it is, for people
    raw_bytes: int
    values: int
    codecs: Mapping[str, CodecLoss]

    def bits_per_value(self, codec: str) -> float:
        return 8 * self.codecs[codec].encoded_bytes / max(self.values, 1)

    def ratio(self, codec: str) -> float:
        return self.raw_bytes / max(self.codecs[codec].encoded_bytes, 1)


@dataclass(frozen=True)
class Calibration:
    """Raises BadModel for figures that cannot be."""

    model: str
    model_sha256: str
    data: str  # the path, as it was
    data_sha256: str
    metric: str
    output: str  # the one that was judged
    samples: int
    labelled: bool  # whether losses are against labels, or against the whole model's answers
    batch: int
    score: float  # of the whole model
    cuts: tuple[CutLoss, ...]
    how: str = ""  # which cuts these are, for people
    version: int = field(default=CALIBRATION_VERSION)

    def __post_init__(self) -> None:
        for cut in self.cuts:
            for name, found in cut.codecs.items():
                if math.isnan(found.loss) or found.encoded_bytes < 0 or cut.raw_bytes < 0:
                    raise BadModel(
                        f"the calibration's cut after {cut.after[0]!r}, codec {name!r}: {found.loss} lost, {found.encoded_bytes} bytes"
                    )

    @property
    def codecs(self) -> tuple[str, ...]:
        """Those that were measured at any cut."""
        return tuple(dict.fromkeys(name for cut in self.cuts for name in cut.codecs))

    def check(self, model_sha256: str) -> None:
        if self.model_sha256 != model_sha256:
            raise BadPlan(
                f"the calibration is of another model ({self.model}, {self.model_sha256[:12]}), not of this one ({model_sha256[:12]})",
                remedy="run `splitnet calibrate` with this model",
            )

    def figures(self, structure: Structure, codecs: Mapping[str, CodecFigures]) -> dict[str, CodecFigures]:
        """The codecs with the ratio and error that were measured after each operator; speeds stay. A lossless codec has no error, and where it was
        not measured the ratio that it had; another one an error that no budget allows, but for what makes no floats: these pass unharmed. `raw` stays as it is."""
        self.check(structure.sha256)
        found = {}
        for name, given in codecs.items():
            lossless = get_codec(name).lossless if name in codec_names() else given.error == 0.0
            claims = {} if name == "raw" else self._claims(structure, name)
            if name == "raw" or (lossless and not claims):
                found[name] = given
                continue
            ratio, error = {}, {}
            for vertex in structure.vertices:
                exact = math.inf, 0.0
                usual = (given.ratio_of(vertex.name), 0.0) if lossless else exact if _exact(structure, vertex.name) else (1.0, UNMEASURED)
                ratio[vertex.name], error[vertex.name] = claims.get(vertex.name, usual)
            found[name] = dataclasses.replace(given, ratio=ratio, error=0.0 if lossless else error)
        return found

    def _claims(self, structure: Structure, codec: str) -> dict[str, tuple[float, float]]:
        """(ratio, error) by operator. A cut's figures hold for the operators right before it and for what makes its last large tensor; for other
        tensors of it, unless they have a cut of their own, the worst of their cuts. Numbers that are no floats pass unharmed and as they are, but
        for what a lossless codec makes of them where only such cross."""
        main: dict[str, tuple[float, float]] = {}
        beside: dict[str, tuple[float, float]] = {}
        for cut in self.cuts:
            if codec not in cut.codecs:
                continue
            measured = cut.codecs[codec].loss
            figures = cut.ratio(codec), max(measured, 0.0) if math.isfinite(measured) else UNMEASURED
            largest = max(structure.value_bytes[t] for t in cut.tensors)
            floats = [t for t in cut.tensors if "float" in structure.value[t].dtype]
            large = [t for t in floats if structure.value_bytes[t] * 2 >= largest]
            shrunk = not floats and codec in codec_names() and get_codec(codec).lossless
            for operator in {*cut.after, *(structure.producer[t].name for t in large[-1:])}:
                if shrunk or not _exact(structure, operator):
                    main[operator] = _worse(main.get(operator), figures)
            for operator in {structure.producer[t].name for t in cut.tensors}:
                beside[operator] = _worse(beside.get(operator), (math.inf, 0.0) if _exact(structure, operator) else figures)
        return beside | main

    def to_json(self) -> str:
        document = dataclasses.asdict(self)
        for cut in document["cuts"]:
            for found in cut["codecs"].values():
                found["loss"] = found["loss"] if math.isfinite(found["loss"]) else None
        return json.dumps(document, indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Calibration:
        """Raises BadModel where the document is not a calibration of this version."""
        try:
            document: dict[str, Any] = json.loads(text)
            if document.get("version") != CALIBRATION_VERSION:
                raise BadModel(
                    f"the calibration has version {document.get('version')!r}, this splitnet reads version {CALIBRATION_VERSION}",
                    remedy="calibrate again with `splitnet calibrate`",
                )
            return cls(**{**document, "cuts": tuple(_cut(c) for c in document["cuts"])})
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, BadInput) as error:
            raise BadModel(f"not a calibration: {type(error).__name__}: {error}") from None

    def save(self, path: str | Path) -> None:
        save_document(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        return load_document(path, cls.from_json, BadModel, what="the calibration ", remedy="make one with `splitnet calibrate`")

    def merged(self, cuts: Iterable[CutLoss]) -> Calibration:
        """The same with more cuts, or more codecs at the same cuts; what is new counts."""
        found = {cut.tensors: cut for cut in self.cuts}
        for cut in cuts:
            known = found.get(cut.tensors)
            found[cut.tensors] = cut if known is None else dataclasses.replace(cut, codecs={**known.codecs, **cut.codecs})
        return dataclasses.replace(self, cuts=tuple(found.values()))


def _exact(structure: Structure, operator: str) -> bool:
    """Whether none of its values are floats: no codec that loses anything touches them."""
    return not any("float" in value.dtype for value in structure.vertex[operator].values)


def _worse(a: tuple[float, float] | None, b: tuple[float, float]) -> tuple[float, float]:
    return b if a is None else (min(a[0], b[0]), max(a[1], b[1]))


def _cut(document: Mapping[str, Any]) -> CutLoss:
    codecs = {
        str(name): CodecLoss(math.inf if found["loss"] is None else float(found["loss"]), int(found["encoded_bytes"]))
        for name, found in document["codecs"].items()
    }
    return CutLoss(
        after=tuple(map(str, document["after"])), tensors=tuple(map(str, document["tensors"])), scope=str(document["scope"]),
        raw_bytes=int(document["raw_bytes"]), values=int(document["values"]), codecs=codecs,
    )  # fmt: skip
