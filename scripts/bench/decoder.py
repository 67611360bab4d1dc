"""The decoder engine beside eager transformers: a 0.44 B Llama with random weights, whole, in one process, in turns.

    python scripts/bench/decoder.py [--formats bfloat16,int4] [--threads 1,2] [--rounds 3] [--keep DIR] [--memory] [--sessions 8]

Tokens per second of a prefill of --prompt tokens and of --decode tokens after it; the fastest of the rounds counts, for both. `--keep` leaves the shards in a folder, for
the next run. `--memory`: instead, what a process takes at its peak while it loads each shard, beside the shard's own tensors. `--sessions`: also that many sessions decoding at once.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from nodes.engines.decoder import Step
from nodes.engines.decoder.engine import DecoderEngine
from splitnet.decoder_architectures import place_of
from splitnet.decoder_format import DECODER_MEMBER, DecoderSpec, plain_config
from splitnet.decoder_weights import quantize, stored_format
from splitnet.shard import Shard, open_shard, write_shard

CONTEXT, GROUP = 2048, 64
#: In a process of its own: resident before, and the peak after, in KiB (getrusage would tell the parent's peak).
_LOAD = """
import json, sys
import transformers, torch
from transformers import LlamaForCausalLM
from nodes.engines.decoder.engine import DecoderEngine
from splitnet.shard import open_shard
def figure(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))
shard = open_shard(sys.argv[1])
before = figure("VmRSS")
engine = DecoderEngine.load(shard, threads=1, cache_tokens=2048)
print(json.dumps([before, figure("VmHWM"), engine.memory_bytes()]))
"""


def config() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, num_key_value_heads=8, intermediate_size=4096, vocab_size=32000,
        max_position_embeddings=CONTEXT,
    )  # fmt: skip


def build() -> LlamaForCausalLM:
    with torch.device("meta"):
        model = LlamaForCausalLM(config()).to(torch.bfloat16)
    torch.manual_seed(0)
    model = model.to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        parameter.data.fill_(1.0) if "norm" in name else parameter.data.normal_(0.0, 0.02)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    return model.eval().requires_grad_(False)


def shard_of(model: LlamaForCausalLM, form: str, folder: Path) -> Shard:
    if (folder / form / "manifest.json").exists():
        return open_shard(folder / form)
    (folder / form).mkdir(parents=True, exist_ok=True)
    dtype = "float32" if form == "float32" else "bfloat16"
    weights = {"embedding": dtype, "layers": form, "head": form}
    spec = DecoderSpec(plain_config(model.config.to_dict()), 0, 24, True, True, dtype, weights, CONTEXT, GROUP)
    stored: dict[str, np.ndarray] = {}
    for name, tensor in model.state_dict().items():
        array = tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        wanted = weights.get(place_of("llama", name).part, dtype)
        stored |= quantize(name, array, stored_format(name, array.shape, wanted, GROUP, dtype), GROUP)
    file = folder / form / "weights.safetensors"
    save_file(stored, file)
    return write_shard(
        folder / form, model="bench", model_sha256="0" * 64, stage="whole", engine="decoder", inputs=spec.inputs(), outputs=spec.outputs(),
        members={DECODER_MEMBER: spec.to_bytes(), file.name: file}, param_bytes=sum(a.nbytes for a in stored.values()), activation_bytes=0,
    )  # fmt: skip


Timed = tuple[float, float]


def eager(model: LlamaForCausalLM, prompt: np.ndarray, decode: int) -> Timed:
    with torch.inference_mode():
        cache = DynamicCache(config=model.config)
        started = time.perf_counter()
        scores = model(torch.from_numpy(prompt).long()[None], past_key_values=cache, logits_to_keep=1).logits
        prefilled = time.perf_counter()
        for _ in range(decode):
            scores = model(scores[:, -1].argmax(-1)[:, None], past_key_values=cache, logits_to_keep=1).logits
        return prefilled - started, time.perf_counter() - prefilled


def engine_run(engine: DecoderEngine, prompt: np.ndarray, decode: int) -> Timed:
    started = time.perf_counter()
    token = engine.step([Step(1, 0, prompt, 1)], None)
    prefilled = time.perf_counter()
    for i in range(decode):
        token = engine.step([Step(1, len(prompt) + i, token, 1)], None)
    return prefilled - started, time.perf_counter() - prefilled


def many(engine: DecoderEngine, sessions: int, prompt: np.ndarray, decode: int) -> float:
    """Seconds for one token of each."""
    engine.step([Step(1, 0, prompt)], None)
    for session in range(2, sessions + 1):
        engine.fork(1, session, len(prompt))
    started = time.perf_counter()
    for i in range(decode):
        engine.step([Step(session, len(prompt) + i, prompt[:1], 1) for session in range(1, sessions + 1)], None)
    took = (time.perf_counter() - started) / decode
    for session in range(1, sessions + 1):
        engine.close(session)
    return took


def compare(arguments: argparse.Namespace, model: LlamaForCausalLM, shards: dict[str, Shard], threads: int) -> None:
    torch.set_num_threads(threads)
    prompt = np.random.default_rng(0).integers(0, 32000, arguments.prompt).astype(np.int32)
    runs: dict[str, Callable[[], Timed]] = {"eager bfloat16": lambda: eager(model, prompt, arguments.decode)}
    engines: dict[str, DecoderEngine] = {}
    for form, shard in shards.items():
        engines[form] = DecoderEngine.load(shard, threads=threads, cache_tokens=8192)
        runs[form] = lambda engine=engines[form]: engine_run(engine, prompt, arguments.decode)
    best: dict[str, Timed] = {}
    for _ in range(arguments.rounds):
        for name, run in runs.items():
            took = run()
            best[name] = tuple(map(min, took, best[name])) if name in best else took  # type: ignore[assignment] # two of two
    base = best["eager bfloat16"]
    for name, (prefill, decode) in best.items():
        line = f"{threads} threads  {name:15} prefill {arguments.prompt / prefill:7.1f} tok/s ({base[0] / prefill:4.2f}x)   "
        line += f"decode {arguments.decode / decode:6.1f} tok/s ({base[1] / decode:4.2f}x)"
        if arguments.sessions and name in engines:
            took = min(many(engines[name], arguments.sessions, prompt[:64], 4) for _ in range(2))
            line += f"   {arguments.sessions} sessions: {arguments.sessions / took:6.1f} tok/s"
        print(line, flush=True)


def memory(shards: dict[str, Shard]) -> None:
    for form, shard in shards.items():
        done = subprocess.run([sys.executable, "-c", _LOAD, str(shard.path)], check=True, capture_output=True, text=True, timeout=120)
        before, after, weights = json.loads(done.stdout)
        more = (after - before) * 1024
        print(
            f"{form:10} base {before / 1024:6.0f} MiB, loading {more / 2**20:7.1f} MiB for {weights / 2**20:7.1f} MiB of tensors ({more / weights:.3f}x)"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", default="bfloat16,int8,int4")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--decode", type=int, default=16)
    parser.add_argument("--sessions", type=int, default=0)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--memory", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder: Path = arguments.keep or Path(temporary)
        model: Any = build()
        shards = {form: shard_of(model, form, folder) for form in arguments.formats.split(",")}
        if arguments.memory:
            del model
            gc.collect()
            memory(shards)
            return
        for threads in map(int, arguments.threads.split(",")):
            compare(arguments, model, shards, threads)


if __name__ == "__main__":
    main()
