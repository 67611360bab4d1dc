from __future__ import annotations

import json
import tempfile
from pathlib import Path

import click

__all__ = ["demo"]


@click.command()
@click.option("--model", type=click.Path(path_type=Path), help="Folder of all-MiniLM-L6-v2.  [default: the installed package]")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON on stdout, the story on stderr.")
@click.pass_context
def demo(ctx: click.Context, model: Path | None, as_json: bool) -> None:
    """Do all of it on this machine, on real input.

    Starts three node servers, cuts all-MiniLM-L6-v2 and a small convolutional network in three, serves them, and compares answers,
    latency and throughput with the whole model on one node. Exit status 1 if an answer differs.

    \b
    Example:
      splitnet demo
      splitnet demo --json > demo.json
    """
    from partitioner.demo.story import run
    from partitioner.demo.text import find_minilm

    _quiet_transformers()
    with tempfile.TemporaryDirectory(prefix="splitnet-demo-") as folder:
        report = run(model or find_minilm(), Path(folder), lambda line: click.echo(line, err=as_json))
    if as_json:
        click.echo(json.dumps(report.to_json(), indent=1))
    if not report.ok:
        click.echo("The answers differ.", err=True)
        ctx.exit(1)


def _quiet_transformers() -> None:
    """Its progress bars would stand between the lines of the story."""
    try:
        from transformers.utils import logging
    except ImportError:
        return  # the task that needs it says so
    logging.disable_progress_bar()
