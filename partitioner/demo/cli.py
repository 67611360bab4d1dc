from __future__ import annotations

import json
import tempfile
from pathlib import Path

import click

from splitnet.errors import BadInput

__all__ = ["demo"]


@click.command()
@click.option("--model", type=click.Path(path_type=Path), help="Folder of all-MiniLM-L6-v2.  [default: the installed package]")
@click.option("--llm", is_flag=True, help="A language model, trained there and then, that writes.")
@click.option(
    "--prompt",
    "prompts",
    multiple=True,
    metavar="TEXT",
    help="With --llm: what it continues; may be given again.  [default: three beginnings]",
)
@click.option("--tokens", type=click.IntRange(2, 400), default=96, show_default=True, help="With --llm: how much it writes.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON on stdout, the story on stderr.")
@click.pass_context
def demo(ctx: click.Context, model: Path | None, llm: bool, prompts: tuple[str, ...], tokens: int, as_json: bool) -> None:
    """Do all of it on this machine, on real input.

    Starts three node servers, cuts all-MiniLM-L6-v2 and a small convolutional network in three, serves them, and compares answers,
    latency and throughput with the whole model on one node. Exit status 1 if an answer differs.

    With --llm: trains a small Llama on the documentation that this Python brings along (a few minutes, the first time), splits it over three nodes and lets
    it write, with the time to the first token, tokens per second, bytes per token and hop, and memory beside the whole model.

    \b
    Example:
      splitnet demo
      splitnet demo --json > demo.json
      splitnet demo --llm --prompt "A class is"
    """
    if llm:
        if model is not None:
            raise BadInput("--model is of the demo without --llm")
        _demo_llm(ctx, prompts, tokens, as_json)
        return
    if prompts:
        raise BadInput("--prompt is of the demo with --llm")
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


def _demo_llm(ctx: click.Context, prompts: tuple[str, ...], tokens: int, as_json: bool) -> None:
    from partitioner.demo.llm.story import PROMPTS, Writing, run
    from partitioner.demo.llm.training import SMALL

    _quiet_transformers()

    def say(line: str) -> None:
        click.echo(line, err=as_json)

    def write(text: str) -> None:
        click.echo(text, nl=False, err=as_json)

    with tempfile.TemporaryDirectory(prefix="splitnet-demo-") as folder:
        report = run(SMALL, Writing(prompts or PROMPTS, tokens), Path(folder), say, write)
    if as_json:
        click.echo(json.dumps(report.to_json(), indent=1))
    if not report.ok:
        click.echo("The texts differ.", err=True)
        ctx.exit(1)


def _quiet_transformers() -> None:
    """Its progress bars would stand between the lines of the story."""
    try:
        from transformers.utils import logging
    except ImportError:
        return  # the task that needs it says so
    logging.disable_progress_bar()
