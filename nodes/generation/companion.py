"""A small model on the ingress's node that says what a large one is likely to say next; the large one verifies it in one pass (Leviathan et al. 2023, "Fast Inference from Transformers
via Speculative Decoding").

It is a deployment of its own, of one stage, deployed as any other. It draws as the large model will: with the same options and, for each position, with the same random numbers
(`nodes.engines.decoder.sampling`), so that the answer has the very tokens that it would have without guesses, whatever the temperature. It reads each text as it comes, and goes on
guessing while the large model's passes are under way. Its passes take turns with the stages' in the node's one compute thread.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from nodes.deployment import Deployment
from nodes.engines.decoder.steps import Step
from nodes.generation.drafting import Belief
from nodes.generation.orders import Orders
from nodes.generation.session import Session
from nodes.ledger import Ledger
from nodes.pipeline import Pipeline
from splitnet.errors import NodeUnavailable, SplitnetError

__all__ = ["Companion", "Lender", "Price"]

_LONGEST_CHUNK = 256
_LEARNING = 0.1


@dataclass(frozen=True, slots=True)
class Price:
    """Of a pass to a session, and of one more token in it. `full`: no stage rests."""

    pass_s: float
    token_s: float
    full: bool


@dataclass(frozen=True, slots=True)
class Lender:
    """Of the small model's caches. `lend` takes slots, or says that there are none."""

    lend: Callable[[int], bool]
    take_back: Callable[[int], None]
    new_handle: Callable[[], int]


@dataclass(slots=True, eq=False)
class _Reader:
    """What the small model holds of a session's text: `held` tokens of `text`."""

    handle: int
    text: np.ndarray
    held: int = 0
    busy: bool = False
    target: int = 0  # guesses that are to wait to be sent
    belief: Belief = field(default_factory=Belief)


class Companion:
    """Of one deployment. `on_guessed` is called when a session's guesses are there, or none will come."""

    def __init__(self, small: Deployment, lender: Lender, ledger: Ledger, pipeline: Pipeline, on_guessed: Callable[[], None]) -> None:
        self.small = small
        self._lender = lender
        self._ledger = ledger
        self._pipeline = pipeline
        self._on_guessed = on_guessed
        self._readers: dict[Session, _Reader] = {}
        self._token_s = 0.0  # how long one more guess takes

    def join(self, session: Session) -> None:
        """Follows its text from now on, where the caches have room."""
        slots = session.reserved
        if self.small.stages and not self.small.draining and self._lender.lend(slots):
            self._readers[session] = reader = _Reader(self._lender.new_handle(), np.empty(slots, np.int32))
            self._read(session, reader)

    def leave(self, session: Session) -> None:
        session.drafting = False
        reader = self._readers.pop(session, None)
        if reader is not None:
            self._lender.take_back(len(reader.text))
            self._pipeline.sessions_closed(self.small, Orders(closes=(reader.handle,)))

    def think(self, session: Session, price: Price) -> None:
        """Its next token is to be sent, or was: some guesses may be worth having. `session.drafting` until they are there."""
        reader = self._readers.get(session)
        if reader is None:
            return
        belief, token_s = reader.belief, price.token_s + self._token_s
        if session.unsent == 1:
            known = session.lookup.right >= belief.right and session.lookup.knows(session.tokens)  # which costs nothing
            reader.target = 0 if known and not session.guessed else belief.count(price.pass_s, token_s)
        elif session.guesser is belief and not price.full:
            reader.target = belief.count_more(session.guessed, price.pass_s, token_s)
        else:
            reader.target = 0
        self._read(session, reader)

    def _read(self, session: Session, reader: _Reader) -> None:
        """Has the next tokens computed: those that are not read yet, and then guess after guess."""
        text = session.believed
        wanted = session.unsent_guesses < reader.target and session.most_guesses() > 0
        session.drafting = wanted
        if reader.busy:
            return
        known = min(reader.held, len(text) - 1)
        differ = np.flatnonzero(reader.text[:known] != text[:known])
        start = int(differ[0]) if len(differ) else known
        count = min(len(text) - start, _LONGEST_CHUNK)
        last = start + count == len(text)
        if last and not wanted:
            count -= 1  # the newest token is read with the first guess
        if count < 1:
            return
        tokens = text[start : start + count].copy()
        sampling = session.sampling if start == 0 else None
        step = Step(reader.handle, start, tokens, int(last and wanted), sampling)
        reader.busy = True
        then = functools.partial(self._came, session, reader, step, session.epoch, len(text), self._ledger.loop.time())
        self._pipeline.run_here(self.small, Orders((step,)), then)

    def _came(
        self, session: Session, reader: _Reader, step: Step, epoch: int, length: int, began_s: float, found: np.ndarray | SplitnetError
    ) -> None:
        reader.busy = False
        if self._readers.get(session) is not reader:
            return
        if isinstance(found, SplitnetError):
            if not isinstance(found, NodeUnavailable):
                self._ledger.log.warning("the small model cannot guess for a session", deployment=self.small.name, error=found.message)
            self.leave(session)
            self._on_guessed()
            return
        end = step.position + len(step.tokens)
        reader.text[step.position : end] = step.tokens
        reader.held = end
        if step.wanted:
            self._token_s += (self._ledger.loop.time() - began_s - self._token_s) * (_LEARNING if self._token_s else 1.0)
            if session.epoch == epoch and len(session.believed) == length:
                session.guess(found, reader.belief)
        waited = session.drafting
        self._read(session, reader)
        if waited and not session.drafting:
            self._on_guessed()
