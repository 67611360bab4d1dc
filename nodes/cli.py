"""`splitnet node`."""

from __future__ import annotations

from pathlib import Path

import click

__all__ = ["node"]


@click.command(short_help="Start a node server.")
@click.option("--listen", default="127.0.0.1:7001", show_default=True, metavar="HOST:PORT", help="Where to serve; port 0 takes a free one.")
@click.option("--name", default=None, metavar="NAME", help="This node's name.  [default: the host's name]")
@click.option("--memory", default="0", metavar="SIZE", help="What all stages here may reserve, such as 2GiB.  [default: no limit]")
@click.option(
    "--data",
    type=click.Path(file_okay=False, path_type=Path),
    default=None,
    help="Where shards are kept.  [default: ~/.local/share/splitnet/NAME]",
)
@click.option("--threads", type=click.IntRange(1), default=None, help="Threads for computing.  [default: one per processor]")
@click.option(
    "--engine",
    default="reference",
    show_default=True,
    metavar="NAME",
    help="Which engine runs the shards: reference (the one that the shard names: the model's own bits), auto (the fastest here, by measurement), torch, torch-fast, or onnx. See docs/engines.md.",
)
@click.option("--max-tensor", default="1GiB", show_default=True, metavar="SIZE", help="The largest tensor that is taken.")
@click.option("--buffer", default="2GiB", show_default=True, metavar="SIZE", help="Tensors of all requests held here at one time.")
@click.option(
    "--drain",
    type=click.FloatRange(0),
    default=10.0,
    show_default=True,
    metavar="SECONDS",
    help="How long requests in flight may take when the node is asked to stop.",
)
@click.option(
    "--certs",
    type=click.Path(file_okay=False, path_type=Path),
    default=None,
    help="The folder with this node's certificate (`splitnet certs issue`): mutual TLS.  [default: for an address that other machines reach, SPLITNET_CERTS, else ~/.config/splitnet/certs]",
)
@click.option(
    "--heartbeat",
    type=click.FloatRange(0),
    default=0.15,
    show_default=True,
    metavar="SECONDS",
    help="How often this node and those it sends to say that they are there; 0: never.",
)
@click.option(
    "--patience",
    type=click.FloatRange(0),
    default=0.45,
    show_default=True,
    metavar="SECONDS",
    help="After how long a silence another node is taken for lost, on a steady link; on one that is not, up to ten times as long.",
)
@click.option(
    "--recovery",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    metavar="SECONDS",
    help="How long requests wait for a lost node to come back, where no standby takes its place and nobody brings another plan.",
)
@click.option(
    "--restore/--no-restore",
    default=True,
    show_default=True,
    help="Serve again what was served here before the node was stopped or lost its power; or begin with nothing, and forget it.",
)
@click.option(
    "--sessions",
    type=click.IntRange(0),
    default=0,
    metavar="N",
    help="How many requests at once (of decoder models: sessions) all deployments here may reserve.  [default: no limit]",
)
@click.option("--insecure", is_flag=True, help="Allow an address that other machines reach, without encryption or authentication.")
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
    help="The least that is worth a line.",
)
@click.option("--log-json", is_flag=True, help="Log JSON on a terminal too.")
@click.option(
    "--announce", type=click.Path(dir_okay=False, path_type=Path), default=None, help="Write the address to this file once the node serves."
)
def node(
    listen: str,
    name: str | None,
    memory: str,
    data: Path | None,
    threads: int | None,
    engine: str,
    max_tensor: str,
    buffer: str,
    drain: float,
    heartbeat: float,
    patience: float,
    recovery: float,
    restore: bool,
    sessions: int,
    certs: Path | None,
    insecure: bool,
    log_level: str,
    log_json: bool,
    announce: Path | None,
) -> None:
    """Start a node: a server that keeps shards, runs them, and passes activations on. It serves until it gets SIGTERM or Ctrl-C; then
    it finishes what is in flight and stops.

    \b
    Examples:
      splitnet node
      splitnet node --listen 0.0.0.0:7001 --certs certs/attic --memory 2GiB
    """
    import asyncio
    import os

    from nodes.certificates import find_certs, name_in
    from nodes.config import NodeConfig, parse_bytes
    from nodes.logs import get_log, set_up_logs
    from nodes.memory import keep_buffers
    from nodes.server import serve
    from splitnet.heartbeat import Heartbeat

    certs = certs or find_certs(listen, insecure)
    given = {"name": name or (name_in(certs) if certs is not None else None), "threads": threads}
    config = NodeConfig(
        listen=listen,
        memory_bytes=parse_bytes(memory),
        data_dir=data,
        engine=engine,
        max_tensor_bytes=parse_bytes(max_tensor),
        buffer_bytes=parse_bytes(buffer),
        drain_s=drain,
        heartbeat=Heartbeat(heartbeat, patience, 10 * patience),
        recovery_s=recovery,
        restore=restore,
        sessions=sessions,
        insecure=insecure,
        certs=certs,
        log_level=log_level,
        log_json=log_json,
        announce=announce,
        **{option: value for option, value in given.items() if value is not None},  # type: ignore[arg-type]
    )
    set_up_logs(config.log_level, config.log_json)
    keep_buffers()
    if not asyncio.run(serve(config, get_log(config.name))):
        os._exit(0)  # all is said and closed, and a thread of torch that outlives the interpreter would abort the process
