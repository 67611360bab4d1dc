"""`splitnet plan MODEL --generate` and `splitnet profile MODEL --generate`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from partitioner.decoders.options import workload
from partitioner.options import progress_bar, say
from splitnet.cluster import Cluster
from splitnet.errors import BadInput
from splitnet.explain import bytes_text, seconds_text, table

if TYPE_CHECKING:
    from partitioner.decoders.figures import DecoderProfile, Workload
    from partitioner.decoders.model import DecoderModel

__all__ = ["plan_generating", "profile_generating"]


def plan_generating(
    source: str, cluster: Cluster, output: Path, folder: Path, *, objective: str, asked: Mapping[str, Any], profile_file: Path | None, data_file: Path | None,
    threads: int, replicas: int, standby: Sequence[str], given: Mapping[str, Any], picture: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """`asked`: the keywords of `partitioner.plan`; `given`: the command's other options."""
    from partitioner.decoders.figures import DecoderProfile
    from partitioner.decoders.perplexity import measure_perplexity
    from partitioner.decoders.planning import plan_decoder
    from partitioner.decoders.weights import Weights
    from partitioner.decoders.writing import cut_decoder
    from partitioner.standbys import add_standbys

    if data_file and not data_file.is_file():
        raise BadInput(f"--data: there is no file {str(data_file)!r}")
    wanted = given["weights"] or "auto"
    known = DecoderProfile.load(profile_file) if profile_file else None
    model = _load(source)
    work = workload(given, model.longest_context)
    if known is not None:
        for what in ("chunk_tokens", "cached_tokens"):
            if getattr(known, what) != getattr(work, what):
                raise BadInput(
                    f"the profile was measured with {what.replace('_', ' ')} {getattr(known, what)}, the plan is for {getattr(work, what)}",
                    remedy="give the same --prompt-tokens, --answer-tokens and --chunk-tokens, or profile again",
                )
    measured = known or _measure(model, work, cluster, wanted, threads, given)
    weights = Weights(wanted)
    if data_file:
        forms = ("bfloat16", "int8", "int4") if wanted == "auto" else (wanted,)
        with progress_bar("measuring perplexity") as advance:
            figures, of = measure_perplexity(model, data_file, forms, context=work.context_length, on_progress=advance)
        weights = Weights(wanted, figures, of, asked["max_accuracy_loss"])
    elif asked["max_accuracy_loss"] is not None:
        weights = Weights(wanted, max_loss=asked["max_accuracy_loss"])
    say("planning")
    chosen = plan_decoder(model, measured, cluster, work, objective=objective, weights=weights, **asked)
    if replicas:
        taken = {name: size for name, (size, _) in asked.get("taken", {}).items()}
        chosen = add_standbys(chosen, cluster, replicas, standby, taken)
    with progress_bar("cutting the model") as advance:
        shards = cut_decoder(model, chosen, folder, lambda done, total: advance(done, total, ""))
    chosen = dataclasses.replace(chosen, profile_sha256=measured.sha256)
    chosen = chosen.with_shards({stage: shard.sha256 for stage, shard in shards.items()})
    chosen.save(output)
    if picture:
        from partitioner.decoders.pictures import draw_generation

        say(f"drawing {picture}")
        draw_generation(chosen, picture, model, measured, cluster, work, weights, asked)
    if as_json:
        click.echo(chosen.to_json(), nl=False)
        return
    click.echo(chosen.explain())
    drew = f", and drew {picture}" if picture else ""
    click.echo(f"\nwrote {output} and {folder}{drew}\nnext: splitnet deploy {output}; splitnet generate {output} --prompt '...'")


def profile_generating(
    source: str, cluster: Cluster | None, output: Path, *, threads: int, given: Mapping[str, Any], as_json: bool
) -> None:
    model = _load(source)
    work = workload(given, model.longest_context)
    measured = _measure(model, work, cluster, given["weights"] or "auto", threads, given)
    measured.save(output)
    if as_json:
        click.echo(measured.to_json(), nl=False)
        return
    click.echo("\n".join(_lines(model, work, measured)))
    click.echo(f"wrote {output}")


def _load(source: str) -> DecoderModel:
    from partitioner.decoders.model import load_decoder

    if not source.startswith("hf:"):
        raise BadInput(
            f"--generate: expected hf:DIR_OR_REPO, got {source!r}",
            remedy="save the model with model.save_pretrained(DIR) and tokenizer.save_pretrained(DIR)",
        )
    with progress_bar("reading the model") as advance:
        return load_decoder(source.removeprefix("hf:"), lambda done, total: advance(done, total, ""))


def _measure(
    model: DecoderModel, work: Workload, cluster: Cluster | None, wanted: str, threads: int, given: Mapping[str, Any]
) -> DecoderProfile:
    from partitioner.decoders.figures_cache import TimesCache
    from partitioner.decoders.measuring import columns_for, measure_decoder
    from partitioner.profile_cache import default_directory

    if given.get("real_weights"):
        raise BadInput("--real-weights cannot be had with --generate: nodes make up weights of the same shapes", remedy="leave it away")
    cache = None if given["no_cache"] else TimesCache(default_directory(), refresh=given["refresh"])
    with progress_bar("measuring layers") as advance:
        return measure_decoder(
            model, work, cluster=None if given.get("scale") else cluster, columns=columns_for(wanted), budget_s=given["budget_s"], threads=threads, cache=cache,
            on_progress=advance,
        )  # fmt: skip


def _lines(model: DecoderModel, work: Workload, measured: DecoderProfile) -> list[str]:
    lines = [
        f"{model.name}: {model.checkpoint.model_type}, {model.layers} layers, hidden size {model.hidden_size}, vocabulary {model.vocabulary}, stored in {model.checkpoint.dtype}",
        f"a prompt of {work.prompt_tokens} tokens in chunks of {work.chunk_tokens}; steps with {work.cached_tokens} tokens in the cache",
        "",
    ]
    largest = measured.batches[-1]
    rows: list[Sequence[str]] = [("node", "computed in", "weights", "of weights", "chunk", "step", f"step of {largest}", "how")]
    for node, column in measured.columns.items():
        for name, times in column.items():
            dtype, _, form = name.partition("/")
            size = model.param_bytes(0, len(model.vertices), form, dtype)
            steps = [seconds_text(sum(row) + times.step_s) for row in (times.prefill, times.decode[0], times.decode[-1])]
            rows.append((node or "here", dtype, form, bytes_text(size), *steps, times.how))
    return [*lines, *table(rows)]
