"""Continuous batching, at the ingress of a decoder model: which steps of which sessions make up the next forward pass.

A pass holds the next step of some sessions and a piece of a prompt. Several passes are under way at once, as many as keep the slowest stage busy (`nodes.generation.meter`), so that
neither the other stages nor the way between them cost throughput; a new one is made when there is room for it, of whatever is ready then. Passes go down the chain in their
order, so a session's pieces need not wait for each other: only the next token waits for the one before it, or is guessed (`nodes.generation.drafting`).
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from nodes.deployment import Deployment
from nodes.engines.decoder.steps import Step
from nodes.generation.companion import Companion, Price
from nodes.generation.kept import Slots
from nodes.generation.meter import Meter
from nodes.generation.orders import MAX_STEPS, Orders
from nodes.generation.passes import Entry, ForwardPass, Making, late, most_tokens
from nodes.generation.prefixes import WORTH, best_source, follow, may_start, start
from nodes.generation.session import Session
from nodes.generation.speeds import Speeds
from nodes.ledger import Ledger
from nodes.pipeline import Pipeline
from nodes.requests import Request, RequestKey
from splitnet.errors import BadInput, EngineFailure, InsufficientMemory, NodeUnavailable, Overloaded, SplitnetError
from splitnet.generation import PROMPT
from splitnet.generation_plan import LONGEST_CHUNK, Generation, chunk_of

__all__ = ["Counts", "Generator"]

_SHORTEST_CHUNK = 16  # tokens of a prompt in one pass, beside steps of others
_PATIENCE, _PATIENCE_S = 1.0, 0.005  # a piece of a prompt may make a pass longer by so many times its decoding, or so long
_IDLE_S = 120.0  # that an ended session's caches are kept
_STRIKES, _STRIKES_OF_ROOM = 3, 60  # a stage may hold caches of an ingress that is lost until it has noticed, too
_AGAIN_S = 0.05
_MOST_LOSSES = 16
_SHORTEST_RETRY_S, _LONGEST_RETRY_S = 0.05, 30.0
#: What one session's fault may do to all steps of a pass; or what a cache that a node has lost does.
_PERHAPS_ANOTHERS = (BadInput, EngineFailure, InsufficientMemory, Overloaded)


@dataclass(slots=True)
class Counts:
    """Since activation."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    passes: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


class Generator:
    """Of one deployment. `on_tokens` gets a session's new tokens, with the last of them `session.finish` is set; `on_failed` what a session ended with instead."""

    def __init__(
        self,
        deployment: Deployment,
        generation: Generation,
        ledger: Ledger,
        pipeline: Pipeline,
        on_tokens: Callable[[Session, list[int]], None],
        on_failed: Callable[[Session, SplitnetError], None],
    ) -> None:
        self.deployment = deployment
        self.generation = generation
        self.slots = Slots(generation.cache_tokens)
        self.meter = Meter(len(deployment.plan.stages))
        self.counts = Counts()
        self.speeds = Speeds()
        self.passes: set[ForwardPass] = set()
        self.companion: Companion | None = None  # a small model that guesses
        self._ledger = ledger
        self._loop = ledger.loop
        self._pipeline = pipeline
        self._on_tokens = on_tokens
        self._on_failed = on_failed
        self._handles = itertools.count(1)  # small, for each step carries one; the stages tell deployments apart (StageSessions)
        self._numbers = itertools.count(secrets.randbits(32))  # other nodes remember passes of whoever had this name before
        self._closing: list[int] = []
        self._most_tokens = most_tokens(deployment.plan)
        self._session_s = 0.0  # running mean of how long a session lives
        self._began_s: dict[Session, float] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._taking = False
        self._pressed = False  # there was more to send than there was room for
        self._returned_s = 0.0  # when a pass last came back
        self._turn = 0  # how many places in passes have been given

    # ---------------------------------------------------------------------------------------------------------- sessions

    def admit(self, session: Session) -> None:
        """Takes a new session in, or raises Overloaded at once."""
        prompt, now_s = session.tokens, self._loop.time()
        source = best_source(self.slots, prompt)
        leaving = self.slots.make_room(session.reserved, source)
        if leaving is None:
            raise Overloaded(
                f"{session.reserved} slots of the caches are needed for this prompt and its answer, {max(self.slots.free, 0)} of {self.slots.total} are free",
                remedy="try again a little later, ask for fewer tokens, or plan with more --sessions",
                retry_after_s=self._retry_s(),
            )
        for old in leaving:
            if old is source:  # there is no room for both: it goes on as the new one
                session.handle = old.handle
                session.begin_with(old.shares(prompt))
            else:
                self._closing.append(old.handle)
        follow(self.slots, session)
        self.slots.live[session] = None
        self._began_s[session] = now_s
        self.counts.prompt_tokens += session.prompt
        if self.companion is not None:
            self.companion.join(session)
        self.advance()

    def new_handle(self) -> int:
        return next(self._handles)

    def lend(self, tokens: int) -> bool:
        """Slots of the caches to another deployment on this node, for which this model guesses: whether there are so many. `take_back` frees them."""
        leaving = self.slots.make_room(tokens, None)
        if leaving is None:
            return False
        self._closing += [old.handle for old in leaving]
        self.slots.lent += tokens
        self.advance()
        return True

    def take_back(self, tokens: int) -> None:
        self.slots.lent -= tokens

    def end(self, session: Session, *, keep: bool = True) -> None:
        """It is over, however it ended: its slots are free for others. What the caches hold of it is kept for prompts that begin alike, or closed."""
        if session not in self.slots.live:
            return
        now_s = self._loop.time()
        self._session_s += (now_s - self._began_s.pop(session) - self._session_s) * (0.2 if self._session_s else 1.0)
        self.counts.cached_tokens += session.cached
        if self.companion is not None:
            self.companion.leave(session)
        if keep and session.held >= WORTH:
            self._closing += [old.handle for old in self.slots.keep(session, now_s)]
            if self._timer is None:
                self._timer = self._loop.call_later(_IDLE_S, self._drop_idle)
        else:
            del self.slots.live[session]
            session.live = False
            self._closing.append(session.handle)
        self.advance()

    def _drop_idle(self) -> None:
        self._timer = None
        self._closing += [session.handle for session in self.slots.idle(self._loop.time() - _IDLE_S)]
        if self.slots.kept:
            self._timer = self._loop.call_later(_IDLE_S / 4, self._drop_idle)
        self.advance()

    def _retry_s(self) -> float:
        each_s = self._session_s / max(len(self.slots.live), 1)
        return min(max(each_s, _SHORTEST_RETRY_S), _LONGEST_RETRY_S)

    def resume(self, deployment: Deployment) -> None:
        """A node was lost with its caches, and `deployment` (the same, or the one that has taken over) is whole: every session's tokens are computed
        again, as a prompt, and it goes on with the very tokens that it would have had."""
        before, self.deployment = self.deployment, deployment
        self._closing += [session.handle for session in (*self.slots.live, *self.slots.kept)]
        self.slots.kept.clear()
        while self._closing and before is not deployment:  # the living stages' engines serve both, and need the room
            self._close_now(before)
        for session in self.slots.live:
            if session.started:
                session.rebuild(self.new_handle())
        self.advance()

    # ------------------------------------------------------------------------------------------------------------ passes

    def advance(self) -> None:
        """Keeps the pipeline full, unless it lacks a node."""
        if self._taking:
            return  # it is called again once all of a pass has been looked at
        while not self.deployment.paused and self._make():
            pass
        if self._closing and not self.passes and not self.deployment.paused:
            self._close_now()

    def _make(self) -> bool:
        """Sends the next pass; False where there is no room for one, or nothing is ready."""
        live = sorted(self.slots.live, key=_precedence)
        decoding = sum(session.unsent <= 1 for session in live)
        size = self.meter.group(max(decoding, 1))
        ready = [session for session in live if not session.waits and not (session.drafting and session.unsent == 1)]
        if self.passes and not self.meter.has_room(sum(forward.busy_s for forward in self.passes), size):
            self._pressed = bool(ready)
            return False
        making = Making()
        suspect = next((session for session in ready if session.alone and not session.in_flight), None)
        if suspect is not None:
            self._add(making, suspect, self._most_tokens)
        else:
            making.price = self._price(decoding, size)
            ready = [session for session in ready if not session.alone]
            for session in [s for s in ready if s.unsent == 1 and s.started][:size]:
                self._add(making, session, self._most_tokens - making.tokens)
            self._add_prompts(making, [s for s in ready if s.unsent > 1 or not s.started], decoding)
            if not (making.entries or self.meter.full(decoding)):
                for session in [s for s in live if s.waits and s.made and not (s.alone or s.drafting)]:
                    self._add_ahead(making, session)
        if not making.entries:
            return False
        self._send(making)
        return True

    def _price(self, decoding: int, size: int) -> Price:
        """What a pass costs a session, and what a guess costs it more."""
        full = self.meter.full(decoding)
        return Price(self.meter.busy_s(size) / size if full else self.meter.trip_s(1), self.meter.token_s(full=full), full)

    def _add(self, making: Making, session: Session, most: int) -> None:
        if most < 1 or len(making.entries) >= MAX_STEPS:
            return
        if not (session.started or session.alone):
            start(self.slots, session, making, self._loop.time())
        if session.unsent > 1:
            step = session.chunk(most)
        else:
            step = session.next_step(self._guesses(making, session, most - 1))
        self._place(making, session, step)

    def _guesses(self, making: Making, session: Session, most: int) -> np.ndarray:
        """Besides those that a small model has made."""
        most, price = min(most, session.most_guesses()), making.price
        if price is None or session.unsent_guesses:
            return session.tokens[:0]
        return session.lookup.propose(session.tokens, most, price.pass_s, price.token_s)

    def _add_ahead(self, making: Making, session: Session) -> None:
        """Its last step is still under way, and stages rest: what is likely to follow what was guessed is sent after it."""
        most, price = min(self._most_tokens - making.tokens, session.most_guesses()), making.price
        draft = session.tokens[:0]
        if price is not None and session.guesser is session.lookup:
            draft = session.lookup.propose_more(session.believed, session.guessed, most, price.pass_s, price.token_s)
        if (len(draft) or session.unsent_guesses) and len(making.entries) < MAX_STEPS:
            self._place(making, session, session.next_step(draft))

    def _place(self, making: Making, session: Session, step: Step) -> None:
        self._turn += 1
        session.turn = self._turn
        making.entries.append(Entry(session, step, session.epoch))
        making.tokens += len(step.tokens)
        if step.wanted:
            self.counts.drafted_tokens += step.wanted - (step.position < len(session.tokens))  # the first token is known, or a guess itself
        if self.companion is not None and making.price is not None and session.waits and session.made:
            self.companion.think(session, making.price)

    def _add_prompts(self, making: Making, waiting: list[Session], decoding: int) -> None:
        """Pieces of prompts, each in its turn: a short one does not wait for a long one."""
        waiting = [session for session in waiting if may_start(session)]
        if not waiting:
            return
        most = making.tokens + min(self._piece(making, waiting, decoding), self._most_tokens - making.tokens)
        for session in waiting:
            self._add(making, session, most - making.tokens)

    def _piece(self, making: Making, waiting: list[Session], decoding: int) -> int:
        """How many tokens of prompts go into this pass: at first few, until it is known what they cost."""
        most = min(max(int(2 * self.meter.largest), 2 * _SHORTEST_CHUNK), LONGEST_CHUNK)
        if not decoding:
            return min(chunk_of(max(session.unsent for session in waiting), len(self.deployment.plan.stages)), most)
        decode_s = self.meter.busy_s(max(making.tokens, 1))
        slope = self.meter.token_s(full=True)
        patience_s = max(_PATIENCE * decode_s, _PATIENCE_S)
        return min(max(int(patience_s / slope) if slope else most, _SHORTEST_CHUNK), most)

    def _send(self, making: Making) -> None:
        entries = making.entries
        deployment, now_s = self.deployment, self._loop.time()
        closes, self._closing = tuple(self._closing[:MAX_STEPS]), self._closing[MAX_STEPS:]
        for source in making.sources:
            source.in_flight += 1
        forward = ForwardPass(self, entries, making.sources, closes, self.meter.busy_s(making.tokens), now_s)
        self.passes.add(forward)
        self.counts.passes += 1
        key = RequestKey(deployment.name, deployment.ingress.name, f"{next(self._numbers):x}")
        request = self._ledger.open(key, deployment, self._deadline_s(entries), forward)
        request.timer = self._loop.call_at(request.deadline_s, self._ledger.fail, request, late())
        request.orders = Orders(tuple(entry.step for entry in entries), tuple(making.forks), closes)
        ids = np.concatenate([entry.step.tokens for entry in entries]).astype(np.int64)
        self._pipeline.deliver(request, {PROMPT: ids}, deployment.input_routes, None)

    def _deadline_s(self, entries: list[Entry]) -> float:
        deadlines = [entry.session.call.deadline_s for entry in entries if entry.session.call is not None]
        return max(deadlines, default=self._ledger.deadline(0))

    def _close_now(self, deployment: Deployment | None = None) -> None:
        """Nothing is to be sent that could tell the stages (of `deployment`, where it is another one's)."""
        closes, self._closing = tuple(self._closing[:MAX_STEPS]), self._closing[MAX_STEPS:]
        self._pipeline.close_sessions(deployment or self.deployment, Orders(closes=closes))

    # -------------------------------------------------------------------------------------------------------------- back

    def returned(self, forward: ForwardPass, request: Request) -> None:
        orders = request.orders
        self._ledger.end(request)
        self._retire(forward)
        sampled = forward.sampled
        if sampled is None or sampled.shape != (forward.wanted,):
            got = None if sampled is None else sampled.shape
            self._excuse(forward, EngineFailure(f"the last stage returned tokens of shape {got}, {forward.wanted} were wanted"))
            return
        now_s = self._loop.time()
        self.meter.returned(forward.tokens, orders.timings if orders is not None else (), now_s - forward.sent_s)
        if self._pressed and self._returned_s:
            self.meter.followed(forward.tokens, now_s - self._returned_s)
        self._returned_s, self._pressed = now_s if self.passes else 0.0, False  # nothing follows it of what was not under way yet
        self._taking = True
        start = 0
        for entry in forward.entries:
            end = start + entry.step.wanted
            if entry.counts:
                self._take(entry, sampled[start:end])
            start = end
        self._taking = False
        self.advance()

    def _take(self, entry: Entry, sampled: np.ndarray) -> None:
        session = entry.session
        accepted = session.accepted
        new = session.take(entry.step, sampled)
        self.counts.new_tokens += len(new)
        self.counts.accepted_tokens += session.accepted - accepted
        session.alone = False
        if new:
            self._on_tokens(session, new)
        if self.companion is not None and session.live and session.unsent == 1:
            decoding = sum(each.unsent <= 1 for each in self.slots.live)
            self.companion.think(session, self._price(decoding, self.meter.group(decoding)))

    def failed(self, forward: ForwardPass, error: SplitnetError) -> None:
        self._retire(forward)
        self._closing += forward.closes  # which stages have heard of them is not known
        self._excuse(forward, error)

    def _retire(self, forward: ForwardPass) -> None:
        self.passes.discard(forward)
        for session in (*(entry.session for entry in forward.entries), *forward.sources):
            session.in_flight -= 1

    def _excuse(self, forward: ForwardPass, error: SplitnetError) -> None:
        """Each session of the pass is tried by itself; then with caches made anew, as a node may have lost them; then it fails, and only it."""
        for source in forward.sources:  # a node may have lost it
            if self.slots.kept.pop(source, False) is not False:
                self._closing.append(source.handle)
        counted = [entry for entry in forward.entries if entry.counts]
        if isinstance(error, NodeUnavailable) and self._ledger.recovery.hopeful(self.deployment):
            for entry in counted:  # `resume` follows, or what may fail them does
                entry.session.losses += 1
                entry.session.again()
            self._ledger.recovery.replayed(self.deployment, len(counted))
            self._loop.call_soon(self._ledger.recovery.switched, self.deployment.family)  # it may have been meanwhile
            counted = [entry for entry in counted if entry.session.losses > _MOST_LOSSES]
        for entry in counted:
            session = entry.session
            session.strikes += 1
            most = _STRIKES if not isinstance(error, Overloaded) else _STRIKES_OF_ROOM
            if not isinstance(error, _PERHAPS_ANOTHERS) or session.strikes > most:
                self._on_failed(session, error)
                continue
            self._ledger.log.info("a forward pass failed; its sessions are tried one by one", sessions=len(counted), error=error.message)
            if session.alone and session.held:
                self._closing.append(session.handle)
                session.rebuild(self.new_handle())
            elif session.alone and not isinstance(error, Overloaded):
                self._on_failed(session, error)
                continue
            else:
                session.again()
            session.alone = True
        self._loop.call_later(_AGAIN_S, self.advance)


def _precedence(session: Session) -> tuple[int, int]:
    """The more urgent first, then the one that has waited longer for a place."""
    return -session.call.priority if session.call is not None else 0, session.turn
