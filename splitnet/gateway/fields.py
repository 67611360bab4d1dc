"""The fields of a request's JSON object, one by one, each with an error that names it."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from typing import Any

from splitnet.gateway.errors import ApiError, invalid

__all__ = ["Fields", "json_kind", "parse_json"]


class Fields:
    """Reads fields by name; null is as good as absent, as with OpenAI."""

    def __init__(self, values: Mapping[str, Any], where: str = "") -> None:
        self._values = values
        self._where = where

    def path(self, name: str) -> str:
        return f"{self._where}.{name}" if self._where else name

    def get(self, name: str) -> Any:
        return self._values.get(name)

    def only(self, known: Collection[str]) -> None:
        """Raises for the first field that nobody knows."""
        for name in self._values:
            if name not in known:
                raise invalid(self.path(name), f"Unrecognized request argument supplied: {self.path(name)[:120]}", "unknown_parameter")

    def required(self, name: str) -> Any:
        if (value := self.get(name)) is None:
            raise invalid(self.path(name), f"Missing required parameter: '{self.path(name)}'.", "missing_required_parameter")
        return value

    def text(self, name: str) -> str:
        value = self.required(name)
        if not isinstance(value, str):
            raise self.wrong_type(name, "a string", value)
        return value

    def flag(self, name: str) -> bool:
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.wrong_type(name, "a boolean", value)
        return bool(value)

    def whole(self, name: str, default: int | None, least: int, most: int) -> int | None:
        value = self.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong_type(name, "an integer", value)
        if not least <= value <= most:
            raise invalid(self.path(name), f"Invalid '{self.path(name)}': expected an integer from {least} to {most}, got {value!r:.40}.")
        return value

    def number(self, name: str, default: float, least: float, most: float) -> float:
        value = self.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong_type(name, "a number", value)
        if not least <= value <= most or not math.isfinite(value):
            raise invalid(self.path(name), f"Invalid '{self.path(name)}': expected a number from {least:g} to {most:g}, got {value!r:.40}.")
        return float(value)

    def must_be(self, name: str, allowed: Collection[Any], why: str) -> None:
        """A field that is known, and of which only what changes nothing is taken."""
        value = self.get(name)
        if value is not None and not any(value == each and type(value) is type(each) for each in allowed):
            raise invalid(self.path(name), f"Unsupported value for '{self.path(name)}': {why}", "unsupported_value")

    def wrong_type(self, name: str, expected: str, value: Any) -> ApiError:
        return invalid(
            self.path(name),
            f"Invalid type for '{self.path(name)}': expected {expected}, but got {json_kind(value)} instead.",
            "invalid_type",
        )


def parse_json(body: bytes) -> Fields:
    """The object that a body holds, in UTF-8. Raises ApiError 400, also for half of a surrogate pair: JSON can write it, and it is no text."""
    try:
        text = body.decode("utf-8-sig")
        value = json.loads(text, parse_constant=_no_constant)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ApiError(400, "The body of the request holds half of a surrogate pair, which is no character.", code="invalid_json") from None
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"The body of the request is not valid JSON: {error}"[:300], code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"The body of the request must be a JSON object, but is {json_kind(value)}.", code="invalid_json")
    return Fields(value)


def json_kind(value: Any) -> str:
    """What JSON calls it."""
    if value is None:
        return "null"
    kinds = {bool: "a boolean", int: "an integer", float: "a number", str: "a string", list: "an array", dict: "an object"}
    return kinds.get(type(value), type(value).__name__)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")
