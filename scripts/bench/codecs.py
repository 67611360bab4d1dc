"""Every codec on real activations: bits per number, what the task loses, speed per core.

    python scripts/bench/codecs.py [--only digits minilm retrieval speed delta] [--codecs zstd bf16 ...] [--rounds 5]

digits: a CNN trained on scikit-learn's digits, fivefold: each of the 1,797 images is answered once by a network that did not see it, so
that 0.1% are 1.8 images. Activations are encoded as the wire does, chunk by chunk, the fold's test images as one batch.
minilm: all-MiniLM-L6-v2 on the paragraphs of the demo and of this project's documentation, and its questions. The score is the cosine
between the embeddings of the whole model and of the divided one; beside it stands how often each text's nearest other one stays it.
speed: ViT-B/16 and ResNet-50 of random weights (transformers' configurations) on a random image: speeds need shapes and zeros, not sense.
delta: a picture that moves through the first layers of the digits' CNN.

Speeds are of process time, in MB of float32 per second, each codec in turn with a copy of the same bytes: medians over the rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import torch
from retrieval import MiniLM, Retrieval

from nodes.memory import keep_buffers
from partitioner.demo.digits import Digits, train
from splitnet.codecs import codec_names, get_codec
from splitnet.codecs.delta import DeltaEncoder
from splitnet.wire import CHUNK_BYTES

PARTS = ("digits", "minilm", "retrieval", "speed", "delta")
FOLDS = 5
SET_ON = 2  # folds that the step of wide2 was set on
_WORTH_RANKING = ("bf16", "int8-zstd", "step4", "had4-zstd", "int4-zstd")
SPEED_BYTES = 8 << 20  # of a cut's activation, at the most


@dataclass
class Row:
    cut: str
    codec: str
    bits: float
    loss: float
    note: str = ""


def chunks(flat: np.ndarray) -> Iterator[np.ndarray]:
    step = CHUNK_BYTES // flat.itemsize
    return (flat[first : first + step] for first in range(0, flat.size, step))


def through(codec: str, array: np.ndarray) -> tuple[np.ndarray, int]:
    """(what arrives, bytes sent)."""
    flat, found, size = np.ascontiguousarray(array).reshape(-1), np.empty(array.size, array.dtype), 0
    for chunk, out in zip(chunks(flat), chunks(found), strict=True):
        payload = memoryview(get_codec(codec).encode(chunk))
        size += payload.nbytes
        get_codec(codec).decode(payload, out)
    return found.reshape(array.shape), size


# ------------------------------------------------------------------------------------------------------------------- digits


def digits_folds(count: int = FOLDS) -> list[tuple[torch.nn.Sequential, torch.Tensor, np.ndarray]]:
    from sklearn import datasets

    raw = datasets.load_digits()
    images, labels = (raw.images[:, None] / 16).astype(np.float32), raw.target.astype(np.int64)
    parts = np.array_split(np.random.default_rng(7).permutation(len(images)), FOLDS)
    found = []
    for k, test in enumerate(parts[:count]):
        rest = np.concatenate([part for j, part in enumerate(parts) if j != k])
        net = train(Digits(images[rest], labels[rest], images[test], labels[test]))
        found.append((net, torch.from_numpy(images[test]), labels[test]))
    return found


DIGITS_CUTS = {"relu 1": 3, "relu 2": 6, "pool 1": 7, "relu 3": 10, "pool 2": 11}


def digits(names: tuple[str, ...], folds: list[tuple[torch.nn.Sequential, torch.Tensor, np.ndarray]]) -> list[Row]:
    rows = []
    count = sum(len(labels) for _, _, labels in folds)
    for cut, at in DIGITS_CUTS.items():
        made = [net[:at](images).numpy() for net, images, _ in folds]
        whole = [int((net(images).argmax(1).numpy() == labels).sum()) for net, images, labels in folds]
        zeros = float(np.mean([(array == 0).mean() for array in made]))
        for name in names:
            right, size = list[int](), 0
            for (net, _, labels), array in zip(folds, made, strict=True):
                arrived, sent = through(name, array)
                size += sent
                right.append(int((net[at:](torch.from_numpy(arrived)).argmax(1).numpy() == labels).sum()))
            loss = (sum(whole) - sum(right)) / count
            unseen = (sum(whole[SET_ON:]) - sum(right[SET_ON:])) / sum(len(labels) for _, _, labels in folds[SET_ON:])
            note = f"{unseen:.2%} on the folds that wide2 was not set on; {zeros:.0%} zeros"
            rows.append(Row(cut, name, 8 * size / sum(array.size for array in made), loss, note))
    print(f"\ndigits: {count} images, {sum(whole) / count:.2%} right by the whole networks")
    return rows


def digits_figures(rows: list[Row]) -> None:
    for cut in DIGITS_CUTS:
        close = min((row for row in rows if row.cut == cut and row.loss <= 0.001), key=lambda row: row.bits)
        far = min((row for row in rows if row.cut == cut and row.loss <= 0.01), key=lambda row: row.bits)
        print(
            f"  {cut}: {32 / close.bits:.1f}x fewer bytes at a loss of {close.loss:.2%} ({close.codec}; aim 7x at 0.1%);"
            f" {far.bits:.2f} bits per number at {far.loss:.2%} ({far.codec}; aim 0.6-0.8 at 1%)"
        )


# ------------------------------------------------------------------------------------------------------------------- MiniLM


def minilm(names: tuple[str, ...], model: MiniLM) -> list[Row]:
    whole = model.embed(0, None)
    rows = []
    for layer in (1, 3, 5):
        for name in names:
            size = count = 0

            def change(array: np.ndarray, name: str = name) -> np.ndarray:
                nonlocal size, count
                found, sent = through(name, array)
                size, count = size + sent, count + array.size
                return found

            apart = model.embed(layer, change)
            cosine = (whole * apart).sum(1)
            same = (nearest(whole, whole) == nearest(apart, apart)).mean()
            rows.append(
                Row(f"layer {layer}", name, 8 * size / count, 1 - float(cosine.mean()), f"worst {cosine.min():.4f}, nearest {same:.0%}")
            )
    print(f"\nMiniLM: {len(model.texts)} texts of up to {model.task.tokens} tokens")
    return rows


def retrieval(names: tuple[str, ...], model: MiniLM) -> None:
    """By codec: the task's score as a share of the whole model's."""
    task = Retrieval(model)
    whole = task.whole
    print(
        f"\nMiniLM, finding the passage of a sentence: {task.count} of each, both ways; the whole model: first {whole.first:.2%}, reciprocal rank {whole.reciprocal:.4f}"
    )
    print(
        "| cut | codec | bits per number | right passage first | mean reciprocal rank (standard error) | Spearman |\n|---|---|---|---|---|---|"
    )
    for layer in (1, 3, 5):
        for name in names:
            size = count = 0

            def change(array: np.ndarray, name: str = name) -> np.ndarray:
                nonlocal size, count
                found, sent = through(name, array)
                size, count = size + sent, count + array.size
                return found

            found = task.score(layer, change)
            share, error = found.share_of(whole)
            print(
                f"| layer {layer} | {name} | {8 * size / count:.2f} | {found.first / whole.first:.2%} | {share:.2%} (± {error:.2%}) | {found.spearman:.4f} |",
                flush=True,
            )


def nearest(queries: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """The nearest other text of each."""
    alike = queries @ texts.T
    np.fill_diagonal(alike, -2)
    return alike.argmax(1)


def minilm_figures(rows: list[Row]) -> None:
    for cut in dict.fromkeys(row.cut for row in rows):
        best = min((row for row in rows if row.cut == cut and row.loss <= 0.005), key=lambda row: row.bits)
        print(f"  {cut}: {best.bits:.2f} bits per number at a cosine of {1 - best.loss:.2%} ({best.codec}; aim 4.2 at 99.5%)")


# -------------------------------------------------------------------------------------------------------------------- speed


def vision_activations() -> dict[str, np.ndarray]:
    from transformers import ResNetConfig, ResNetModel, ViTConfig, ViTModel

    torch.manual_seed(0)
    images = torch.randn(2, 3, 224, 224)
    config = ViTConfig(num_hidden_layers=6)
    vit = ViTModel(config).eval()(images, output_hidden_states=True).hidden_states[6]
    resnet = ResNetModel(ResNetConfig()).eval()(images, output_hidden_states=True).hidden_states
    return {"ViT-B, layer 6": vit.numpy(), "ResNet-50, stage 1": resnet[1].numpy(), "ResNet-50, stage 3": resnet[3].numpy()}


def speed(names: tuple[str, ...], activations: dict[str, np.ndarray], rounds: int) -> None:
    for cut, array in activations.items():
        flat = np.ascontiguousarray(array).reshape(-1)[: SPEED_BYTES // 4]
        parts, out = list(chunks(flat)), np.empty(flat.size, np.float32)
        payloads = {name: [bytes(get_codec(name).encode(part)) for part in parts] for name in names}
        taken: dict[tuple[str, str], list[float]] = {}

        def timed(key: tuple[str, str], work: Callable[[], object], taken: dict[tuple[str, str], list[float]] = taken) -> None:
            started = time.process_time()
            work()
            taken.setdefault(key, []).append(time.process_time() - started)

        for _ in range(rounds):
            timed(("copy", ""), lambda parts=parts, out=out: [np.copyto(o, p) for o, p in zip(chunks(out), parts, strict=True)])
            for name in names:
                codec = get_codec(name)
                timed((name, "encode"), lambda parts=parts, codec=codec: [codec.encode(part) for part in parts])
                timed(
                    (name, "decode"),
                    lambda name=name, out=out, codec=codec, payloads=payloads: [
                        codec.decode(memoryview(p), o) for p, o in zip(payloads[name], chunks(out), strict=True)
                    ],
                )
        rate = {key: flat.nbytes / max(statistics.median(seconds), 1e-9) / 1e6 for key, seconds in taken.items()}
        print(f"\n{cut}: {flat.nbytes >> 10} KiB, {(flat == 0).mean():.0%} zeros; a copy {rate['copy', '']:.0f} MB/s")
        print("| codec | bits per number | encode MB/s | decode MB/s |\n|---|---|---|---|")
        for name in names:
            bits = 8 * sum(map(len, payloads[name])) / flat.size
            print(f"| {name} | {bits:.2f} | {rate[name, 'encode']:.0f} | {rate[name, 'decode']:.0f} |")
        slow = [name for name in names if get_codec(name).default and rate[name, "encode"] < 500]
        print(f"  default codecs below 500 MB/s to encode here: {', '.join(slow) or 'none'}")


# -------------------------------------------------------------------------------------------------------------------- delta

_STATELESS = ("zstd", "bf16-zstd", "int8-zstd", "step4", "clip3", "clip2")


def delta(net: torch.nn.Sequential) -> None:
    """Of 64 places one shows another digit in each frame; the others stand still, with and without a camera's noise, or all move by a pixel. Beside
    it codecs that keep no stream, on the same frames."""
    from sklearn import datasets

    images = (datasets.load_digits().images[:, None] / 16).astype(np.float32)
    for what, noise, step in (("still", 0.0, 0), ("2% of noise", 0.02, 0), ("the camera moves by a pixel", 0.0, 1)):
        rng, encoder = np.random.default_rng(0), DeltaEncoder()
        picture = images[:64].copy()
        made: dict[str, list[int]] = {name: [] for name in ("delta", *_STATELESS)}
        for frame_at in range(20):
            picture[rng.integers(64)] = images[64 + frame_at]
            seen = np.roll(picture, step * frame_at, axis=3) + noise * rng.standard_normal(picture.shape).astype(np.float32)
            flat = net[:3](torch.from_numpy(seen)).numpy().reshape(-1)
            frame = encoder.frame()
            made["delta"].append(sum(len(frame.encode(chunk)) for chunk in chunks(flat)))
            encoder.delivered(frame)
            for name in _STATELESS:
                made[name].append(sum(len(get_codec(name).encode(chunk)) for chunk in chunks(flat)))
        bits = {name: 8 * statistics.mean(sizes[1:]) / flat.size for name, sizes in made.items()}
        shown = ", ".join(f"{name} {per_number:.2f}" for name, per_number in bits.items())
        print(f"\nframes, {what}: bits per number {shown}; delta's key frame {8 * made['delta'][0] / flat.size:.2f}")


def table(rows: list[Row], loss: str) -> None:
    print(f"| cut | codec | bits per number | times fewer bytes | {loss} | |\n|---|---|---|---|---|---|")
    for row in rows:
        print(f"| {row.cut} | {row.codec} | {row.bits:.2f} | {32 / row.bits:.1f} | {row.loss:.3%} | {row.note} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--codecs", nargs="+", choices=codec_names(), default=codec_names())
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    names = tuple(options.codecs)
    keep_buffers()  # as `splitnet node` does
    torch.set_num_threads(1)
    with torch.inference_mode(), np.errstate(all="ignore"):
        if {"digits", "delta"} & set(options.only):
            with torch.inference_mode(False):
                folds = digits_folds(FOLDS if "digits" in options.only else 1)
            if "digits" in options.only:
                rows = digits(names, folds)
                table(rows, "top-1 lost")
                digits_figures(rows)
            if "delta" in options.only:
                delta(folds[0][0])
        if "minilm" in options.only:
            rows = minilm(names, MiniLM())
            table(rows, "cosine lost")
            minilm_figures(rows)
        if "retrieval" in options.only:
            retrieval(tuple(name for name in names if name in _WORTH_RANKING), MiniLM())
        if "speed" in options.only:
            speed(names, vision_activations(), options.rounds)


if __name__ == "__main__":
    main()
