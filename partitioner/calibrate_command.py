"""`splitnet calibrate`, and how `splitnet plan` comes by what it measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from partitioner.options import FILE, check_output, progress_bar, say
from splitnet.codecs import get_codec
from splitnet.errors import BadInput
from splitnet.explain import bytes_text, table

if TYPE_CHECKING:
    from partitioner.calibrating import Task
    from partitioner.calibration import Calibration
    from partitioner.graph import ModelGraph

__all__ = ["accuracy", "calibrate"]

_METRICS = ("top1", "cosine", "perplexity", "mse")
_BUDGETS = (0.001, 0.005, 0.01)
_SAMPLES = 256


@click.command()
@click.argument("model")
@click.option(
    "--data", "data_file", type=FILE, required=True, help="Your samples: .npz, .npy, .safetensors, or .txt for a model with a tokenizer."
)
@click.option("--metric", type=click.Choice(_METRICS), required=True, help="How answers are judged.")
@click.option("-o", "--output", type=FILE, help="Write the calibration here too; `splitnet plan` finds the last one of a model by itself.")
@click.option("--answers", default="", metavar="NAME", help="The model's output that is judged.  [default: logits, or the first]")
@click.option(
    "--codec", "codecs", multiple=True, metavar="NAME", help="Measure this codec only; may be given several times.  [default: all]"
)
@click.option("--cuts", type=click.IntRange(min=1), default=16, show_default=True, help="How many places to cut at are measured.")
@click.option(
    "--at", multiple=True, metavar="OPERATOR|MODULE", help="And the cut before this operator or module; may be given several times."
)
@click.option(
    "--samples", type=click.IntRange(min=1), default=_SAMPLES, show_default=True, help="Use at most so many, taken evenly from all."
)
@click.option("--batch", type=click.IntRange(min=1), help="Samples per run.  [default: as the model's example]")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Threads that compute.")
@click.option("--no-cache", is_flag=True, help="Neither use nor keep what was measured before (~/.cache/splitnet/calibrations).")
@click.option("--refresh", is_flag=True, help="Measure again, and keep that.")
@click.option("--json", "as_json", is_flag=True, help="Print the calibration as JSON.")
def calibrate(
    model: str, data_file: Path, metric: str, output: Path | None, answers: str, codecs: tuple[str, ...], cuts: int, at: tuple[str, ...],
    samples: int, batch: int | None, threads: int, no_cache: bool, refresh: bool, as_json: bool,
) -> None:  # fmt: skip
    """Measure what MODEL loses on your samples when what crosses a cut goes through each codec, and how many bits that takes.

    The data holds arrays by the names of the model's inputs, samples along the first dimension, and "labels" if there are any; or one text
    a line, for a model by hf: with a tokenizer. A loss is a share: of answers that are no longer right (top1; without labels: no longer the whole
    model's), 1 - cosine, the increase of the perplexity, or the squared error over the squared output. Of each of --cuts stretches of equal
    work the cut with the fewest bytes is measured. `splitnet plan --max-accuracy-loss` uses what was found.

    \b
    Example: images with labels
      splitnet calibrate py:shop.model:build --data shelf.npz --metric top1
    \b
    Example: sentences, one a line
      splitnet calibrate hf:./minilm --data lines.txt --metric cosine -o minilm.calibration.json
    """
    import torch

    import partitioner
    from partitioner import calibrating
    from partitioner.calibration_cache import CalibrationCache, default_directory
    from partitioner.resizing import at_sizes

    if not data_file.is_file():
        raise BadInput(f"--data: there is no file {str(data_file)!r}", remedy="give a file of your own samples")
    if output:
        check_output(output)
    for name in codecs:
        get_codec(name)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        say(f"capturing {model}")
        graph = at_sizes(partitioner.load_model(model), {"batch": batch} if batch else {})
        task = _task(model, graph, data_file, metric, answers, samples)
        cache = None if no_cache else CalibrationCache(default_directory())
        with progress_bar("calibrating") as advance:
            found = calibrating.calibrate(task, codecs=codecs, cuts=cuts, at=at, cache=cache, refresh=refresh, on_progress=advance)
    finally:
        torch.set_num_threads(before)
    if output:
        found.save(output)
    if as_json:
        click.echo(found.to_json(), nl=False)
        return
    click.echo("\n".join(_lines(found)))
    if output:
        click.echo(f"wrote {output}")


def accuracy(model: str, graph: ModelGraph, given: Calibration | None, data_file: Path | None, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of `partitioner.plan` about accuracy: the calibration (the one given, else the last of this model), and, where a
    loss is allowed, what measures a plan's. Raises BadInput where that calibration's samples are not there any more."""
    from partitioner.calibration_cache import CalibrationCache, default_directory

    budget = asked["max_accuracy_loss"]
    if "codecs" in asked:  # --codec-figures say what is lost
        return {}
    found = given or CalibrationCache(default_directory()).newest(graph.sha256)
    if found is None:
        return {}
    found.check(graph.sha256)
    if not budget:
        return {"calibration": found}
    path = data_file or Path(found.data)
    if not path.is_file():
        raise BadInput(
            f"the samples of the calibration, {str(path)!r}, are not there; a plan is measured with them", remedy="say where with --data"
        )
    task = _task(model, graph, path, found.metric, found.output, found.samples, found.batch)
    if task.samples.sha256 != found.data_sha256:
        raise BadInput(f"{path}: these are not the samples of the calibration", remedy="calibrate again, or name them with --data")

    def measure(plan: Any) -> float:
        with progress_bar("measuring the plan's loss") as advance:
            return task.loss(plan, advance)

    return {"calibration": found, "measure_loss": measure}


def _task(model: str, graph: ModelGraph, data: Path, metric: str, answers: str, samples: int, batch: int | None = None) -> Task:
    from partitioner.calibrating import Task
    from partitioner.samples import load_samples

    return Task.make(graph, load_samples(data, graph.structure, model, samples, batch), metric, answers)


def _lines(found: Calibration) -> list[str]:
    judged = f"{found.score:.2%} of the answers right" if found.metric == "top1" and found.labelled else ""
    judged = f"perplexity {found.score:.4g}" if found.metric == "perplexity" else judged
    lines = [
        f"{found.model}: {found.metric} of {found.output!r} on {found.samples} samples"
        + (f"; the whole model: {judged}" if judged else ""),
        f"{len(found.cuts)} cuts, {found.how}",
        "",
        "the fewest bits per value, at a loss of at most",
    ]
    rows = [("after", "module", "crosses", *(f"{budget:.1%}" for budget in _BUDGETS), "at any loss")]
    for cut in found.cuts:
        cells = []
        for budget in (*_BUDGETS, float("inf")):
            able = [name for name, loss in cut.codecs.items() if loss.loss <= budget]
            best = min(able, key=cut.bits_per_value, default="")
            cells.append(
                f"{cut.bits_per_value(best):.2f} {best}" + (f" ({cut.codecs[best].loss:.1%})" if budget > 1 else "") if best else "-"
            )
        rows.append((cut.after[0], cut.scope, f"{bytes_text(cut.raw_bytes / found.samples)} a sample", *cells))
    lines += [*table(rows), "", "each codec over all these cuts"]
    rows_of_codecs = [("codec", "bits per value", "loss")]
    for name in found.codecs:
        measured = [cut for cut in found.cuts if name in cut.codecs]
        bits, losses = [cut.bits_per_value(name) for cut in measured], [cut.codecs[name].loss for cut in measured]
        rows_of_codecs.append((name, f"{min(bits):.2f} to {max(bits):.2f}", f"{min(losses):.3%} to {max(losses):.3%}"))
    return [*lines, *table(rows_of_codecs)]
