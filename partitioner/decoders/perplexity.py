"""What formats of weights cost a decoder model: its perplexity on a text, with weights as they are stored and as they come back from each format.

The whole model runs here, in float32 and by transformers' own code, one format after the other; the arithmetic of a node that computes in bfloat16 is not in it, only the rounding of
the weights. So it takes four bytes per parameter of this machine's memory: it is done where `--data` asks for it, and nowhere else.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from partitioner.decoders.model import GROUP_SIZE, DecoderModel
from splitnet.decoder_architectures import EMBEDDING, HEAD, LAYERS, place_of
from splitnet.decoder_weights import dequantize, quantize, stored_format
from splitnet.errors import BadInput, MissingExtra

__all__ = ["measure_perplexity"]

_MOST_TOKENS = 4096  #: that are judged: evenly taken windows of the text
_LONGEST_WINDOW = 512

OnProgress = Callable[[int, int, str], None]


def measure_perplexity(
    model: DecoderModel, data: Path, forms: Sequence[str], *, context: int, on_progress: OnProgress | None = None
) -> tuple[dict[str, float], str]:
    """Perplexity by format, "" for the weights as they are stored, and on what it was measured. `data`: a text file (the model's directory must have a tokenizer), or
    a JSON list of token ids. Raises BadInput for a text that is too short, MissingExtra without `tokenizers`."""
    import torch

    ids = _token_ids(model, data)
    windows = _windows(ids, min(context, _LONGEST_WINDOW))
    judged = sum(len(window) - 1 for window in windows)
    found: dict[str, float] = {}
    stages = ["", *forms]
    runner = _Runner(model)
    for k, form in enumerate(stages):
        if on_progress:
            on_progress(k, len(stages), form or "as stored")
        runner.take(form)
        with torch.inference_mode():
            found[form] = math.exp(min(sum(map(runner.loss, windows)) / judged, 700.0))
    if on_progress:
        on_progress(len(stages), len(stages), "")
    return found, f"on {judged} tokens of {data.name}"


class _Runner:
    """The whole model in float32, whose weights may be exchanged."""

    def __init__(self, model: DecoderModel) -> None:
        import transformers

        self._model = model
        progress = transformers.logging.is_progress_bar_enabled()
        transformers.logging.disable_progress_bar()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._module: Any = transformers.AutoModelForCausalLM.from_pretrained(
                    str(model.checkpoint.folder), dtype="float32", use_safetensors=True
                )
        finally:
            if progress:
                transformers.logging.enable_progress_bar()
        self._module.eval()
        self._parameters: Mapping[str, Any] = dict(self._module.named_parameters())

    def take(self, form: str) -> None:
        """The weights as they come back from a format; "" as they are."""
        import torch

        model = self._model
        groups = model.groups(form, form if form in ("float32", "bfloat16") else "float32") if form else {}
        with torch.no_grad():
            for name in {name for names in model.tensors.values() for name in names}:
                weight = model.checkpoint.read(name)
                if form:
                    part = place_of(model.checkpoint.model_type, name).part
                    group = part if part in (EMBEDDING, HEAD) else LAYERS
                    one = stored_format(name, weight.shape, groups[group], GROUP_SIZE, "bfloat16" if form == "bfloat16" else "float32")
                    weight = dequantize(name, quantize(name, weight, one, GROUP_SIZE))
                self._place(name).copy_(torch.from_numpy(np.ascontiguousarray(weight, dtype=np.float32)))

    def _place(self, name: str) -> Any:
        """Where transformers keeps a tensor of this canonical name: experts in one piece."""
        if name in self._parameters:
            return self._parameters[name]
        expert = re.fullmatch(r"(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight", name)
        assert expert is not None, name
        if expert[3] == "down_proj":
            return self._parameters[f"{expert[1]}.down_proj"][int(expert[2])]
        both = self._parameters[f"{expert[1]}.gate_up_proj"][int(expert[2])]
        half = both.shape[0] // 2
        return both[:half] if expert[3] == "gate_proj" else both[half:]

    def loss(self, window: np.ndarray) -> float:
        """The sum over the window's tokens but the first."""
        import torch

        ids = torch.from_numpy(window)[None]
        scores = self._module(input_ids=ids, use_cache=False).logits[0, :-1].float()
        return float(torch.nn.functional.cross_entropy(scores, ids[0, 1:], reduction="sum"))


def _windows(ids: np.ndarray, length: int) -> list[np.ndarray]:
    """Evenly taken, without overlap."""
    if len(ids) < 2:
        raise BadInput(f"--data: {len(ids)} tokens are too few to judge a model by", remedy="give a longer text")
    whole = [ids[i : i + length] for i in range(0, len(ids), length)]
    whole = [window for window in whole if len(window) > 1]
    wanted = max(1, min(len(whole), _MOST_TOKENS // max(length, 1) or 1))
    return [whole[i * len(whole) // wanted] for i in range(wanted)]


def _token_ids(model: DecoderModel, data: Path) -> np.ndarray:
    try:
        text = data.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--data: cannot read {str(data)!r} as text: {error}") from None
    if data.suffix == ".json":
        try:
            ids = np.asarray(json.loads(text))
        except ValueError as error:
            raise BadInput(f"--data: {data}: not valid JSON: {error!s:.200}") from None
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise BadInput(f"--data: {data}: expected a list of token ids")
    else:
        ids = np.asarray(_tokenizer(model).encode(text).ids)
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < model.vocabulary:
        raise BadInput(f"--data: {data}: a token id is out of range: the vocabulary has {model.vocabulary}")
    return ids.astype(np.int64)


def _tokenizer(model: DecoderModel) -> Any:
    path = model.checkpoint.folder / "tokenizer.json"
    if not path.is_file():
        raise BadInput(
            f"--data: {model.checkpoint.folder} has no tokenizer.json",
            remedy="give a .json file with a list of token ids instead of a text",
        )
    try:
        import tokenizers
    except ImportError:
        raise MissingExtra("--data: tokenizers is not installed", remedy="pip install 'splitnet[hf]'") from None
    return tokenizers.Tokenizer.from_file(str(path))
