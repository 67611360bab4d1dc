"""One generation at the ingress: its tokens, how far the stages' caches hold them, and what it asks for next."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np

from nodes.engines.decoder.steps import Sampling, Step
from nodes.generation.drafting import Belief, PromptLookup
from splitnet.generation import GenerateRequest

if TYPE_CHECKING:
    from nodes.calls import Call

__all__ = ["Session"]


class Session:
    """`handle` names it among the stages; one that is not used again. The stages' caches hold the first `held` tokens for certain, the first `sent` once all passes
    under way have come back. A session that has ended may be kept for prompts that begin as it does.

    Nothing is lost with a stage's cache: `rebuild` computes the tokens that are known again, as a prompt."""

    def __init__(
        self, handle: int, prompt: np.ndarray, wanted: GenerateRequest, call: Call | None = None, eos: Collection[int] = ()
    ) -> None:
        self.handle = handle
        self.call = call
        self.wanted = wanted
        self.prompt = len(prompt) - wanted.answered
        self.cached = 0  # of the prompt, that were there already
        self.held = self.sent = 0
        self._extent = (
            0  # what the caches hold once all passes under way have come back, wrong guesses included, which nobody takes out of them
        )
        self.in_flight = 0  # passes that have a step of it, or fork from it
        self.epoch = 0  # raised when what is under way no longer counts
        self.alone = False  # its next step goes in a pass of its own: one of its passes failed
        self.turn = 0  # when it was last given a place in a pass
        self.strikes = 0  # failures in a row
        self.losses = 0  # how often what was under way was lost with a node
        self.live = True
        self.finish = ""
        self.leader: Session | None = None  # whose prompt begins as this one does, and is being computed
        self.shared = 0  # so many tokens of it
        self.used_s = 0.0  # when it was last of use, once it is kept
        self.lookup = PromptLookup()
        self.guesser: Belief = self.lookup  # who has guessed what is guessed now
        self.drafting = False  # a small model is about to say what may follow
        self._tokens = np.empty(self.prompt + wanted.max_new_tokens, np.int32)
        self._tokens[: len(prompt)] = prompt
        self._count = len(prompt)
        self._guessed = 0  # tokens after these that are guessed
        self.accepted = 0  # guesses that were right
        self._told = False  # the stages know how to sample
        self._stops = wanted.stop if wanted.ignore_eos else (*wanted.stop, *((token,) for token in eos))
        self._sampling = Sampling(wanted.temperature, wanted.top_p, wanted.top_k, wanted.repetition_penalty, wanted.seed)

    # ------------------------------------------------------------------------------------------------------------- tokens

    @property
    def tokens(self) -> np.ndarray:
        """int32, the prompt and what has come so far."""
        return self._tokens[: self._count]

    @property
    def believed(self) -> np.ndarray:
        """int32, the same and what is guessed after it."""
        return self._tokens[: self._count + self._guessed]

    @property
    def guessed(self) -> int:
        """How many tokens the last of what is believed is away from what is known."""
        return self._guessed

    @property
    def unsent_guesses(self) -> int:
        return self._count + self._guessed - max(self.sent, self._count)

    @property
    def sampling(self) -> Sampling:
        return self._sampling

    @property
    def reserved(self) -> int:
        """Slots of every cache that it may come to need."""
        return len(self._tokens) if self.live else max(self.held, self._extent)

    @property
    def made(self) -> int:
        return self._count - self.prompt

    @property
    def unsent(self) -> int:
        """Tokens that are still to go into a pass: 1 where the next one is all that is missing, more where a prompt is."""
        return self._count - self.sent

    @property
    def started(self) -> bool:
        return self.sent > 0

    @property
    def waits(self) -> bool:
        """For a pass that brings its next token."""
        return self.sent >= self._count

    def shares(self, prompt: np.ndarray) -> int:
        """How many tokens of this one's text, as far as it will stand in the caches, `prompt` begins with; one of the prompt is always left to compute."""
        known = self.tokens if self.live else self.tokens[: self.held]
        count = min(len(known), len(prompt) - 1)
        differ = np.flatnonzero(known[:count] != prompt[:count])
        return int(differ[0]) if len(differ) else count

    # -------------------------------------------------------------------------------------------------------------- steps

    def begin_with(self, tokens: int) -> None:
        """The caches hold the first tokens already, or will once the pass that is being made forks them."""
        self.held = self.sent = self.cached = self._extent = tokens

    def chunk(self, most: int) -> Step:
        """The next tokens of the prompt; with the last of them, the first new one is wanted."""
        count = min(self.unsent, most)
        return self._step(self._tokens[self.sent : self.sent + count], int(self.sent + count == self._count))

    def next_step(self, draft: np.ndarray) -> Step:
        """The newest token, and what may follow it; or, while that is on its way, what may follow what is believed. All of it is verified where it is computed."""
        assert self.sent >= self._count - 1, "a prompt goes in chunks"
        self.guess(draft, self.lookup)
        tokens = self.believed[self.sent :]
        return self._step(tokens, len(tokens))

    def guess(self, tokens: np.ndarray, guesser: Belief) -> None:
        """What may follow what is believed; `guesser` will hear what was right."""
        if len(tokens):
            self.guesser = guesser
            self._tokens[self._count + self._guessed : self._count + self._guessed + len(tokens)] = tokens
            self._guessed += len(tokens)

    def _step(self, tokens: np.ndarray, wanted: int) -> Step:
        step = Step(self.handle, self.sent, tokens.astype(np.int32), wanted, None if self._told else self._sampling)
        self.sent += len(tokens)
        self._extent = self.sent
        self._told = True
        self.in_flight += 1
        return step

    def take(self, step: Step, sampled: np.ndarray) -> list[int]:
        """A pass has brought what it was to bring: the tokens that are new, in order. What follows a wrong guess is dropped, with all that is under way for it, and so is what
        follows the end."""
        self.strikes = 0
        if not step.wanted:
            self.held = step.position + len(step.tokens)
            return []
        looked = right = 0
        new: list[int] = []
        for token in sampled.tolist():
            guess = int(self._tokens[self._count]) if self._guessed else None
            looked += guess is not None
            right += guess == token
            self._guessed -= guess is not None
            self._tokens[self._count] = token
            self._count += 1
            new.append(token)
            self.finish = self._ended()
            if self.finish or guess not in (None, token):
                self._forget_guesses()
                break
        self.guesser.learn(looked, right)
        self.accepted += right
        self.held = self._count - 1
        self.sent = max(self.sent, self.held)
        return new

    def _forget_guesses(self) -> None:
        """What is under way for tokens that were guessed no longer counts."""
        self._guessed = 0
        self.epoch += 1
        self.sent = self._count - 1

    def most_guesses(self) -> int:
        """No more than may still come, besides the one that comes anyway."""
        return self.wanted.max_new_tokens - self.made - self._guessed - 1

    def _ended(self) -> str:
        for stop in self._stops:
            if len(stop) <= self.made and tuple(self._tokens[self._count - len(stop) : self._count].tolist()) == stop:
                return "stop"
        return "length" if self.made >= self.wanted.max_new_tokens else ""

    # ------------------------------------------------------------------------------------------------------------- faults

    def again(self) -> None:
        """What is under way for it no longer counts; it goes on from what the caches hold for certain. A repeated step is harmless."""
        self.epoch += 1
        self.sent = self.held
        self._guessed = 0
        self._told = False

    def rebuild(self, handle: int) -> None:
        """The caches hold nothing of it any more: all its tokens are computed again, as a prompt, under another handle."""
        self.again()
        self.handle = handle
        self.held = self.sent = self._extent = 0

    def keep(self, now_s: float) -> None:
        """It has ended; its caches stay for others."""
        self.live = False
        self.call = None
        self.leader = None
        self.used_s = now_s
        self._tokens = self._tokens[: self.held].copy()
        self._count = self.held
