"""What OpenAI's two requests ask for, checked. Fields that change what is computed and that splitnet does not have are refused by name; those that only label a
request are taken and ignored, as OpenAI does; unknown ones are refused, as OpenAI does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from splitnet.gateway.errors import invalid
from splitnet.gateway.fields import Fields, json_kind

__all__ = ["Message", "Wanted", "read_chat", "read_completion"]

Message = Mapping[str, str]

_MOST_STOPS = 4
_LONGEST_STOP = 1024  # characters: what may begin a stop sequence is held back
_MOST_TOKENS = 1 << 24
_MOST_MESSAGES = 4096
_DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's
_ROLES = ("system", "developer", "user", "assistant")

#: Of both requests.
_SHARED = (
    "model", "max_tokens", "temperature", "top_p", "seed", "stop", "stream", "stream_options", "n", "top_k", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "logit_bias", "logprobs", "user",
)  # fmt: skip
_COMPLETION = (*_SHARED, "prompt", "echo", "best_of", "suffix")
_CHAT = (
    *_SHARED, "messages", "max_completion_tokens", "top_logprobs", "tools", "tool_choice", "parallel_tool_calls", "functions", "function_call",
    "response_format", "modalities", "audio", "prediction", "web_search_options", "metadata", "store", "service_tier", "safety_identifier",
    "prompt_cache_key", "prompt_cache_retention",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Wanted:
    """`prompt`: text, token ids, or messages to be answered. `max_tokens` None: as many as the context holds. `include_usage`: a last chunk with the counts,
    where the answer is streamed."""

    model: str
    prompt: str | tuple[int, ...] | tuple[Message, ...]
    chat: bool
    max_tokens: int | None
    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    seed: int | None
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    echo: bool = False


def read_completion(fields: Fields) -> Wanted:
    """Raises ApiError 400 that names the field."""
    fields.only(_COMPLETION)
    model = fields.text("model")
    prompt = _prompt(fields)
    fields.must_be("best_of", (1,), "one answer is made; send several requests.")
    fields.must_be("suffix", ("",), "text is continued, not filled in.")
    fields.must_be("logprobs", (), "log probabilities do not leave the last node.")
    return _wanted(fields, model, prompt, chat=False, max_tokens=fields.whole("max_tokens", _DEFAULT_COMPLETION_TOKENS, 1, _MOST_TOKENS))


def read_chat(fields: Fields) -> Wanted:
    """Raises ApiError 400 that names the field."""
    fields.only(_CHAT)
    model = fields.text("model")
    messages = _messages(fields)
    for name in ("tools", "functions"):
        fields.must_be(name, ([],), "tools are not supported.")
    fields.must_be("tool_choice", ("none", "auto"), "tools are not supported.")
    fields.must_be("function_call", ("none", "auto"), "tools are not supported.")
    fields.must_be("response_format", ({"type": "text"},), "only text is made.")
    fields.must_be("modalities", (["text"],), "only text is made.")
    for name in ("audio", "prediction", "web_search_options"):
        fields.must_be(name, (), "it is not supported.")
    fields.must_be("logprobs", (False,), "log probabilities do not leave the last node.")
    fields.must_be("top_logprobs", (0,), "log probabilities do not leave the last node.")
    older = fields.whole("max_tokens", None, 1, _MOST_TOKENS)
    newer = fields.whole("max_completion_tokens", None, 1, _MOST_TOKENS)
    if older is not None and newer is not None and older != newer:
        raise invalid("max_tokens", "'max_tokens' and 'max_completion_tokens' contradict each other: give the second alone.")
    return _wanted(fields, model, messages, chat=True, max_tokens=newer if newer is not None else older)


def _wanted(fields: Fields, model: str, prompt: Any, *, chat: bool, max_tokens: int | None) -> Wanted:
    fields.must_be("n", (1,), "one answer is made; send several requests.")
    fields.must_be("presence_penalty", (0, 0.0), "use 'repetition_penalty'.")
    fields.must_be("frequency_penalty", (0, 0.0), "use 'repetition_penalty'.")
    fields.must_be("logit_bias", ({},), "it is not supported.")
    stream = fields.flag("stream")
    top_p = fields.number("top_p", 1.0, 0.0, 1.0)
    seed = fields.whole("seed", None, -(1 << 63), (1 << 64) - 1)
    top_k = fields.whole("top_k", 0, -1, (1 << 31) - 1)
    penalty = fields.number("repetition_penalty", 1.0, 0.0, 100.0)
    if penalty == 0:
        raise invalid("repetition_penalty", "Invalid 'repetition_penalty': expected a number above 0, got 0.")
    return Wanted(
        model, prompt, chat, max_tokens,
        temperature=fields.number("temperature", 1.0, 0.0, 2.0),
        top_p=top_p or 1e-9,  # OpenAI takes 0: the most likely token alone
        top_k=max(0, top_k or 0),
        repetition_penalty=penalty,
        seed=None if seed is None else seed % (1 << 64),
        stop=_stop(fields),
        stream=stream,
        include_usage=_include_usage(fields, stream),
        echo=not chat and fields.flag("echo"),
    )  # fmt: skip


def _prompt(fields: Fields) -> str | tuple[int, ...]:
    value = fields.required("prompt")
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]  # a batch of one
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise fields.wrong_type("prompt", "a string or an array of token ids", value)
    if not value:
        raise invalid("prompt", "Invalid 'prompt': it is empty.", "empty_array")
    if isinstance(value[0], str | list):
        raise invalid(
            "prompt", f"Invalid 'prompt': {len(value)} prompts in one request; one is answered. Send several requests.", "unsupported_value"
        )
    for at, token in enumerate(value):
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < 1 << 31:
            raise invalid(f"prompt[{at}]", f"Invalid 'prompt[{at}]': expected a token id, got {token!r:.40}.", "invalid_type")
    return tuple(value)


def _messages(fields: Fields) -> tuple[Message, ...]:
    value = fields.required("messages")
    if not isinstance(value, list):
        raise fields.wrong_type("messages", "an array of objects", value)
    if not value:
        raise invalid(
            "messages",
            "Invalid 'messages': empty array. Expected an array with minimum length 1, but got an empty array instead.",
            "empty_array",
        )
    if len(value) > _MOST_MESSAGES:
        raise invalid(
            "messages", f"Invalid 'messages': {len(value)} of them; at most {_MOST_MESSAGES} are taken.", "array_above_max_length"
        )
    return tuple(_message(each, f"messages[{at}]") for at, each in enumerate(value))


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, dict):
        raise invalid(where, f"Invalid type for '{where}': expected an object, but got {json_kind(value)} instead.", "invalid_type")
    fields = Fields(value, where)
    fields.only(
        ("role", "content", "name", "refusal", "annotations", "audio", "tool_calls", "function_call")
    )  # of which a client sends back what it got
    role = fields.text("role")
    if role not in _ROLES:
        raise invalid(fields.path("role"), f"Invalid '{where}.role': expected one of {', '.join(_ROLES)}, got {role!r:.40}.")
    for name in ("audio", "tool_calls", "function_call"):
        fields.must_be(name, ([],), "it is not supported.")
    content = fields.required("content")
    if isinstance(content, list):
        content = "".join(_part(part, f"{where}.content[{at}]") for at, part in enumerate(content))
    if not isinstance(content, str):
        raise fields.wrong_type("content", "a string or an array of objects", content)
    return {
        "role": "system" if role == "developer" else role,
        "content": content,
    }  # "developer" is OpenAI's newer word, which templates do not know


def _part(value: Any, where: str) -> str:
    if not isinstance(value, dict):
        raise invalid(where, f"Invalid type for '{where}': expected an object, but got {json_kind(value)} instead.", "invalid_type")
    fields = Fields(value, where)
    if (kind := fields.text("type")) != "text":
        raise invalid(fields.path("type"), f"Invalid '{where}.type': only 'text' is taken, got {kind!r:.40}.", "unsupported_value")
    return fields.text("text")


def _stop(fields: Fields) -> tuple[str, ...]:
    value = fields.get("stop")
    if value is None or value == []:
        return ()
    sequences = [value] if isinstance(value, str) else value
    if not isinstance(sequences, list) or not all(isinstance(each, str) for each in sequences):
        raise fields.wrong_type("stop", "a string or an array of strings", value)
    if len(sequences) > _MOST_STOPS:
        raise invalid(
            "stop", f"Invalid 'stop': at most {_MOST_STOPS} sequences are looked for, got {len(sequences)}.", "array_above_max_length"
        )
    if not all(0 < len(each) <= _LONGEST_STOP for each in sequences):
        raise invalid("stop", f"Invalid 'stop': a sequence has 1 to {_LONGEST_STOP} characters.")
    return tuple(sequences)


def _include_usage(fields: Fields, stream: bool) -> bool:
    value = fields.get("stream_options")
    if value is None:
        return False
    if not stream:
        raise invalid("stream_options", "The 'stream_options' parameter is only allowed when 'stream' is enabled.")
    if not isinstance(value, dict):
        raise fields.wrong_type("stream_options", "an object", value)
    options = Fields(value, "stream_options")
    options.only(("include_usage", "include_obfuscation"))
    options.flag("include_obfuscation")
    return options.flag("include_usage")
