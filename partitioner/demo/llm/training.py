"""A Llama of a few million parameters, trained on a text in minutes, and saved as an ordinary directory: config.json, model.safetensors, tokenizer.json."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from partitioner.demo.llm.corpus import documents, fingerprint

__all__ = ["END", "SMALL", "TINY", "Progress", "Recipe", "trained_model"]

END = "<|endoftext|>"
_VERSION = 1  # of what this module makes of a recipe
_CLIP = 1.0


@dataclass(frozen=True, slots=True)
class Recipe:
    """A model and how it is trained. `sequence` tokens at a time, `batch` of them in a step; `characters` of text: few enough to be seen a dozen times."""

    vocabulary: int = 1024
    hidden: int = 192
    layers: int = 6
    heads: int = 6
    kv_heads: int = 2
    intermediate: int = 512
    context: int = 512
    steps: int = 1000
    batch: int = 8
    sequence: int = 128
    learning_rate: float = 4e-3
    characters: int = 240_000
    seed: int = 7


SMALL = Recipe()
#: For tests: seconds instead of minutes, and no text worth reading.
TINY = Recipe(
    vocabulary=320,
    hidden=32,
    layers=4,
    heads=4,
    kv_heads=2,
    intermediate=64,
    context=128,
    steps=12,
    batch=4,
    sequence=32,
    characters=10_000,
)


@dataclass(frozen=True, slots=True)
class Progress:
    """After a step: how many of all are done, and the mean loss of the latest ones (nats per token)."""

    step: int
    steps: int
    loss: float


def trained_model(recipe: Recipe, cache: Path | None = None, say: Callable[[Progress], None] = lambda _: None) -> Path:
    """The directory of the trained model, from the cache where it is there. Its name is a hash of the recipe and the text, so another Python's text is
    another model. An interrupted training leaves nothing behind."""
    texts = documents(recipe.characters)
    known = json.dumps([_VERSION, asdict(recipe), fingerprint(texts)], sort_keys=True)
    place = (cache or _cache()) / hashlib.sha256(known.encode()).hexdigest()[:16]
    if not place.is_dir():
        place.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=place.parent, prefix="unfinished-"))
        try:
            _train(recipe, texts, unfinished, say)
            unfinished.rename(place)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            if not place.is_dir():  # else somebody else was faster
                raise
    return place


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "splitnet" / "demo-llm"


def _train(recipe: Recipe, texts: Sequence[str], folder: Path, say: Callable[[Progress], None]) -> None:
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    tokenizer = _tokenizer(recipe, texts)
    end = tokenizer.token_to_id(END)
    stream: list[int] = []
    for encoded in tokenizer.encode_batch(list(texts), add_special_tokens=False):
        stream += [end, *encoded.ids]
    tokens = torch.tensor([*stream, end])

    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        config = LlamaConfig(
            vocab_size=tokenizer.get_vocab_size(), hidden_size=recipe.hidden, num_hidden_layers=recipe.layers, num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.kv_heads, intermediate_size=recipe.intermediate, max_position_embeddings=recipe.context,
            tie_word_embeddings=True, bos_token_id=end, eos_token_id=end, pad_token_id=None,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
        _fit(model, tokens, recipe, say)
    model.eval()
    model.generation_config = GenerationConfig(bos_token_id=end, eos_token_id=end)
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END, "model_max_length": recipe.context}
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=1) + "\n")


def _fit(model: Any, tokens: Any, recipe: Recipe, say: Callable[[Progress], None]) -> None:
    """AdamW: warm-up, then down to a tenth along a cosine."""
    import torch

    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    optimiser = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=recipe.learning_rate,
        betas=(0.9, 0.95),
        fused=True,
    )
    window = min(recipe.sequence + 1, len(tokens))
    mean = 0.0
    for step in range(recipe.steps):
        for group in optimiser.param_groups:
            group["lr"] = recipe.learning_rate * _schedule(step, recipe.steps)
        starts = torch.randint(len(tokens) - window + 1, (recipe.batch,)).tolist()
        chosen = torch.stack([tokens[start : start + window] for start in starts])
        logits = model(chosen[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), chosen[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
        optimiser.step()
        optimiser.zero_grad()
        mean = loss.item() if step == 0 else 0.95 * mean + 0.05 * loss.item()
        say(Progress(step + 1, recipe.steps, mean))


def _schedule(step: int, steps: int) -> float:
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _tokenizer(recipe: Recipe, texts: Sequence[str]) -> Any:
    """Byte-level BPE (Radford et al. 2019); a text that is encoded begins with END, as each document did in training."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, tokenizer.token_to_id(END))])
    return tokenizer
