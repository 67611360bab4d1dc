"""A conversation with a model, for a terminal: what was said, as far as the context holds it, and answers as they come."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Generator
from dataclasses import dataclass

from splitnet import background
from splitnet.errors import BadInput
from splitnet.gateway.answering import Answer, Piece, ServedModel
from splitnet.gateway.errors import ApiError
from splitnet.gateway.requests import Message, Wanted

__all__ = ["Conversation", "Style"]

_ROOM = 64  # tokens: an answer begins only where it may have so many, or a quarter of a small context
_ANSWER_S = 600.0


@dataclass(frozen=True, slots=True)
class Style:
    """How answers are drawn; `max_tokens` None: what the context holds."""

    temperature: float = 0.7
    top_p: float = 0.95
    seed: int | None = None
    max_tokens: int | None = None


class Conversation:
    """Blocking. Raises BadInput at once for a model without a chat template."""

    def __init__(self, model: ServedModel, style: Style, system: str = "") -> None:
        if model.tokenizer.template is None:
            raise BadInput(
                f"the model {model.name!r} has no chat template: it continues texts, and does not converse",
                remedy='use `splitnet generate plan.json --prompt "..."`, or give a template: --chat-template FILE',
            )
        self._model = model
        self._style = style
        self._first: list[Message] = [{"role": "system", "content": system}] if system else []
        self._said: list[Message] = []
        self.finish = ""  #: of the latest answer: "stop", "length", or "" where it was interrupted

    @property
    def messages(self) -> tuple[Message, ...]:
        return (*self._first, *self._said)

    def reset(self) -> None:
        self._said.clear()

    def ask(self, text: str) -> int:
        """Adds what the user says; returns how many earlier messages had to be forgotten for it to fit. Raises BadInput where it does not fit alone."""
        said: list[Message] = [*self._said, {"role": "user", "content": text}]
        most = self._model.context - min(_ROOM, self._model.context // 4)
        forgotten = 0
        while (length := len(self._model.tokenizer.encode_chat((*self._first, *said)))) > most:
            if len(said) < 3:
                raise BadInput(
                    f"this has {length} tokens with what stands around it; at most {most} leave room for an answer in a context of {self._model.context}"
                )
            del said[:2]  # a question and its answer
            forgotten += 2
        self._said = said
        return forgotten

    def answer(self) -> Generator[str, None, None]:
        """The answer's text as it comes. What has come is kept as said, also when it is interrupted or left early; a question that failed is taken back."""
        wanted = Wanted(
            self._model.name,
            self.messages,
            True,
            self._room(),
            self._style.temperature,
            self._style.top_p,
            0,
            1.0,
            self._style.seed,
            (),
            True,
            False,
        )
        pieces = Answer(self._model, wanted, _ANSWER_S).pieces()
        self.finish = ""
        parts: list[str] = []
        try:
            while (piece := background.run(_next(pieces))) is not None:
                parts.append(piece.text)
                self.finish = piece.finish
                yield piece.text
        except ApiError as error:
            raise BadInput(error.message) from None
        finally:
            with contextlib.suppress(RuntimeError):  # an interrupt has closed it
                background.run(pieces.aclose())
            if parts:
                self._said.append({"role": "assistant", "content": "".join(parts)})
            else:
                self._said.pop()

    def _room(self) -> int | None:
        if self._style.max_tokens is None:
            return None
        return min(self._style.max_tokens, self._model.context - len(self._model.tokenizer.encode_chat(self.messages)))


async def _next(pieces: AsyncGenerator[Piece, None]) -> Piece | None:
    return await anext(pieces, None)
