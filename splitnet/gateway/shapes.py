"""The JSON of OpenAI's answers: whole ones, the chunks of streamed ones, and the list of models."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable
from typing import Any

from splitnet.gateway.answering import Answer, Piece, ServedModel

__all__ = ["Shape", "model_object", "models_list"]


class Shape:
    """The objects of one answer, which share its id and time."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._chat = answer.wanted.chat
        self._head = {
            "id": ("chatcmpl-" if self._chat else "cmpl-") + secrets.token_hex(12),
            "created": int(time.time()),
            "model": answer.wanted.model,
        }

    def whole(self, text: str, finish: str) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish, "logprobs": None}
        if self._chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        return {**self._head, "object": self._kind(streamed=False), "choices": [choice], "usage": self.usage()}

    def first(self) -> dict[str, Any] | None:
        """What comes before the text: a chat says who speaks."""
        return self._chunk({"delta": {"role": "assistant", "content": "", "refusal": None}, "finish_reason": None}) if self._chat else None

    def chunks(self, piece: Piece) -> Iterable[dict[str, Any]]:
        if self._chat:
            if piece.text:
                yield self._chunk({"delta": {"content": piece.text}, "finish_reason": None})
            if piece.finish:
                yield self._chunk({"delta": {}, "finish_reason": piece.finish})
        else:
            yield self._chunk({"text": piece.text, "finish_reason": piece.finish or None})

    def last(self) -> dict[str, Any]:
        """With `include_usage`: a chunk without choices."""
        return {**self._head, "object": self._kind(streamed=True), "choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        answer = self._answer
        return {
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": answer.completion_tokens,
            "total_tokens": answer.prompt_tokens + answer.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": answer.cached_tokens},
        }

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        chunk = {**self._head, "object": self._kind(streamed=True), "choices": [{"index": 0, "logprobs": None, **choice}]}
        return {**chunk, "usage": None} if self._answer.wanted.include_usage else chunk

    def _kind(self, streamed: bool) -> str:
        if not self._chat:
            return "text_completion"
        return "chat.completion.chunk" if streamed else "chat.completion"


def model_object(model: ServedModel) -> dict[str, Any]:
    """`max_model_len` is not OpenAI's: clients that know it need not guess."""
    return {"id": model.name, "object": "model", "created": model.created, "owned_by": "splitnet", "max_model_len": model.context}


def models_list(models: Iterable[ServedModel]) -> dict[str, Any]:
    return {"object": "list", "data": [model_object(model) for model in models]}
