"""`splitnet status`, `splitnet unload`."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from splitnet.batching import Batching
from splitnet.commands.showing import print_table, size_text, where_of
from splitnet.generations import generation_key

if TYPE_CHECKING:
    from splitnet.node_status import DeploymentStatus, GenerationStatus, LinkStatus, NodeStatus

__all__ = ["status", "unload"]

_EVENTS = 12  # the newest are shown
_FILE = click.Path(dir_okay=False, path_type=Path)


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

    nodes = ask(where_of(where))
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

    nodes = undeploy(where_of(where), name, drain_s=drain_s, delete_blobs=delete_blobs)
    click.echo(json.dumps({"name": name, "nodes": nodes}) if as_json else f"unloaded {name!r} from {', '.join(nodes)}")


def _show(nodes: Sequence[NodeStatus]) -> None:
    reserved: list[str] = []
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
        limit = f" of {size_text(node.memory_limit_bytes)}" if node.memory_limit_bytes else ""
        notes = (" draining" if node.draining else "") + (" INSECURE" if node.insecure else "")
        if node.sessions_reserved:
            most = f" of {node.sessions_limit}" if node.sessions_limit else ""
            alone = ", threads exclusively" if any(d.exclusive for d in node.deployments) else ""
            reserved.append(f"{node.name} has reserved {node.sessions_reserved}{most} requests at once{alone}")
        left = [node.name + notes, node.address, node.device, size_text(node.memory_used_bytes) + limit]
        work = [
            (
                _called(deployment),
                s.name + (" (standby)" if s.standby else ""),
                s.engine,
                str(s.requests),
                str(s.failures),
                _in_flight(deployment),
            )
            for deployment in node.deployments
            for s in deployment.stages
        ]
        work += [(f"{d.name}: moved to {d.moved_to}", "", "", "", "", "") for d in node.deployments if d.state == "moved"]
        work += [(f"{_key(d)} (being restored from disk)", "", "", "", "", "") for d in node.deployments if d.state == "restoring"]
        links = [_link(link) for link in node.links]
        for i in range(max(1, len(work), len(links))):
            row = (
                *(left if i == 0 else [""] * 4),
                *(work[i] if i < len(work) else ("",) * 6),
                *(links[i] if i < len(links) else ("",) * 5),
            )
            rows.append(row)
    print_table(rows)
    for line in reserved:
        click.echo(line)
    if any(deployment.ingress for node in nodes for deployment in node.deployments):
        click.echo("* takes the requests of clients")
    for name, how in {_key(d): how for node in nodes for d in node.deployments if (how := _how_batched(d.batching))}.items():
        click.echo(f"{name}: {how}")
    for node in nodes:
        for d in node.deployments:
            if d.generating is not None and d.state != "moved":
                click.echo(f"{_key(d)}: {_generating(d.generating)}")
    for node in nodes:
        for d in node.deployments:
            if d.noise is not None and d.ingress:
                gone = f"{d.released} {d.noise.per}{'s' * (d.released != 1)} have left {node.name} with it"
                click.echo(f"{_key(d)}: what other nodes see is {d.noise.promise()}, norms up to {d.noise.clip_norm:g}; {gone}")
    told = sorted(((event.time_s, node.name, event) for node in nodes for event in node.events), key=lambda one: one[:2])[-_EVENTS:]
    for time_s, name, event in told:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time_s))
        click.echo(f"{when} {name}: {' '.join(filter(None, (event.deployment, event.kind, event.node)))}: {event.text}")
    for node in nodes:
        if node.error:
            click.echo(f"node {node.name!r} at {node.address}: {node.error}", err=True)


def _link(link: LinkStatus) -> tuple[str, str, str, str, str]:
    goodput = f"{size_text(int(link.goodput_bytes_per_s))}/s" if link.goodput_bytes_per_s else "-"
    codecs = ", ".join(f"{c.codec} ({c.switches} changes)" if c.switches else c.codec for c in link.codecs)
    waiting = link.queued_bytes + link.unacknowledged_bytes
    return (
        link.target + ("" if link.connected else " (down)"),
        size_text(link.sent_bytes),
        goodput,
        size_text(waiting) if waiting else "-",
        codecs,
    )


def _key(deployment: DeploymentStatus) -> str:
    return generation_key(deployment.name, deployment.generation)


def _called(deployment: DeploymentStatus) -> str:
    state = {"active": "", "canary": f" (canary, {deployment.share * 100:g}%)"}.get(deployment.state, f" ({deployment.state})")
    return _key(deployment) + ("*" if deployment.ingress else "") + state


def _in_flight(deployment: DeploymentStatus) -> str:
    return str(deployment.in_flight) + (f" ({deployment.waiting} in line)" if deployment.waiting else "")


def _generating(said: GenerationStatus) -> str:
    parts = [
        f"{said.sessions} sessions, {size_text(said.used_bytes)} of {size_text(said.cache_bytes)} KV cache promised"
        + (f", {said.kept} ended ones kept" if said.kept else "")
    ]
    if said.new_tokens:
        parts.append(f"{said.new_tokens} tokens in {said.answers} answers, {said.tokens_per_s:.3g} tokens/s lately")
    if said.ttft_s:
        parts.append(
            f"first token after {said.ttft_s * 1e3:.3g} ms" + (f", {said.tpot_s * 1e3:.3g} ms for each more" if said.tpot_s else "")
        )
    if said.cached_tokens:
        parts.append(f"{said.cached_tokens} of {said.prompt_tokens} prompt tokens were known")
    if said.drafted_tokens:
        parts.append(f"{said.accepted_tokens} of {said.drafted_tokens} guesses were right")
    return "; ".join(parts)


def _how_batched(batching: Batching) -> str:
    joined = f"requests are joined up to {batching.max_batch} rows" if batching.max_batch > 1 else ""
    if batching.max_delay_s:
        joined += f", and wait up to {batching.max_delay_s * 1e3:g} ms for it"
    divided = f"larger ones go in pieces of {batching.microbatch} rows" if batching.microbatch else ""
    return "; ".join(filter(None, (joined, divided)))
