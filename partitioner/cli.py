"""`splitnet probe`, `splitnet profile`, `splitnet plan`; `splitnet bench` stands beside."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from partitioner.bench_command import bench
from partitioner.decoders.options import generate_options, refuse_without_generate
from partitioner.options import FILE, Size, check_folder, check_output, measuring, progress_bar, say
from partitioner.wishes import wish_options, wishes
from splitnet.cluster import Cluster
from splitnet.errors import BadInput, BadPlan
from splitnet.explain import bytes_text, seconds_text, table

if TYPE_CHECKING:
    from partitioner.graph import ModelGraph
    from partitioner.profiling import Profile

__all__ = ["bench", "plan", "probe", "profile"]

_TOP_OPERATORS = 12
_BUSY = 0.15  # a spread of whole runs beyond which a profile is doubtful


@click.command()
@click.option("--node", "addresses", multiple=True, required=True, metavar="HOST:PORT", help="A node; give each one.")
@click.option("-o", "--output", type=FILE, required=True, help="The cluster file to write.")
@click.option(
    "--budget",
    "budget_s",
    type=click.FloatRange(min=0.1, max=60),
    default=2.0,
    show_default=True,
    help="Seconds per node and per directed pair.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the measurements as JSON.")
def probe(addresses: tuple[str, ...], output: Path, budget_s: float, as_json: bool) -> None:
    """Measure nodes and the links between them, and write cluster.toml.

    The nodes measure each other, so give addresses by which they reach one another. Exit status 1 when a node does not answer.

    \b
    Example: three boxes
      splitnet probe --node 10.0.0.5:7001 --node 10.0.0.6:7001 --node 10.0.0.7:7001 -o cluster.toml
    """
    from partitioner.bandwidth import matrix, survey
    from splitnet import background

    check_output(output)

    with progress_bar("probing") as advance:
        found = background.run(survey(addresses, budget_s=budget_s, on_progress=advance))
    found.cluster.save(output)
    if as_json:
        document = {
            **dataclasses.asdict(found.cluster),
            "jitter_s": {f"{a}->{b}": jitter for (a, b), jitter in found.jitter_s.items()},
            "unreachable": {f"{a}->{b}": why for (a, b), why in found.unreachable.items()},
        }
        click.echo(json.dumps(document, indent=1, sort_keys=True))
        return
    rows = [("node", "address", "memory", "device", "threads", "reference kernel")]
    for node in found.cluster.nodes:
        memory = bytes_text(node.memory_bytes) if node.memory_bytes else "no limit"
        rows.append((node.name, node.address, memory, node.device, str(node.threads), seconds_text(node.reference_s)))
    click.echo("\n".join([*table(rows), "", "links (one way)", *matrix(found)]))
    for (a, b), why in found.unreachable.items():
        click.echo(f"warning: {a} cannot reach {b}, they have no link: {why}", err=True)
    click.echo(f"wrote {output}")


@click.command()
@click.argument("model")
@click.option(
    "--cluster", "cluster_file", type=FILE, help="Measure on the nodes of this cluster too, each with its own engine and threads."
)
@click.option("-o", "--output", type=FILE, required=True, help="The profile to write.")
@click.option("--batch", type=click.IntRange(min=1), help="Items per batch.  [default: as the model's example]")
@click.option("--size", "sizes", multiple=True, type=Size(), help="The size of another symbolic dimension, as sequence=128.")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Threads that measure, as the nodes' --threads.")
@click.option("--repeats", type=click.IntRange(min=1), default=10, show_default=True, help="Runs of which the median is taken.")
@generate_options
@measuring
@click.option("--json", "as_json", is_flag=True, help="Print the profile as JSON.")
def profile(
    model: str, cluster_file: Path | None, output: Path, batch: int | None, sizes: tuple[tuple[str, int], ...], threads: int,
    repeats: int, as_json: bool, **measured_by: Any,
) -> None:  # fmt: skip
    """Measure the operators of MODEL on this machine, and on the nodes of a cluster.

    MODEL is hf:DIR_OR_REPO, py:package.module:factory, a .pt2 or a .onnx file. A node runs the model with its own engine and threads, on random
    weights (shipping them would take longer than measuring); a node with too little memory runs it in pieces. Equal nodes are measured
    once, and figures are kept for the next time in ~/.cache/splitnet/profiles ($XDG_CACHE_HOME).

    \b
    Example: a model directory, as it will be served on two threads in batches of 8
      splitnet profile hf:./minilm --batch 8 --threads 2 -o minilm.profile.json
    \b
    Example: on every node
      splitnet profile hf:./minilm --cluster cluster.toml -o minilm.profile.json
    \b
    Example: a language model that is to generate text
      splitnet profile hf:./llama --generate --cluster cluster.toml -o llama.profile.json
    """
    check_output(output)
    cluster = Cluster.load(cluster_file) if cluster_file else None
    if measured_by["generate"]:
        from partitioner.decoders.command import profile_generating

        _refuse_with_generate(batch=batch, size=sizes)
        profile_generating(model, cluster, output, threads=threads, given=measured_by, as_json=as_json)
        return
    refuse_without_generate(measured_by)
    graph = _load(model, _sizes(batch, sizes))
    measured = _measure(graph, cluster, threads, repeats, measured_by)
    measured.save(output)
    if as_json:
        click.echo(measured.to_json(), nl=False)
        return
    click.echo("\n".join(_profile_lines(measured)))
    click.echo(f"wrote {output}")


@click.command()
@click.argument("model")
@click.option("--cluster", "cluster_file", type=FILE, required=True, help="The cluster file, as `splitnet probe` writes it.")
@click.option(
    "--objective",
    type=click.Choice(["latency", "throughput", "ttft", "tpot"]),
    default="latency",
    show_default=True,
    help="What to make best. With --generate: latency is that of a whole answer, ttft the time to its first token, tpot the time per token after it, throughput the tokens of all sessions.",
)
@click.option("-o", "--output", type=FILE, required=True, help="The plan to write; the shards go to a folder beside it.")
@click.option("--profile", "profile_file", type=FILE, help="A profile made before, instead of measuring now.")
@click.option(
    "--calibration", "calibration_file", type=FILE, help="What `splitnet calibrate -o` wrote.  [default: the last one of this model]"
)
@click.option("--data", "data_file", type=FILE, help="The samples of that calibration, where they have moved.")
@click.option("--from-bench", "bench_file", type=FILE, help="Correct the figures by what `splitnet bench -o` has measured.")
@wish_options
@click.option("--batch", type=click.IntRange(min=1), help="Items per batch that the plan is made for.  [default: as the model's example]")
@click.option("--size", "sizes", multiple=True, type=Size(), help="The size of another symbolic dimension, as sequence=128.")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Threads that measure on this machine.")
@click.option(
    "--replicas",
    type=click.IntRange(min=0),
    default=None,
    help="How many other nodes hold each stage ready, to take over within a second when its node is lost.  [default: 1 with --standby, else 0]",
)
@click.option("--standby", "standby", multiple=True, metavar="NODE", help="Replicas go only on this node (may be repeated).")
@generate_options
@measuring
@click.option("--draw", "picture", type=FILE, help="Draw the plan and what else could be planned, into .html, .svg or .png.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
def plan(
    model: str, cluster_file: Path, objective: str, output: Path, profile_file: Path | None, calibration_file: Path | None,
    data_file: Path | None, bench_file: Path | None, batch: int | None, sizes: tuple[tuple[str, int], ...], threads: int, replicas: int | None,
    standby: tuple[str, ...], picture: Path | None, as_json: bool, **others: Any,
) -> None:  # fmt: skip
    """Choose where to cut MODEL for a cluster, and cut it.

    MODEL is hf:DIR_OR_REPO, py:package.module:factory, a .pt2 or a .onnx file. Measures the model's operators on the nodes unless a profile is
    given. Writes the plan, and a folder with one shard per stage beside it: plan.json and plan.shards/.

    \b
    Example: for the highest throughput
      splitnet plan hf:./minilm --cluster cluster.toml --objective throughput -o plan.json
    \b
    Example: cut by hand into two
      splitnet plan py:shop.model:build --cluster cluster.toml --at encoder.layer.6 --on strong --on weak -o plan.json
    \b
    Example: raw images and the first block stay on the camera; the link to the server is slow
      splitnet plan hf:./vit --cluster cluster.toml --private camera=encoder.layer.0 --codec "camera->server=zstd" -o plan.json
    \b
    Example: two to four stages, the head on the server, half of the Pi's time and 1 GiB of its memory taken
      splitnet plan hf:./vit --cluster cluster.toml --stages 2..4 --pin classifier=server --taken pi=1GiB,0.5 -o plan.json
    \b
    Example: whatever loses less than half a percent on your own samples
      splitnet calibrate hf:./minilm --data lines.txt --metric cosine
      splitnet plan hf:./minilm --cluster cluster.toml --max-accuracy-loss 0.5% -o plan.json
    \b
    Example: any node may be lost, and the client sees a pause
      splitnet plan hf:./minilm --cluster cluster.toml --replicas 1 -o plan.json
    \b
    Example: with a page of pictures
      splitnet plan hf:./minilm --cluster cluster.toml -o plan.json --draw plan.html
    \b
    Example: a language model that generates text, for the quickest tokens, with room for 4 sessions
      splitnet plan hf:./llama --generate --cluster cluster.toml --objective tpot --sessions 4 -o plan.json
    """
    import partitioner
    from partitioner.asked import check_asked
    from partitioner.bench_report import BenchReport
    from partitioner.calibrate_command import accuracy
    from partitioner.calibration import Calibration
    from partitioner.drawing import check_path, draw
    from partitioner.feedback import corrected
    from partitioner.profiling import Profile
    from partitioner.resizing import at_sizes
    from partitioner.standbys import add_standbys

    # All that can be wrong without the model is told now, and not after minutes of capturing and measuring.
    if picture:
        check_path(picture)
    check_output(output)
    folder = check_folder(output, ".shards")
    asked = wishes(others)
    cluster = Cluster.load(cluster_file)
    check_asked(cluster, **asked)
    replicas = int(bool(standby)) if replicas is None else replicas
    if others["generate"]:
        from partitioner.decoders.command import plan_generating

        _refuse_with_generate(batch=batch, size=sizes, calibration=calibration_file, from_bench=bench_file)
        plan_generating(
            model, cluster, output, folder, objective=objective, asked=asked, profile_file=profile_file, data_file=data_file, threads=threads,
            replicas=replicas, standby=standby, given=others, picture=picture, as_json=as_json,
        )  # fmt: skip
        return
    refuse_without_generate(others)
    if objective in ("ttft", "tpot"):
        raise BadInput(f"--objective {objective} is for models that generate", remedy="add --generate")
    given = Profile.load(profile_file) if profile_file else None
    calibration = Calibration.load(calibration_file) if calibration_file else None
    report = BenchReport.load(bench_file) if bench_file else None
    if data_file and not data_file.is_file():
        raise BadInput(f"--data: there is no file {str(data_file)!r}")
    wanted = _sizes(batch, sizes)
    for symbol, size in wanted.items():
        if given and given.structure.symbols.get(symbol) != size:
            known = ", ".join(f"{s}={n}" for s, n in given.structure.symbols.items())
            raise BadInput(f"the profile is for {known}, not for {symbol}={size}", remedy="profile again with these sizes")
    graph = _load(model, {})
    if given and given.structure.sha256 != graph.sha256:
        raise BadPlan(f"the profile {profile_file} is of another model ({given.structure.name})", remedy="profile this model again")
    graph = at_sizes(graph, given.structure.symbols if given else wanted)
    measured = given or _measure(graph, cluster, threads, 10 if others["scale"] else 3, others)
    if report:
        measured, cluster = corrected(measured, cluster, report)
    asked |= accuracy(model, graph, calibration, data_file, asked)
    chosen = partitioner.plan(measured, cluster, objective=objective, **asked)
    if replicas:
        taken = {name: size for name, (size, _) in asked.get("taken", {}).items()}
        chosen = add_standbys(chosen, cluster, replicas, standby, taken, private_to=asked["private"][0] if asked.get("private") else "")
    say("cutting the model")
    shards = partitioner.cut(graph, chosen, folder)
    chosen = chosen.with_shards({stage: shard.sha256 for stage, shard in shards.items()})
    chosen.save(output)
    if picture:
        say(f"drawing {picture}")
        draw(chosen, picture, profile=measured, cluster=cluster, planner=functools.partial(partitioner.plan, **_free(asked)))
    if as_json:
        click.echo(chosen.to_json(), nl=False)
        return
    click.echo(chosen.explain())
    click.echo(f"\nwrote {output} and {folder}" + (f", and drew {picture}" if picture else ""))


def _refuse_with_generate(**given: Any) -> None:
    for name, value in given.items():
        if value:
            raise BadInput(f"--{name.replace('_', '-')} cannot be had with --generate", remedy="leave it away")


def _free(asked: Mapping[str, Any]) -> dict[str, Any]:
    """The wishes that hold for what else could be planned: all but where to cut and into how many. (What else could be is not measured
    for its loss.)"""
    return {name: wish for name, wish in asked.items() if name not in ("at", "nodes", "stages", "max_stages", "measure_loss")}


def _load(model: str, sizes: Mapping[str, int]) -> ModelGraph:
    import partitioner
    from partitioner.resizing import at_sizes

    say(f"capturing {model}")
    return at_sizes(partitioner.load_model(model), sizes)


def _sizes(batch: int | None, sizes: tuple[tuple[str, int], ...]) -> dict[str, int]:
    return dict(sizes) | ({"batch": batch} if batch else {})


def _measure(graph: ModelGraph, cluster: Cluster | None, threads: int, repeats: int, measured_by: Mapping[str, Any]) -> Profile:
    import partitioner
    from partitioner.profile_cache import ProfileCache, default_directory
    from partitioner.profiling_nodes import Options

    options = Options(
        budget_s=measured_by["budget_s"],
        cache=None if measured_by["no_cache"] else ProfileCache(default_directory()),
        refresh=measured_by["refresh"],
        real_weights=measured_by["real_weights"],
    )
    with progress_bar("measuring operators") as advance:
        return partitioner.profile(
            graph, cluster=cluster, threads=threads, repeats=repeats, options=options, scale=measured_by["scale"], on_progress=advance
        )


def _profile_lines(measured: Profile) -> list[str]:
    from partitioner.profiling import HERE

    structure = measured.structure
    seconds = measured.columns[HERE].seconds
    lines = [
        f"{structure.name}: {len(structure.vertices)} operators, {bytes_text(structure.param_bytes)} of parameters, "
        f"{seconds_text(measured.whole_s)} for a batch of {structure.batch}",
        f"measured on {measured.device}, threads: {measured.threads}, median of {measured.repeats} runs, torch {measured.torch}",
    ]
    if measured.spread > _BUSY:
        lines.append(f"warning: runs differ by {measured.spread:.0%}: is the machine busy? These figures are no better than that")
    lines += ["", "the longest"]
    longest = sorted(zip(seconds, structure.vertices, strict=True), key=lambda pair: -pair[0])[:_TOP_OPERATORS]
    rows = [("operator", "kind", "module", "seconds", "share")]
    for took, vertex in longest:
        share = f"{took / max(measured.whole_s, 1e-12):.1%}"
        rows.append((vertex.name, vertex.op, vertex.scope, seconds_text(took), share))
    lines += table(rows)
    if len(measured.columns) > 1:
        rows_of_nodes = [("node", "whole model", "how")]
        rows_of_nodes += [(name, seconds_text(sum(c.seconds)), c.how) for name, c in measured.columns.items() if name != HERE]
        lines += ["", *table(rows_of_nodes)]
    return lines
