"""`splitnet deploy`, `splitnet status`, `splitnet unload`."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from splitnet.batching import Batching
from splitnet.cluster import Cluster
from splitnet.plan import Plan

if TYPE_CHECKING:
    from collections.abc import Callable

    from splitnet.install import Progress
    from splitnet.node_status import DeploymentStatus, LinkStatus, NodeStatus

__all__ = ["deploy", "status", "unload"]

_FILE = click.Path(dir_okay=False, path_type=Path)


class _Duration(click.ParamType[float]):
    """Seconds, from "2ms", "0.5s" or "0.5"."""

    name = "duration"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        text = str(value).strip()
        number, factor = (text[:-2], 1e-3) if text.endswith("ms") else (text.removesuffix("s"), 1.0)
        try:
            seconds = float(number) * factor
        except ValueError:
            seconds = math.nan
        if not 0 <= seconds < math.inf:
            self.fail(f"{text!r} is not a time such as 2ms or 0.5s", param, ctx)
        return seconds


@click.command()
@click.argument("plan", type=_FILE)
@click.option("--name", default="", help="The deployment's name; made of the model's if not given.")
@click.option(
    "--shards", type=click.Path(path_type=Path), help="Where the shards are, one folder (or .zip) per stage.  [default: PLAN.shards]"
)
@click.option(
    "--max-batch",
    type=click.IntRange(min=1),
    help="Join small requests, of any clients, up to this many rows. Only for models that treat each row of a batch by itself.  [default: as the plan says, else 1]",
)
@click.option(
    "--max-delay", type=_Duration(), help="How long a request may wait to be joined, such as 2ms.  [default: 0: only what waits anyway]"
)
@click.option(
    "--microbatch",
    type=click.IntRange(min=0),
    help="Send requests of more rows through the pipeline in pieces of this many, for the same kind of models.  [default: as the plan says, else 0: whole]",
)
@click.option("--fixed-codecs", is_flag=True, help="Keep the plan's codecs, whatever becomes of the links.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def deploy(
    plan: Path,
    name: str,
    shards: Path | None,
    max_batch: int | None,
    max_delay: float | None,
    microbatch: int | None,
    fixed_codecs: bool,
    as_json: bool,
) -> None:
    """Ship the shards of a PLAN to its nodes, verify and activate them.

    A node that holds a part already is not sent it again, and an upload that broke off goes on where it stopped. Either all nodes
    serve the plan in the end, or none does.

    A batch that was joined or divided may differ in the last bits from the same rows asked for in one request: kernels round
    differently for other sizes.

    \b
    Example: what `splitnet plan ... -o plan.json` has left here
      splitnet deploy plan.json --name search
    Example: many clients with small requests
      splitnet deploy plan.json --max-batch 16 --max-delay 2ms
    """
    from splitnet.install import deploy as install

    loaded = Plan.load(plan)
    loaded = loaded.with_fixed_codecs() if fixed_codecs else loaded
    planned = loaded.batching
    batching = Batching(
        planned.max_batch if max_batch is None else max_batch,
        planned.max_delay_s if max_delay is None else max_delay,
        planned.microbatch if microbatch is None else microbatch,
    )
    with _progress() as on_progress:
        deployed = install(loaded, shards or plan.with_suffix(".shards"), name=name, batching=batching, on_progress=on_progress)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(deployed), indent=1, sort_keys=True))
        return
    click.echo(f"deployed {deployed.name!r}: send requests to {deployed.ingress}")
    rows: list[Sequence[str]] = [("node", "stages", "sent", "loaded in")]
    for node, sent_bytes in deployed.sent_bytes.items():
        stages = ", ".join(stage.name for stage in loaded.stages if stage.node == node)
        rows.append((node, stages, _size(sent_bytes) if sent_bytes else "nothing new", f"{deployed.load_s[node]:.2f} s"))
    _table(rows)


@click.command()
@click.option("--cluster", "where", type=_FILE, required=True, help="cluster.toml, or a plan.")
@click.option("--json", "as_json", is_flag=True, help="Print what the nodes say as JSON.")
@click.pass_context
def status(ctx: click.Context, where: Path, as_json: bool) -> None:
    """Show what each node of a cluster holds and does.

    Exit status 1 when a node does not answer.

    \b
    Example: every second, by another program's means
      watch -n 1 splitnet status --cluster cluster.toml
    """
    from splitnet.install import status as ask

    nodes = ask(_nodes(where))
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(node) for node in nodes], indent=1, sort_keys=True))
    else:
        _show(nodes)
    if any(node.error for node in nodes):
        ctx.exit(1)


@click.command()
@click.argument("name")
@click.option("--cluster", "where", type=_FILE, required=True, help="cluster.toml, or the plan.")
@click.option(
    "--drain",
    "drain_s",
    type=click.FloatRange(min=0, max=3600),
    default=5.0,
    show_default=True,
    help="Seconds that requests in flight may still take.",
)
@click.option("--delete", "delete_blobs", is_flag=True, help="Also delete shards that no deployment uses from the nodes' disks.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def unload(name: str, where: Path, drain_s: float, delete_blobs: bool, as_json: bool) -> None:
    """Take the deployment NAME off the nodes that hold it.

    \b
    Example: also free the disk
      splitnet unload search --cluster cluster.toml --delete
    """
    from splitnet.install import undeploy

    nodes = undeploy(_nodes(where), name, drain_s=drain_s, delete_blobs=delete_blobs)
    click.echo(json.dumps({"name": name, "nodes": nodes}) if as_json else f"unloaded {name!r} from {', '.join(nodes)}")


def _nodes(path: Path) -> Cluster | Plan:
    """A plan knows its nodes as a cluster does."""
    return Plan.load(path) if path.suffix == ".json" else Cluster.load(path)


@contextmanager
def _progress() -> Iterator[Callable[[Progress], None] | None]:
    """A bar on a terminal (stderr, so that the result can be piped); nothing elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    with click.progressbar(length=0, label="shipping", file=sys.stderr, show_pos=False, item_show_func=lambda item: item) as bar:

        def on_progress(progress: Progress) -> None:
            bar.length = max(1, progress.total_bytes)
            bar.label = "shipping  " if progress.phase == "ship" else "activating"
            bar.update(progress.held_bytes - bar.pos, f"{progress.node}  {_size(progress.held_bytes)} of {_size(progress.total_bytes)}")

        yield on_progress


def _show(nodes: Sequence[NodeStatus]) -> None:
    rows: list[Sequence[str]] = [
        (
            "node",
            "address",
            "device",
            "memory",
            "deployment",
            "stage",
            "engine",
            "requests",
            "failed",
            "in flight",
            "link to",
            "sent",
            "goodput",
            "queued",
            "codec",
        )
    ]
    for node in nodes:
        if node.error:
            rows.append((node.name, node.address, "-", "-", "does not answer", *[""] * 10))
            continue
        limit = f" of {_size(node.memory_limit_bytes)}" if node.memory_limit_bytes else ""
        notes = (" draining" if node.draining else "") + (" INSECURE" if node.insecure else "")
        left = [node.name + notes, node.address, node.device, _size(node.memory_used_bytes) + limit]
        work = [
            (
                deployment.name + ("*" if deployment.ingress else ""),
                s.name,
                s.engine,
                str(s.requests),
                str(s.failures),
                _in_flight(deployment),
            )
            for deployment in node.deployments
            for s in deployment.stages
        ]
        links = [_link(link) for link in node.links]
        for i in range(max(1, len(work), len(links))):
            row = (
                *(left if i == 0 else [""] * 4),
                *(work[i] if i < len(work) else ("",) * 6),
                *(links[i] if i < len(links) else ("",) * 5),
            )
            rows.append(row)
    _table(rows)
    if any(deployment.ingress for node in nodes for deployment in node.deployments):
        click.echo("* takes the requests of clients")
    for name, how in {d.name: how for node in nodes for d in node.deployments if (how := _how_batched(d.batching))}.items():
        click.echo(f"{name}: {how}")
    for node in nodes:
        if node.error:
            click.echo(f"node {node.name!r} at {node.address}: {node.error}", err=True)


def _link(link: LinkStatus) -> tuple[str, str, str, str, str]:
    goodput = f"{_size(int(link.goodput_bytes_per_s))}/s" if link.goodput_bytes_per_s else "-"
    codecs = ", ".join(f"{c.codec} ({c.switches} changes)" if c.switches else c.codec for c in link.codecs)
    waiting = link.queued_bytes + link.unacknowledged_bytes
    return link.target + ("" if link.connected else " (down)"), _size(link.sent_bytes), goodput, _size(waiting) if waiting else "-", codecs


def _in_flight(deployment: DeploymentStatus) -> str:
    return str(deployment.in_flight) + (f" ({deployment.waiting} in line)" if deployment.waiting else "")


def _how_batched(batching: Batching) -> str:
    joined = f"requests are joined up to {batching.max_batch} rows" if batching.max_batch > 1 else ""
    if batching.max_delay_s:
        joined += f", and wait up to {batching.max_delay_s * 1e3:g} ms for it"
    divided = f"larger ones go in pieces of {batching.microbatch} rows" if batching.microbatch else ""
    return "; ".join(filter(None, (joined, divided)))


def _table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _size(size_bytes: int) -> str:
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
