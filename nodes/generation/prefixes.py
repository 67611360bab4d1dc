"""What a prompt has in common with others is not computed again: its session begins with a copy of their caches."""

from __future__ import annotations

import numpy as np

from nodes.generation.kept import Slots
from nodes.generation.orders import Fork
from nodes.generation.passes import Making
from nodes.generation.session import Session

__all__ = ["WORTH", "best_source", "follow", "may_start", "start"]

WORTH = 16  # tokens that are worth keeping, and copying
_WORTH_WAITING = 48  # and worth waiting for


def best_source(slots: Slots, prompt: np.ndarray) -> Session | None:
    """Whose caches hold the most of what this prompt begins with."""
    held = [(_held(session, prompt), session) for session in (*slots.live, *slots.kept) if session.held >= WORTH]
    tokens, best = max(held, key=lambda pair: pair[0], default=(0, None))
    return best if tokens >= WORTH else None


def follow(slots: Slots, session: Session) -> None:
    """Where a session before it is about to compute much of its prompt, it waits for that."""
    if session.started:
        return
    prompt = session.tokens
    likely = [(other.shares(prompt), other) for other in slots.live if other.held < other.prompt]
    tokens, leader = max(likely, key=lambda pair: pair[0], default=(0, None))
    source = best_source(slots, prompt)
    if leader is not None and tokens - (_held(source, prompt) if source else 0) >= _WORTH_WAITING:
        session.leader, session.shared = leader, tokens


def may_start(session: Session) -> bool:
    leader = session.leader
    if leader is not None and leader.live and leader.held < session.shared and not leader.alone:
        return False
    session.leader = None
    return True


def start(slots: Slots, session: Session, making: Making, now_s: float) -> None:
    """The first step of the session is being made."""
    source = best_source(slots, session.tokens)
    if source is None or source is session:
        return
    shared = _held(source, session.tokens)
    slots.touch(source, now_s)
    if shared == source.held and source in slots.kept and not source.in_flight:  # nothing of it is lost: it goes on as this one
        del slots.kept[source]
        session.handle = source.handle
    else:
        making.forks.append(Fork(source.handle, session.handle, shared))
        making.sources.append(source)
    session.begin_with(shared)


def _held(session: Session, prompt: np.ndarray) -> int:
    return min(session.shares(prompt), session.held)
