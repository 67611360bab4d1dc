"""`splitnet bench`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click

from partitioner.options import FILE, Size, check_output, progress_bar
from splitnet.cluster import Cluster
from splitnet.errors import BadInput
from splitnet.plan import NodeRef, Plan

__all__ = ["bench"]


@click.command()
@click.argument("plan_file", metavar="PLAN", type=FILE)
@click.option("--name", default="", help="The deployment's name, if it was given one.")
@click.option("--requests", type=click.IntRange(min=2), default=40, show_default=True, help="Requests one by one, and again at once.")
@click.option("--size", "sizes", multiple=True, type=Size(), help="The size of a symbolic dimension.  [default: the plan's]")
@click.option("--against", type=click.Choice(["one-node"]), help="Measure every node alone, too: the whole model on each in turn.")
@click.option("--cluster", "cluster_file", type=FILE, help="With --against: the nodes, those that the plan does not use included.")
@click.option("--timeout", "timeout_s", type=click.FloatRange(min=0.1), default=60.0, show_default=True, help="Seconds for each request.")
@click.option("-o", "--output", type=FILE, help="Keep what was measured, for `splitnet plan --from-bench`.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def bench(
    plan_file: Path, name: str, requests: int, sizes: tuple[tuple[str, int], ...], against: str | None, cluster_file: Path | None,
    timeout_s: float, output: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Serve PLAN, send random requests, and put measured figures beside the predicted ones.

    A plan that is not deployed is deployed for as long as this takes, from the folder PLAN.shards beside it. Of a model that generates: the time to the first
    token, the time per token, and the tokens of all sessions.

    \b
    Example: the plan, and each of its nodes alone
      splitnet bench plan.json --against one-node
    \b
    Example: keep what was measured, and plan again with it
      splitnet bench plan.json -o measured.json
      splitnet plan MODEL --cluster cluster.toml --from-bench measured.json -o better.json
    """
    if output:
        check_output(output)
    from partitioner.bench_report import report_text
    from partitioner.benching import bench as measure

    plan = Plan.load(plan_file)
    folder = plan_file.with_suffix(".shards")
    shards = {stage.name: folder / stage.name for stage in plan.stages} if folder.is_dir() else None
    if plan.generation is not None:
        for option, given in (("--size", sizes), ("--against", against), ("--output", output)):
            if given:
                raise BadInput(f"{option} cannot be had for a model that generates", remedy="leave it away")
        _bench_generation(plan, name, shards, requests, timeout_s, as_json)
        return
    nodes: tuple[NodeRef, ...] = ()
    if against:
        nodes = tuple(NodeRef(n.name, n.address) for n in Cluster.load(cluster_file).nodes) if cluster_file else plan.nodes
    with progress_bar("sending requests") as advance:
        report = measure(
            plan,
            deployment=name,
            shards=shards,
            against=nodes,
            requests=requests,
            sizes=dict(sizes),
            timeout_s=timeout_s,
            on_progress=advance,
        )
    if output:
        report.save(output)
    if as_json:
        predicted = dataclasses.asdict(plan.prediction) if plan.prediction else None
        click.echo(json.dumps({"predicted": predicted, "measured": dataclasses.asdict(report)}, indent=1, sort_keys=True))
        return
    click.echo(report_text(plan, report))
    if output:
        click.echo(f"\nwrote {output}")


def _bench_generation(plan: Plan, name: str, shards: dict[str, Path] | None, requests: int, timeout_s: float, as_json: bool) -> None:
    from partitioner.decoders.benching import bench_generation, generation_text

    with progress_bar("generating") as advance:
        report = bench_generation(plan, deployment=name, shards=shards, requests=requests, timeout_s=timeout_s, on_progress=advance)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(report), indent=1, sort_keys=True))
        return
    click.echo(generation_text(plan, report))
