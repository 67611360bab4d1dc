"""all-MiniLM-L6-v2 divided at a layer, and two tasks for it: a few real texts, and finding the passage that a sentence was taken from.

The second is scored against labels. Its passages are paragraphs of the Python language reference, as every Python carries it (pydoc_data.topics): the query is a
paragraph's first sentence, the answer the rest of it, among the rests of all others; and the other way round. No codec was ever set on these texts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from partitioner.demo.text import TextTask, find_minilm

__all__ = ["MiniLM", "Retrieval", "Scores", "passages"]

Change = Callable[[np.ndarray], np.ndarray]
_BATCH, _TOKENS = 16, 64
_SENTENCE = re.compile(r"(.{50,}?[.:;]) (.{150,})")


class MiniLM:
    def __init__(self) -> None:
        from transformers import AutoModel, AutoTokenizer

        folder = find_minilm()
        self.task = TextTask(folder, _BATCH)
        docs = Path(__file__).resolve().parents[2]
        texts = [part.strip() for file in ("README.md", "docs/planning.md") for part in (docs / file).read_text().split("\n\n")]
        prose = [text for text in texts if len(text) > 200 and text[0].isalpha()]
        self.texts = [*self.task.paragraphs, *(question.text for question in self.task.questions), *prose]
        self.batches = list(self.task.batches(self.texts))
        self.model: Any = AutoModel.from_pretrained(str(folder)).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(str(folder))

    def embed(self, layer: int, change: Change | None, batches: Sequence[dict[str, np.ndarray]] | None = None) -> np.ndarray:
        """The embeddings, with what enters this layer changed."""

        def hook(_: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
            assert change is not None
            if args:
                return (torch.from_numpy(change(args[0].numpy())), *args[1:]), named
            return args, {**named, "hidden_states": torch.from_numpy(change(named["hidden_states"].numpy()))}

        batches = self.batches if batches is None else batches
        handle = self.model.encoder.layer[layer].register_forward_pre_hook(hook, with_kwargs=True) if change else None
        try:
            answers = [self.model(**{k: torch.from_numpy(v) for k, v in batch.items()}) for batch in batches]
        finally:
            if handle is not None:
                handle.remove()
        return self.task.embed(batches, [{"last_hidden_state": answer.last_hidden_state.numpy()} for answer in answers])

    def tokens(self, texts: Sequence[str]) -> list[dict[str, np.ndarray]]:
        """Batches of texts of about the same length, cut off at 64 tokens."""
        found = []
        for first in range(0, len(texts), _BATCH):
            encoded = self.tokenizer(
                list(texts[first : first + _BATCH]), padding=True, truncation=True, max_length=_TOKENS, return_tensors="np"
            )
            found.append({name: encoded[name].astype(np.int64) for name in ("input_ids", "attention_mask")})
        return found


def passages() -> list[tuple[str, str]]:
    """(first sentence, the rest) of each paragraph of prose that is long enough; each rest once."""
    from pydoc_data import topics

    found: dict[str, str] = {}
    for _, text in sorted(topics.topics.items()):
        for part in text.split("\n\n"):
            paragraph = " ".join(part.split())
            if paragraph[:1].isalpha() and ">>>" not in paragraph and "::=" not in paragraph and (match := _SENTENCE.fullmatch(paragraph)):
                found[match[2]] = match[1]
    return [(sentence, rest) for rest, sentence in found.items()]


@dataclass(frozen=True)
class Scores:
    """How often the right text is the first; one over its rank, for each query; Spearman's rank correlation of all similarities with the whole model's."""

    first: float
    reciprocals: np.ndarray
    spearman: float

    @property
    def reciprocal(self) -> float:
        return float(self.reciprocals.mean())

    def share_of(self, whole: Scores) -> tuple[float, float]:
        """(this mean reciprocal rank over the whole model's; its standard error, by the differences of the queries)."""
        error = float((self.reciprocals - whole.reciprocals).std()) / len(whole.reciprocals) ** 0.5
        return self.reciprocal / whole.reciprocal, error / whole.reciprocal


class Retrieval:
    """Scored against labels, by embeddings of the whole model or of the divided one."""

    def __init__(self, model: MiniLM, most: int | None = None) -> None:
        self._model = model
        pairs = passages()[:most]
        self.count = len(pairs)
        texts = [sentence for sentence, _ in pairs] + [rest for _, rest in pairs]
        self._order = np.argsort([len(text) for text in texts], kind="stable")
        self._batches = model.tokens([texts[k] for k in self._order])
        self._whole = self._similarities(0, None)
        self.whole = self._scores(self._whole)

    def score(self, layer: int, change: Change) -> Scores:
        return self._scores(self._similarities(layer, change))

    def _similarities(self, layer: int, change: Change | None) -> np.ndarray:
        embeddings = self._model.embed(layer, change, self._batches)
        placed = np.empty_like(embeddings)
        placed[self._order] = embeddings
        alike: np.ndarray = placed[: self.count] @ placed[self.count :].T
        return alike

    def _scores(self, alike: np.ndarray) -> Scores:
        right = np.diagonal(alike)
        ranks = np.concatenate([(alike > right[:, None]).sum(1), (alike > right).sum(0)]) + 1
        return Scores(float((ranks == 1).mean()), 1 / ranks, _spearman(alike.ravel(), self._whole.ravel()))


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    ranks = [np.argsort(np.argsort(values)).astype(np.float64) for values in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])
