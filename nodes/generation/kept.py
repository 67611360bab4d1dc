"""The slots of the caches: what live sessions may come to need, and what sessions that have ended still hold."""

from __future__ import annotations

from collections.abc import Iterator

from nodes.generation.session import Session

__all__ = ["Slots"]

_MOST_KEPT = 64  # each new prompt is held against all of them


class Slots:
    """Of every stage alike, for the plan says so. A live session has its slots promised from the start, so that none fails half-way; what is left holds ended sessions, whose
    caches serve prompts that begin alike, until others need the room."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.live: dict[Session, None] = {}  # in the order in which they came
        self.lent = 0  # to another deployment, for which this model guesses
        self.kept: dict[Session, None] = {}  # the one that was of no use for the longest time first

    @property
    def free(self) -> int:
        """Not promised to a live session."""
        return self.total - self.lent - sum(session.reserved for session in self.live)

    def _unused(self) -> int:
        return self.free - sum(session.reserved for session in self.kept)

    def make_room(self, tokens: int, spare: Session | None) -> list[Session] | None:
        """The kept sessions that are to be closed so that there is room for so many tokens more, `spare` last of all; None where there is none for all that."""
        if tokens > self.free:
            return None
        leaving, room = [], self._unused()
        for session in [s for s in self.kept if s is not spare] + [s for s in self.kept if s is spare]:
            if room >= tokens:
                break
            if not session.in_flight:
                leaving.append(session)
                room += session.reserved
        if room < tokens:
            return None
        for session in leaving:
            del self.kept[session]
        return leaving

    def keep(self, session: Session, now_s: float) -> list[Session]:
        """It has ended; returns those that are to be closed, because there are too many."""
        self.live.pop(session, None)
        session.keep(now_s)
        self.kept[session] = None
        leaving = [s for s in self.kept if not s.in_flight][: max(len(self.kept) - _MOST_KEPT, 0)]
        for old in leaving:
            del self.kept[old]
        return leaving

    def touch(self, session: Session, now_s: float) -> None:
        """It was of use."""
        if session in self.kept:
            del self.kept[session]
            self.kept[session] = None
            session.used_s = now_s

    def idle(self, before_s: float) -> Iterator[Session]:
        """Takes out those that have been of no use since then."""
        for session in [s for s in self.kept if s.used_s <= before_s and not s.in_flight]:
            del self.kept[session]
            yield session
