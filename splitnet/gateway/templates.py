"""A model's chat template: messages to the text that it was trained on.

As transformers renders it: Jinja2's immutable sandbox, blocks trimmed, loop controls, and the helpers that templates count on. A template comes with the
model, so it is a stranger's: the sandbox keeps it from Python's internals, and what it makes is bounded. jinja2 before 3.1.6 has known ways out of the sandbox.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from splitnet.errors import BadInput, BadModel

__all__ = ["ChatTemplate"]

_LONGEST = 1 << 20  # characters of a template
_LONGEST_TEXT = 1 << 24  # characters of what it makes


class ChatTemplate:
    """Raises BadModel for a template that is none."""

    def __init__(self, source: str, special: Mapping[str, str]) -> None:
        """`special`: the names under which templates know special tokens, such as bos_token."""
        import jinja2

        if len(source) > _LONGEST:
            raise BadModel(f"the chat template has {len(source)} characters; at most {_LONGEST} are taken")
        self._special = dict(special)
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise BadModel(f"the chat template is not one: {error}", remedy="give another with --chat-template FILE") from None

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The text, up to where the assistant's answer begins. Raises BadInput for what the template refuses, such as roles in an order that it does not know."""
        import jinja2

        parts, length = [], 0
        try:
            for part in self._template.generate(
                messages=list(messages), tools=None, documents=None, add_generation_prompt=True, **self._special
            ):
                length += len(part)
                if length > _LONGEST_TEXT:
                    raise BadInput(f"messages: the chat template makes more than {_LONGEST_TEXT} characters of them")
                parts.append(part)
        except (jinja2.TemplateError, TypeError, ValueError, OverflowError, ArithmeticError, LookupError, RecursionError) as error:
            raise BadInput(f"messages: the model's chat template refuses them: {error}"[:500]) from None
        return "".join(parts)


def _environment() -> Any:
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks, for training, what the assistant said: here it only stands aside."""

        tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _now
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    """Unlike Jinja's own, which escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> NoReturn:
    import jinja2

    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)
