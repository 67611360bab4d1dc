"""`splitnet chat`: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from splitnet.errors import SplitnetError

if TYPE_CHECKING:
    from splitnet.gateway.conversation import Conversation

__all__ = ["chat"]

_HELP = "/reset begins anew, /help shows this, /quit (or Ctrl-D) leaves; Ctrl-C stops an answer."


@click.command()
@click.argument("plan", metavar="PLAN")
@click.option(
    "--tokenizer",
    type=click.Path(file_okay=False, path_type=Path),
    help="Directory of the model's tokenizer.json.  [default: where the plan's model was read from]",
)
@click.option(
    "--chat-template", type=click.Path(dir_okay=False, path_type=Path), help="A Jinja file, for a model without one, or in its place."
)
@click.option("--deployment", default="", help="The deployment's name.  [default: the one of the plan]")
@click.option("--system", default="", metavar="TEXT", help="What the model is told before the conversation.")
@click.option("--max-tokens", type=click.IntRange(1), help="The most that one answer may have.  [default: what the context holds]")
@click.option("--temperature", type=click.FloatRange(0, 2), default=0.7, show_default=True, help="0: always the most likely token.")
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.95,
    show_default=True,
    help="Draw among the fewest tokens that are together so likely.",
)
@click.option("--seed", type=click.IntRange(0), help="The same draws, for the same words.  [default: new ones]")
def chat(
    plan: str,
    tokenizer: Path | None,
    chat_template: Path | None,
    deployment: str,
    system: str,
    max_tokens: int | None,
    temperature: float,
    top_p: float,
    seed: int | None,
) -> None:
    """Talk with a deployed decoder model. Answers appear while they are written; /reset begins anew, Ctrl-C stops an answer, Ctrl-D ends.

    What no longer fits into the context is forgotten from the beginning, and said so.

    \b
    Example:
      splitnet chat plan.json --system "Answer in one sentence."
    """
    from splitnet import background
    from splitnet.gateway.conversation import Conversation, Style
    from splitnet.gateway.opening import ModelSource, open_model

    opened = background.run(open_model(ModelSource.parse(plan, deployment, tokenizer, chat_template)))
    try:
        conversation = Conversation(opened.served, Style(temperature, top_p, seed, max_tokens), system)
        click.echo(f"{opened.served.name}, context {opened.served.context} tokens. {_HELP}", err=True)
        _talk(conversation)
    finally:
        background.run(opened.client.close())


def _talk(conversation: Conversation) -> None:
    while (line := _read()) is not None:
        if line in ("/quit", "/exit"):
            return
        if line == "/reset":
            conversation.reset()
            click.echo("(forgotten)", err=True)
        elif line.startswith("/"):
            click.echo(_HELP, err=True)
        elif line:
            _answer(conversation, line)


def _read() -> str | None:
    """A line, or None at the end. Ctrl-C at the prompt only clears the line."""
    while True:
        try:
            if sys.stdin.isatty():
                click.echo(click.style("> ", bold=True), nl=False, err=True)
            line = sys.stdin.readline()
            return line.strip() if line else None
        except KeyboardInterrupt:
            click.echo("", err=True)


def _answer(conversation: Conversation, line: str) -> None:
    try:
        if forgotten := conversation.ask(line):
            click.echo(f"({forgotten} earlier messages no longer fit, and are forgotten)", err=True)
        with contextlib.closing(conversation.answer()) as answer:
            for text in answer:
                click.echo(text, nl=False)
        click.echo("" if conversation.finish == "stop" else click.style(" [cut: no more tokens]", dim=True))
    except KeyboardInterrupt:
        click.echo(click.style(" [stopped]", dim=True))
    except SplitnetError as error:
        click.echo("")
        click.echo(f"error: {error}", err=True)
