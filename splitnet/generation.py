"""What a client asks of a decoder model, besides the prompt, and what the deployment allows."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from splitnet.errors import BadInput
from splitnet.rpc.v1 import node_pb2 as pb

__all__ = ["PROMPT", "TOKENS", "GenerateRequest", "Stop", "TextModel", "as_prompt"]

PROMPT, TOKENS = "input_ids", "tokens"  #: the tensors of a request to generate, and of its answer
MAX_STOPS, MAX_STOP_TOKENS = 64, 256
_MAX_TOKENS = 1 << 24
_LARGEST_ID = (1 << 31) - 1

#: Token ids, or sequences of token ids.
Stop: TypeAlias = Iterable["int | Sequence[int]"]


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """`temperature` 0 is greedy: the most likely token, the lowest id of several. Otherwise a token is drawn among the `top_k` most likely (0: all), of which the
    fewest are kept whose probabilities together reach `top_p`. `repetition_penalty`: Keskar et al. 2019 (CTRL), as in transformers. The same `seed` draws the
    same tokens. Each sequence in `stop` ends the text, so do the model's own ends unless `ignore_eos`; what ended it is part of the answer, as in
    transformers. `answered`: so many tokens at the end of the prompt are of this very answer, which goes on after them. Raises BadInput that names the field."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[tuple[int, ...], ...] = ()
    ignore_eos: bool = False
    answered: int = 0

    def __post_init__(self) -> None:
        _whole("max_new_tokens", self.max_new_tokens, 1, _MAX_TOKENS)
        _whole("answered", self.answered, 0, self.max_new_tokens - 1)
        _whole("top_k", self.top_k, 0, _LARGEST_ID)
        _whole("seed", self.seed, 0, (1 << 64) - 1)
        _number("temperature", self.temperature, 0 <= self.temperature <= 100, "from 0 (greedy) to 100")
        _number("top_p", self.top_p, 0 < self.top_p <= 1, "above 0, and at most 1 (all)")
        _number("repetition_penalty", self.repetition_penalty, 0 < self.repetition_penalty <= 100, "above 0 (1: none), and at most 100")
        if len(self.stop) > MAX_STOPS:
            raise BadInput(f"stop: {len(self.stop)} sequences; at most {MAX_STOPS} are looked for")
        for sequence in self.stop:
            if not 0 < len(sequence) <= MAX_STOP_TOKENS:
                raise BadInput(f"stop: a sequence of {len(sequence)} tokens; expected 1 to {MAX_STOP_TOKENS}")
            for token in sequence:
                _whole("stop: a token id", token, 0, _LARGEST_ID)

    @classmethod
    def of(
        cls,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        top_k: int,
        repetition_penalty: float,
        seed: int | None,
        stop: Stop,
        ignore_eos: bool,
    ) -> GenerateRequest:
        """From what a caller wrote: no seed is a new one, a stop token stands for the sequence of it alone."""
        sequences = tuple((int(each),) if isinstance(each, int | np.integer) else tuple(map(int, each)) for each in stop)
        return cls(
            max_new_tokens,
            temperature,
            top_p,
            top_k,
            repetition_penalty,
            secrets.randbits(63) if seed is None else seed,
            sequences,
            ignore_eos,
        )

    def to_message(self) -> pb.Generate:
        return pb.Generate(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
            stop=[pb.TokenSequence(tokens=sequence) for sequence in self.stop],
            ignore_eos=self.ignore_eos,
            answered=self.answered,
        )

    @classmethod
    def from_message(cls, message: pb.Generate) -> GenerateRequest:
        """What a stranger asks. Raises BadInput."""
        return cls(
            message.max_new_tokens,
            message.temperature,
            message.top_p or 1.0,
            message.top_k,
            message.repetition_penalty or 1.0,
            message.seed,
            tuple(tuple(sequence.tokens) for sequence in message.stop),
            message.ignore_eos,
            message.answered,
        )


@dataclass(frozen=True, slots=True)
class TextModel:
    """What a deployment of a decoder model takes. `context_length`: tokens of one session, prompt and answer. `cache_tokens`: of all sessions together.
    `tokenizer`: where its model was read from."""

    context_length: int
    vocabulary: int
    cache_tokens: int
    eos_token_ids: tuple[int, ...] = ()
    bos_token_ids: tuple[int, ...] = ()
    tokenizer: str = ""

    @classmethod
    def from_message(cls, status: pb.GenerationStatus) -> TextModel:
        return cls(
            status.context_length,
            status.vocabulary,
            status.cache_tokens,
            tuple(status.eos_token_ids),
            tuple(status.bos_token_ids),
            status.tokenizer,
        )

    def check(self, prompt: np.ndarray, wanted: GenerateRequest) -> None:
        """Raises BadInput where the prompt and what is to follow do not fit the model."""
        if not prompt.size:
            raise BadInput("the prompt is empty", remedy="give at least one token, such as the model's bos token")
        low, high = int(prompt.min()), int(prompt.max())
        if low < 0 or high >= self.vocabulary:
            wrong = low if low < 0 else high
            raise BadInput(
                f"the prompt holds token id {wrong}; the vocabulary has the ids 0 to {self.vocabulary - 1}",
                remedy="use the tokenizer of the model that is deployed",
            )
        if wanted.answered >= prompt.size:
            raise BadInput(
                f"answered: {wanted.answered} of {prompt.size} tokens; one at least is the prompt's", remedy="send the prompt before them"
            )
        room, own = min(self.context_length, self.cache_tokens), prompt.size - wanted.answered
        if own >= room:
            raise BadInput(
                f"the prompt has {own} tokens, the deployment's context holds {room}, and one token must follow",
                remedy="send a shorter prompt, or plan with a larger --context",
            )
        if own + wanted.max_new_tokens > room:
            raise BadInput(
                f"max_new_tokens: {wanted.max_new_tokens} after a prompt of {own} tokens are more than the deployment's context of {room}",
                remedy=f"ask for at most {room - own}, or plan with a larger --context",
            )


def as_prompt(input_ids: Any) -> np.ndarray:
    """Token ids as an int64 array of one dimension: from a list, an array of integers, or a row of a batch of one. Raises BadInput."""
    try:
        array = np.asarray(input_ids)
    except (ValueError, TypeError, RuntimeError) as error:
        raise BadInput(f"the prompt cannot become an array: {error}", remedy="give a list of token ids") from None
    if array.ndim == 2 and len(array) == 1:
        array = array[0]
    if array.ndim != 1:
        raise BadInput(f"the prompt has shape {array.shape}; expected the token ids of one text", remedy="send one request for each text")
    if not array.size:
        raise BadInput("the prompt is empty", remedy="give at least one token, such as the model's bos token")
    if array.dtype.kind not in "iu":
        raise BadInput(f"the prompt holds {array.dtype}; expected whole numbers", remedy="give token ids: tokenize the text first")
    return array.astype(np.int64)


def _is_whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _whole(name: str, value: object, least: int, most: int) -> None:
    if not _is_whole(value) or not least <= value <= most:  # type: ignore[operator] # a whole number
        raise BadInput(f"{name}: expected a whole number from {least} to {most}, got {value!r:.80}")


def _number(name: str, value: object, fits: bool, expected: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float | np.floating | np.integer) or not math.isfinite(value) or not fits:
        raise BadInput(f"{name}: expected a number {expected}, got {value!r:.80}")
