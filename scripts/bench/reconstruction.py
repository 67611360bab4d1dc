"""What an honest but curious node sees of an input, per cut, and how much less with noise on what it is sent.

    python scripts/bench/reconstruction.py [--only digits minilm] [--epsilons 1000 100 10]

digits: the demo's CNN on scikit-learn's digits. The attacker learns from 1,347 images with their activations (the network's own training images: the worst
case) and is tried on 450 others (`partitioner.inversion`). Beside the likeness of its pictures stands how many of them another classifier, trained on real
images, takes for the right digit, and how many the divided network itself still answers rightly.
minilm: all-MiniLM-L6-v2 on the demo's paragraphs and questions. From what enters a layer, ridge regression gives the word embedding of each token, and the nearest
of all 30,522 is the guess. It learns from half of the texts and is tried on the others.

Noise is that of `splitnet plan --noise-epsilon`: per sample, delta 1e-6, clipped at the 90th percentile of the norms. The attacker learns from noisy activations, too.
"""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import torch

from partitioner.demo.digits import load_digits, train
from partitioner.demo.text import TextTask, find_minilm
from partitioner.inversion import invert, likeness
from splitnet.noise import Noise
from splitnet.releasing import release

DELTA = 1e-6
CUTS = {"the image itself": 0, "convolution 1": 3, "pool 1": 7, "pool 2": 11, "hidden layer": 14, "logits": 15}


def noised(values: np.ndarray, noise: Noise | None) -> np.ndarray:
    return values if noise is None else release({"x": values}, noise, {"x": 0})["x"]


def noise_for(values: np.ndarray, epsilon: float) -> Noise | None:
    if math.isinf(epsilon):
        return None
    return Noise(epsilon, DELTA, float(np.percentile(np.linalg.norm(values.reshape(len(values), -1), axis=1), 90)))


def digits(epsilons: list[float]) -> None:
    data = load_digits()
    with torch.inference_mode(False):
        net = train(data)
        torch.manual_seed(99)
        judge = train(data._replace(train_images=data.train_images[::-1].copy(), train_labels=data.train_labels[::-1].copy()))
    learn, test = (torch.from_numpy(images) for images in (data.train_images, data.test_images))

    def right(classifier: torch.nn.Module, images: torch.Tensor) -> float:
        return float((classifier(images).argmax(1).numpy() == data.test_labels).mean())

    guess = np.broadcast_to(data.train_images.mean(0), data.test_images.shape)
    base = likeness(data.test_images, guess)
    print(f"digits: {right(net, test):.1%} right by the whole network, {right(judge, test):.1%} by the judge on real images")
    print(
        f"the mean image for each: {base.psnr_db:.1f} dB, SSIM {base.ssim:.2f}, {right(judge, torch.from_numpy(guess.copy())):.0%} recognised\n"
    )
    print("| cut after | epsilon | PSNR, dB | SSIM | recognised | answered rightly |\n|---|---|---|---|---|---|")
    for cut, at in CUTS.items():
        known, seen = net[:at](learn).numpy(), net[:at](test).numpy()
        for epsilon in (math.inf, *epsilons):
            noise = noise_for(known, epsilon)
            there = noised(seen, noise)
            with torch.inference_mode(False):
                found = invert(noised(known, noise), data.train_images, there)
            alike = likeness(data.test_images, found)
            answered = right(net[at:], torch.from_numpy(there.copy()))
            recognised = right(judge, torch.from_numpy(found))
            shown = "no noise" if noise is None else f"{epsilon:g}"
            print(f"| {cut} | {shown} | {alike.psnr_db:.1f} | {alike.ssim:.2f} | {recognised:.0%} | {answered:.1%} |", flush=True)


def minilm(epsilons: list[float]) -> None:
    from transformers import AutoModel

    folder = find_minilm()
    task = TextTask(folder, 16)
    docs = Path(__file__).resolve().parents[2]
    texts = [part.strip() for file in ("README.md", "docs/planning.md") for part in (docs / file).read_text().split("\n\n")]
    texts = [
        *task.paragraphs,
        *(question.text for question in task.questions),
        *(text for text in texts if len(text) > 200 and text[0].isalpha()),
    ]
    batches = list(task.batches(texts))
    model: Any = AutoModel.from_pretrained(str(folder)).eval()
    states = [
        model(**{name: torch.from_numpy(array) for name, array in batch.items()}, output_hidden_states=True).hidden_states
        for batch in batches
    ]
    tokens = np.concatenate([batch["input_ids"] for batch in batches])
    mask = np.concatenate([batch["attention_mask"] for batch in batches]) != 0
    table = model.embeddings.word_embeddings.weight.detach().clone()
    unit = torch.nn.functional.normalize(table, dim=1)
    half = np.random.default_rng(0).permutation(len(texts))
    learn, test = half[len(texts) // 2 :], half[: len(texts) // 2]
    ids = torch.from_numpy(tokens[test][mask[test]])
    special = torch.tensor([101, 102])
    counted = ~torch.isin(ids, special)
    seen_before = torch.isin(ids, torch.from_numpy(tokens[learn][mask[learn]]))
    often = torch.from_numpy(tokens[learn][mask[learn]])
    often = often[~torch.isin(often, special)].mode().values
    print(
        f"\nMiniLM: {len(texts)} texts, {int(counted.sum())} tokens attacked; the commonest token for each: {float((ids == often)[counted].float().mean()):.1%}"
    )
    print("| what enters layer | epsilon | tokens found | of those that it had not learnt from |\n|---|---|---|---|")
    for layer in range(len(states[0])):
        whole = np.concatenate([state[layer].numpy() for state in states]) * mask[..., None]
        for epsilon in (math.inf, *epsilons):
            values = noised(whole, noise_for(whole, epsilon))
            a, b = (torch.from_numpy(values[side][mask[side]]) for side in (learn, test))
            target = table[torch.from_numpy(tokens[learn][mask[learn]])]
            middle, mean = a.mean(0), target.mean(0)
            fit = torch.linalg.solve((a - middle).T @ (a - middle) + 1.0 * torch.eye(a.shape[1]), (a - middle).T @ (target - mean))
            guess = ((b - middle) @ fit + mean) @ unit.T
            hit = guess.argmax(1) == ids
            shown = "no noise" if math.isinf(epsilon) else f"{epsilon:g}"
            name = str(layer) if layer < len(states[0]) - 1 else "(the answer)"
            print(
                f"| {name} | {shown} | {float(hit[counted].float().mean()):.1%} | {float(hit[counted & ~seen_before].float().mean()):.1%} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=("digits", "minilm"), default=("digits", "minilm"))
    parser.add_argument("--epsilons", nargs="*", type=float, default=[1000, 100, 10])
    options = parser.parse_args()
    torch.set_num_threads(1)
    with torch.inference_mode():
        if "digits" in options.only:
            digits(options.epsilons)
        if "minilm" in options.only:
            minilm([e for e in options.epsilons if e >= 1000])


if __name__ == "__main__":
    main()
