"""What a stage of a decoder model is asked for: a batch of steps of several sessions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["Sampling", "Step"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the last stage draws the next token. `seed` and the position decide the draw, so that it does not depend on what else is in the
    batch, and a repeated step draws the same."""

    temperature: float = 0.0  #: 0: greedy, the most likely token (the lowest id of several)
    top_p: float = 1.0  #: among the fewest tokens whose probabilities together reach it
    top_k: int = 0  #: among so many of the most likely tokens; 0: all
    repetition_penalty: float = (
        1.0  #: Keskar et al. 2019 (CTRL): a score of a token that was there is divided by it, a negative one multiplied
    )
    seed: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """A piece of one session's sequence, to be computed in one pass."""

    session: int  #: the handle that the ingress gave, unsigned, 64 bit
    position: int  #: tokens in the cache before this step: the stage truncates its cache to it, and refuses where it holds fewer
    tokens: np.ndarray  #: int32 [count], the ids: embedded by the first stage, history for the repetition penalty at the last one
    wanted: int = 0  #: for how many of its last positions the next token is wanted; 0: a chunk of a prompt
    sampling: Sampling | None = None  #: for the last stage; with the session's first step at the least. None: as before, or greedy
