"""The options of models that generate, for `splitnet plan` and `splitnet profile`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

from partitioner.decoders.figures import Workload
from splitnet.errors import BadInput, BadModel

__all__ = ["generate_options", "refuse_without_generate", "workload"]

_Command = TypeVar("_Command", bound=Callable[..., Any])
_DEFAULTS = {"context": 2048, "sessions": 8, "prompt_tokens": 512, "answer_tokens": 128, "chunk_tokens": 128}
_WHOLE = click.IntRange(min=1)

_OPTIONS = (
    click.option("--generate", is_flag=True, help="MODEL is a decoder language model that is to generate text: stages with KV caches. See docs/decoding.md."),
    click.option("--context", type=_WHOLE, help=f"With --generate: tokens of a session, prompt and answer.  [default: {_DEFAULTS['context']}, or the model's]"),
    click.option("--sessions", type=_WHOLE, help=f"With --generate: how many such sessions the caches hold at once.  [default: {_DEFAULTS['sessions']}]"),
    click.option(
        "--weights", type=click.Choice(["auto", "float32", "bfloat16", "int8", "int4"]),
        help="With --generate: the format of the matrices. auto: float32 or bfloat16, whichever is faster, and 8 or 4 bits where these do not fit; with --data and --max-accuracy-loss whatever is fastest within it.  [default: auto]",
    ),
    click.option("--prompt-tokens", type=_WHOLE, help=f"With --generate: the prompt that predictions are for.  [default: {_DEFAULTS['prompt_tokens']}, at most half the context]"),
    click.option("--answer-tokens", type=_WHOLE, help=f"With --generate: the answer that predictions are for.  [default: {_DEFAULTS['answer_tokens']}, at most a quarter of the context]"),
    click.option("--chunk-tokens", type=_WHOLE, help=f"With --generate: chunks of a prompt of so many tokens are measured; others are reckoned from it.  [default: {_DEFAULTS['chunk_tokens']}]"),
)  # fmt: skip
_NAMES = ("context", "sessions", "weights", "prompt_tokens", "answer_tokens", "chunk_tokens")


def generate_options(command: _Command) -> _Command:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def refuse_without_generate(given: Mapping[str, Any]) -> None:
    """Raises BadInput for an option that only means something with --generate."""
    for name in _NAMES:
        if given.get(name) is not None:
            raise BadInput(f"--{name.replace('_', '-')} is for models that generate", remedy="add --generate")


def workload(given: Mapping[str, Any], longest_context: int) -> Workload:
    """Raises BadInput for what does not fit together."""
    context = given["context"] or min(_DEFAULTS["context"], longest_context)
    prompt = given["prompt_tokens"] or max(1, min(_DEFAULTS["prompt_tokens"], context // 2))
    answer = given["answer_tokens"] or max(1, min(_DEFAULTS["answer_tokens"], context // 4))
    chunk = given["chunk_tokens"] or min(_DEFAULTS["chunk_tokens"], prompt)
    try:
        return Workload(context, given["sessions"] or _DEFAULTS["sessions"], prompt, answer, chunk)
    except BadModel as error:
        raise BadInput(error.message, remedy=error.remedy) from None
