"""`splitnet privacy`: what each cut shows to the nodes behind it, and what noise costs there."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from partitioner.options import FILE, check_output, progress_bar, say
from splitnet.errors import BadInput
from splitnet.explain import table

if TYPE_CHECKING:
    from partitioner.exposure import Exposure

__all__ = ["privacy"]

_EPSILONS = (1000.0, 100.0, 10.0, 1.0)


@click.command()
@click.argument("model")
@click.option("--data", "data_file", type=FILE, required=True, help="Your samples, as for `splitnet calibrate`.")
@click.option("--metric", type=click.Choice(["top1", "cosine", "perplexity", "mse"]), required=True, help="How answers are judged.")
@click.option("--answers", default="", metavar="NAME", help="The model's output that is judged.  [default: logits, or the first]")
@click.option(
    "--epsilon",
    "epsilons",
    type=float,
    multiple=True,
    help="Noise of this promise; may be given several times.  [default: 1000, 100, 10, 1]",
)
@click.option("--delta", type=float, default=1e-6, show_default=True, help="The promise's other figure.")
@click.option("--clip", "clip_norm", type=float, help="The norm to clip to.  [default: at each cut the 90th percentile of these samples']")
@click.option("--cuts", type=click.IntRange(min=1), default=6, show_default=True, help="How many places to cut at are looked at.")
@click.option(
    "--at", multiple=True, metavar="OPERATOR|MODULE", help="Instead, the cut before this operator or module; may be given several times."
)
@click.option("--samples", type=click.IntRange(min=1), default=512, show_default=True, help="Use at most so many, taken evenly from all.")
@click.option("--batch", type=click.IntRange(min=1), help="Samples per run.  [default: as the model's example]")
@click.option("--no-attack", is_flag=True, help="Measure only what the task loses.")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Threads that compute.")
@click.option("-o", "--output", type=FILE, help="Write what was found as JSON.")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def privacy(
    model: str, data_file: Path, metric: str, answers: str, epsilons: tuple[float, ...], delta: float, clip_norm: float | None, cuts: int,
    at: tuple[str, ...], samples: int, batch: int | None, no_attack: bool, threads: int, output: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Measure what a node behind each cut of MODEL can see of your samples, and what the task loses by noise.

    An attacker is trained on three quarters of the samples to tell inputs from activations, and tried on the others: models with one input of
    floating-point numbers are attacked. How like the inputs its guesses are stands beside what guessing the mean input would give (PSNR in
    dB, and structural similarity for images). `splitnet plan --private NODE=... --noise-epsilon ... --noise-clip ...` uses what was found.
    A bound that is chosen from samples tells a little of them: choose it from samples that may be known.

    \b
    Example: a camera's images, with labels
      splitnet privacy py:shop.model:build --data shelf.npz --metric top1
    \b
    Example: one cut, more closely
      splitnet privacy py:shop.model:build --data shelf.npz --metric top1 --at features.6 --epsilon 50 --epsilon 20
    """
    import torch

    import partitioner
    from partitioner.calibrating import Task
    from partitioner.exposure import measure_exposure
    from partitioner.resizing import at_sizes
    from partitioner.samples import load_samples
    from splitnet.noise import Noise

    if not data_file.is_file():
        raise BadInput(f"--data: there is no file {str(data_file)!r}", remedy="give a file of your own samples")
    if output:
        check_output(output)
    wanted = epsilons or _EPSILONS
    for epsilon in wanted:
        Noise(epsilon, delta, clip_norm or 1.0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        say(f"capturing {model}")
        graph = at_sizes(partitioner.load_model(model), {"batch": batch} if batch else {})
        task = Task.make(graph, load_samples(data_file, graph.structure, model, samples, batch), metric, answers)
        with progress_bar("measuring") as advance:
            found = measure_exposure(
                task, wanted, delta=delta, clip_norm=clip_norm, cuts=cuts, at=at, attack=not no_attack, on_progress=advance
            )
    finally:
        torch.set_num_threads(before)
    text = json.dumps({"model": graph.name, "metric": metric, "delta": delta, "cuts": [_document(cut) for cut in found]}, indent=1) + "\n"
    if output:
        output.write_text(text)
    if as_json:
        click.echo(text, nl=False)
        return
    click.echo("\n".join(_lines(found, metric, delta, task.samples.count)))
    if output:
        click.echo(f"wrote {output}")


def _document(cut: Exposure) -> dict[str, Any]:
    """As JSON: what is not finite is null."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(cut)), parse_constant=lambda _: None)
    return plain


def _lines(found: list[Exposure], metric: str, delta: float, count: int) -> list[str]:
    rows = [("cut after", "module", "epsilon", "deviation", "clip", f"{metric} lost", "attacker sees", "SSIM")]
    for cut in found:
        if cut.guessed is not None:
            rows.append((cut.after, cut.scope, "(guessing)", "", "", "", f"{cut.guessed.psnr_db:.1f} dB", _ssim(cut.guessed.ssim)))
        for one in cut.exposed:
            finite = math.isfinite(one.epsilon)
            rows.append((
                cut.after, cut.scope, f"{one.epsilon:g}" if finite else "no noise", f"{one.sigma:.3g}" if finite else "-",
                f"{cut.clip_norm:.4g}" if finite else "-", f"{one.loss:.2%}" if finite else "-",
                f"{one.seen.psnr_db:.1f} dB" if one.seen else "-", _ssim(one.seen.ssim) if one.seen else "-",
            ))  # fmt: skip
    lines = [
        f"{count} samples, delta {delta:g}, each sample by itself; the attacker has learnt from three quarters of them",
        "",
        *table(rows),
    ]
    lines += [f"  after {cut.after}: no noise can be added: {cut.barred}" for cut in found if cut.barred]
    return [*lines, "", "PSNR and SSIM near those of guessing: the attacker knows no more than what inputs look like in general"]


def _ssim(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "-"
