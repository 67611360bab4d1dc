"""What formats of weights cost a decoder model: its perplexity on a text, with weights as they are stored and as they come back from each format.

The model runs here, in float32 and by transformers' own code, one format after the other; the arithmetic of a node that computes in bfloat16 is not in it, only the rounding of
the weights. One layer at a time is read, run over all windows of the text and forgotten: it takes the memory of the largest layer (or of the embedding) and of the hidden states.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from partitioner.decoders.model import GROUP_SIZE, DecoderModel
from splitnet.decoder_architectures import EMBEDDING, HEAD, LAYERS, architecture, place_of
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
    ids = _token_ids(model, data)
    windows = _windows(ids, min(context, _LONGEST_WINDOW))
    judged = sum(len(window) - 1 for window in windows)
    found: dict[str, float] = {}
    stages = ["", *forms]
    runner = _Runner(model)
    for k, form in enumerate(stages):
        if on_progress:
            on_progress(k, len(stages), form or "as stored")
        found[form] = math.exp(min(runner.losses(form, windows) / judged, 700.0))
    if on_progress:
        on_progress(len(stages), len(stages), "")
    return found, f"on {judged} tokens of {data.name}"


class _Runner:
    """The model in float32, of which one vertex at a time has its weights; what each makes of all windows is kept for the next."""

    def __init__(self, model: DecoderModel) -> None:
        import transformers

        self._model = model
        with warnings.catch_warnings(), _without_weights():
            warnings.simplefilter("ignore")
            config = transformers.AutoConfig.from_pretrained(str(model.checkpoint.folder))
            self._module: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=_float32())
        self._module.eval().requires_grad_(False)
        kind = architecture(model.checkpoint.model_type)
        self._base: Any = self._module.get_submodule(kind.base.rstrip("."))
        self._table = kind.base + kind.embedding
        self._norm = kind.norm.rstrip(".")
        self._layers, self._last_norm = list(self._base.layers), getattr(self._base, self._norm)
        self._multiplier = getattr(self._base, "embedding_multiplier", None)  # Granite: of what the first layer gets
        self._absent = _absent()

    def losses(self, form: str, windows: Sequence[np.ndarray]) -> float:
        """The sum over all tokens but each window's first, with the weights as they come back from a format; "" as they are."""
        import torch

        ids = [torch.from_numpy(window)[None] for window in windows]
        with torch.inference_mode():
            table = self._table.removesuffix(".weight")
            with self._filled(self._module.get_submodule(table), [self._table], form):
                hidden = [self._module.get_submodule(table)(one) for one in ids]
            setattr(self._base, self._norm, self._absent)
            for i, layer in enumerate(self._layers):
                for k in range(len(self._layers)):
                    self._base.layers[k] = layer if k == i else self._absent
                if self._multiplier is not None:
                    self._base.embedding_multiplier = self._multiplier if i == 0 else 1.0
                with self._filled(layer, self._model.tensors[f"layers.{i}"], form):
                    hidden = [self._base(inputs_embeds=one, use_cache=False).last_hidden_state for one in hidden]
            self._base.layers[len(self._layers) - 1] = self._absent
            setattr(self._base, self._norm, self._last_norm)
            return self._judged(form, ids, hidden)

    def _judged(self, form: str, ids: Sequence[Any], hidden: Sequence[Any]) -> float:
        import torch

        names = self._model.tensors[HEAD]
        norm = [name for name in names if not name.startswith("lm_head.")]
        head = [name for name in names if name.startswith("lm_head.")] or [self._table]  # tied
        total = 0.0
        with self._filled(self._last_norm, norm, form), self._filled(self._module.lm_head, head, form):
            for one, states in zip(ids, hidden, strict=True):
                scores = self._module(inputs_embeds=states, use_cache=False).logits[0, :-1].float()
                total += float(torch.nn.functional.cross_entropy(scores, one[0, 1:], reduction="sum"))
        return total

    @contextlib.contextmanager
    def _filled(self, part: Any, names: Sequence[str], form: str) -> Iterator[None]:
        """The part has its weights until the block is left."""
        import torch

        prefix = (
            next(name for name, module in self._module.named_modules() if module is part) if part in self._base.modules() else "lm_head"
        )
        places = {
            f"{prefix}.{name}": (part.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2])
            for name, _ in part.named_parameters()
        }
        try:
            for parent, own in places.values():
                parent._parameters[own] = torch.nn.Parameter(torch.empty(parent._parameters[own].shape), requires_grad=False)
            parameters = {name: parent._parameters[own] for name, (parent, own) in places.items()}
            for name in names:
                shown = f"{prefix}.weight" if name == self._table else name
                _place(parameters, shown).copy_(torch.from_numpy(self._weight(name, form)))
            yield
        finally:
            for parent, own in places.values():
                parent._parameters[own] = torch.nn.Parameter(parent._parameters[own].to("meta"), requires_grad=False)

    def _weight(self, name: str, form: str) -> np.ndarray:
        """As it comes back."""
        model, weight = self._model, self._model.checkpoint.read(name)
        if form:
            groups = model.groups(form, form if form in ("float32", "bfloat16") else "float32")
            part = place_of(model.checkpoint.model_type, name).part
            group = part if part in (EMBEDDING, HEAD) else LAYERS
            one = stored_format(name, weight.shape, groups[group], GROUP_SIZE, "bfloat16" if form == "bfloat16" else "float32")
            weight = dequantize(name, quantize(name, weight, one, GROUP_SIZE))
        return np.ascontiguousarray(weight, dtype=np.float32)


def _place(parameters: Mapping[str, Any], name: str) -> Any:
    """Where transformers keeps a tensor of this canonical name: experts in one piece."""
    if name in parameters:
        return parameters[name]
    expert = re.fullmatch(r"(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight", name)
    assert expert is not None, name
    if expert[3] == "down_proj":
        return parameters[f"{expert[1]}.down_proj"][int(expert[2])]
    both = parameters[f"{expert[1]}.gate_up_proj"][int(expert[2])]
    half = both.shape[0] // 2
    return both[:half] if expert[3] == "gate_proj" else both[half:]


@contextlib.contextmanager
def _without_weights() -> Iterator[None]:
    """Modules that are made meanwhile have parameters without memory; buffers, which no checkpoint holds, are real."""
    import torch

    registered = torch.nn.Module.register_parameter

    def register(module: Any, name: str, parameter: Any) -> None:
        registered(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = torch.nn.Parameter(parameter.to("meta"), requires_grad=False)

    torch.nn.Module.register_parameter = register  # type: ignore[method-assign, assignment] # there is no other way to tell parameters from buffers
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = registered  # type: ignore[method-assign]


def _absent() -> Any:
    """In the place of a layer whose weights are not there: passes hidden states on."""
    import torch

    class Absent(torch.nn.Module):
        def forward(self, hidden_states: Any, *_: Any, **__: Any) -> Any:
            return hidden_states

    return Absent()


def _float32() -> Any:
    import torch

    return torch.float32


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
