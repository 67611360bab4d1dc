"""plan.json, taken apart: whatever a stranger wrote becomes a `Plan`, or BadPlan with the path to the fault."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, TypeVar

from splitnet.batching import Batching
from splitnet.errors import BadInput, BadPlan
from splitnet.generation_plan import Expected, Generation
from splitnet.noise import Noise
from splitnet.plan import Alternative, CodecOption, NodeRef, OutputSpec, Plan, Prediction, StageSpec, Transfer
from splitnet.tensors import TensorSpec

__all__ = ["read_plan"]

_T = TypeVar("_T")


def read_plan(document: Mapping[str, Any]) -> Plan:
    """The plan that a JSON object of this version describes. Raises BadPlan."""
    return _Reader("plan").plan(document)


class _Reader:
    """Takes a JSON document apart and says where it is wrong."""

    def __init__(self, path: str) -> None:
        self.path = path

    def plan(self, d: Mapping[str, Any]) -> Plan:
        prediction = d.get("prediction")
        return self._make(
            Plan, d,
            nodes=lambda v, p: self._each(v, p, NodeRef),
            stages=lambda v, p: self._each(v, p, StageSpec, inputs=self._specs, outputs=self._specs, operators=self._strings, replicas=self._strings),
            transfers=lambda v, p: self._each(v, p, Transfer, tensors=self._strings, codecs=lambda w, q: self._each(w, q, CodecOption)),
            inputs=self._specs,
            outputs=lambda v, p: self._each(v, p, OutputSpec, spec=self._spec),
            batching=lambda v, p: self._make(Batching, v, p),
            generation=lambda v, p: None if v is None else self._generation(v, p),
            noise=lambda v, p: None if v is None else self._make(Noise, v, p),
            prediction=lambda v, p: None if prediction is None else self._make(
                Prediction, v, p, memory_bytes=self._figures, bytes_per_link=self._figures, symbols=self._figures,
                alternatives=lambda w, q: self._each(w, q, Alternative),
            ),
        )  # fmt: skip

    def _generation(self, v: Any, at: str) -> Generation:
        return self._make(
            Generation, v, at, kv_bytes_per_token=self._figures, weights=self._texts, eos_token_ids=self._whole, bos_token_ids=self._whole,
            expected=lambda w, q: None if w is None else self._make(Expected, w, q),
            perplexity=lambda w, q: {str(name): self._scalar(figure, "float", f"{q}[{name!r}]") for name, figure in self._object(w, q).items()},
        )  # fmt: skip

    def _make(self, cls: type[_T], d: Any, at: str = "", **readers: Any) -> _T:
        at = at or self.path
        if not isinstance(d, Mapping):
            raise BadPlan(f"{at}: expected an object, got {type(d).__name__}")
        fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(set(d) - set(fields))
        if unknown:
            raise BadPlan(f"{at}: unknown key {unknown[0]!r}")
        values: dict[str, Any] = {}
        for name, spec in fields.items():
            if name not in d:
                if spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
                    raise BadPlan(f"{at}.{name}: missing")
                continue
            values[name] = (
                readers[name](d[name], f"{at}.{name}") if name in readers else self._scalar(d[name], str(spec.type), f"{at}.{name}")
            )
        return cls(**values)

    @staticmethod
    def _scalar(value: Any, kind: str, at: str) -> Any:
        if kind == "float" and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        expected: dict[str, type] = {"str": str, "int": int, "float": float, "bool": bool}
        if type(value) is not expected[kind]:
            raise BadPlan(f"{at}: expected {kind}, got {type(value).__name__}")
        if isinstance(value, int | float) and (math.isnan(value) or value < 0):
            raise BadPlan(f"{at}: expected a figure that is not negative, got {value}")
        return value

    def _each(self, v: Any, at: str, cls: type[Any], **readers: Any) -> tuple[Any, ...]:
        if not isinstance(v, list):
            raise BadPlan(f"{at}: expected a list, got {type(v).__name__}")
        return tuple(self._make(cls, item, f"{at}[{i}]", **readers) for i, item in enumerate(v))

    def _strings(self, v: Any, at: str) -> tuple[str, ...]:
        if not isinstance(v, list) or not all(isinstance(item, str) for item in v):
            raise BadPlan(f"{at}: expected a list of strings")
        return tuple(v)

    def _figures(self, v: Any, at: str) -> dict[str, int]:
        return {str(name): self._scalar(figure, "int", f"{at}[{name!r}]") for name, figure in self._object(v, at).items()}

    def _texts(self, v: Any, at: str) -> dict[str, str]:
        return {str(name): self._scalar(text, "str", f"{at}[{name!r}]") for name, text in self._object(v, at).items()}

    def _whole(self, v: Any, at: str) -> tuple[int, ...]:
        if not isinstance(v, list):
            raise BadPlan(f"{at}: expected a list, got {type(v).__name__}")
        return tuple(self._scalar(item, "int", f"{at}[{i}]") for i, item in enumerate(v))

    @staticmethod
    def _object(v: Any, at: str) -> Mapping[Any, Any]:
        if not isinstance(v, Mapping):
            raise BadPlan(f"{at}: expected an object, got {type(v).__name__}")
        return v

    def _specs(self, v: Any, at: str) -> tuple[TensorSpec, ...]:
        if not isinstance(v, list):
            raise BadPlan(f"{at}: expected a list, got {type(v).__name__}")
        return tuple(self._spec(item, f"{at}[{i}]") for i, item in enumerate(v))

    @staticmethod
    def _spec(v: Any, at: str) -> TensorSpec:
        try:
            return TensorSpec.from_json(v)
        except (KeyError, TypeError, BadInput) as error:
            raise BadPlan(f"{at}: {error}") from None
