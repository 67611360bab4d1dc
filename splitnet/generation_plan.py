"""What a plan says of a decoder language model besides its stages: how much of it is to be remembered, and what to expect of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from splitnet.errors import BadPlan

__all__ = ["LONGEST_CHUNK", "Expected", "Generation", "chunk_of"]

LONGEST_CHUNK = 256  #: tokens of a prompt in one pass, at most
_SHORTEST_CHUNK = 32
_PIECES_PER_STAGE = 6


def chunk_of(prompt_tokens: int, stages: int) -> int:
    """In chunks of how many tokens the nodes compute a prompt that is alone: so many that all stages are busy most of the time, none too small to be worth a pass."""
    return min(max(-(-prompt_tokens // (_PIECES_PER_STAGE * stages)), _SHORTEST_CHUNK), LONGEST_CHUNK, prompt_tokens)


@dataclass(frozen=True, slots=True)
class Expected:
    """What is predicted, and for what: prompts of `prompt_tokens` in chunks of `chunk_tokens`, answers of `answer_tokens`. `ttft_s`: from the request at the
    ingress to the first token, nobody else there; `tpot_s`: from one token of a session to its next, nobody else there;
    `tokens_per_s`: of all sessions together, with `sessions` of them at once and `batch` of them in each pass."""

    prompt_tokens: int
    chunk_tokens: int
    answer_tokens: int
    sessions: int
    batch: int
    ttft_s: float
    tpot_s: float
    tokens_per_s: float


@dataclass(frozen=True, slots=True)
class Generation:
    """The plan's stages are a chain; what goes from one to the next is `hidden_states`. Raises BadPlan for figures that cannot be."""

    context_length: int  #: tokens of one session, prompt and answer
    sessions: int  #: how many sessions of that length the caches hold; more that are shorter
    vocabulary: int
    kv_bytes_per_token: Mapping[str, int]  #: by stage: what one token of one session takes there
    dtype: str = "float32"  #: of hidden states and caches, and what is computed in: "float32" or "bfloat16"
    weights: Mapping[str, str] = field(default_factory=dict)  #: by stage: "float32", "bfloat16", "int8" or "int4"
    eos_token_ids: tuple[int, ...] = ()
    bos_token_ids: tuple[int, ...] = ()  #: one, or none
    tokenizer: str = ""  #: the directory or the hub's repository that the model was read from; its tokenizer and chat template stand there
    expected: Expected | None = None
    perplexity: Mapping[str, float] = field(
        default_factory=dict
    )  #: by format of weights, where it was measured; "" is the model as it is stored
    perplexity_of: str = ""  #: on what
    draft: str = ""  #: the deployment of a small model on the first stage's node that guesses what comes next; "": none

    def __post_init__(self) -> None:
        for name in ("context_length", "sessions", "vocabulary"):
            if getattr(self, name) < 1:
                raise BadPlan(f"generation.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("eos_token_ids", "bos_token_ids"):
            if beyond := [token for token in getattr(self, name) if not 0 <= token < self.vocabulary]:
                raise BadPlan(f"generation.{name}: {beyond[0]} is no token of a vocabulary of {self.vocabulary}")

    @property
    def cache_tokens(self) -> int:
        """Slots of the caches on every stage: one holds one token of one session."""
        return self.context_length * self.sessions

    def cache_bytes(self, stage: str) -> int:
        """What a stage's caches take when all slots are used."""
        return self.kv_bytes_per_token.get(stage, 0) * self.cache_tokens
