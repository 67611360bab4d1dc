"""What the planner's commands have in common: option types, options, and how they show progress."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from splitnet.errors import BadInput

__all__ = ["FILE", "Share", "Size", "check_folder", "check_output", "measuring", "progress_bar", "say"]

FILE = click.Path(dir_okay=False, path_type=Path)


class Size(click.ParamType[tuple[str, int]]):
    name = "symbol=n"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, int]:
        if isinstance(value, tuple):  # click may convert twice
            return value
        symbol, _, size = value.partition("=")
        if not symbol or not size.isdigit() or int(size) < 1:
            self.fail(f"{value!r} is not SYMBOL=N, as in sequence=128", param, ctx)
        return symbol, int(size)


class Share(click.ParamType[float]):
    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        text = str(value).strip()
        try:
            share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            share = math.nan
        if not 0 <= share < math.inf:
            self.fail(f"{value!r} is neither a percentage as 0.5% nor a share as 0.005", param, ctx)
        return share


def check_output(path: Path) -> None:
    """Raises BadInput for a file that could not be written: to be asked before long work whose result is to stand there."""
    folder = path.parent
    if not folder.is_dir():
        raise BadInput(f"cannot write {str(path)!r}: there is no folder {str(folder)!r}", remedy="make the folder first")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise BadInput(f"cannot write {str(path)!r}: it is not yours to write", remedy="give another -o")


def check_folder(output: Path, suffix: str) -> Path:
    """The folder of that suffix beside a file that is to be written. Raises BadInput where there can be none."""
    folder = output.with_suffix(suffix)
    if folder == output or (folder.exists() and not folder.is_dir()):
        raise BadInput(f"a folder {str(folder)!r} is to stand beside {str(output)!r}, and cannot", remedy="give another -o, as plan.json")
    return folder


def measuring(command: Callable[..., None]) -> Callable[..., None]:
    """The options of whatever measures operators on nodes."""
    for option in (
        click.option("--scale", is_flag=True, help="Ask no node: scale this machine's times by the reference kernel's."),
        click.option("--no-cache", is_flag=True, help="Neither use nor keep what was measured before (~/.cache/splitnet/profiles)."),
        click.option("--refresh", is_flag=True, help="Measure again, and keep that."),
        click.option(
            "--real-weights", is_flag=True, help="Ship the model's own weights to be measured, not random ones of the same shape."
        ),
        click.option(
            "--budget",
            "budget_s",
            type=click.FloatRange(min=0.1, max=60),
            default=5.0,
            show_default=True,
            help="Seconds for each kind of node.",
        ),
    ):
        command = option(command)
    return command


def say(text: str) -> None:
    """A step that has no bar; on a terminal only, and not into what is piped."""
    if sys.stderr.isatty():
        click.echo(text, err=True)


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar on a terminal (stderr, so that the result can be piped); nothing elsewhere. Yields advance(done, total, what)."""
    if not sys.stderr.isatty():
        yield lambda done, total, what: None
        return
    bar: Any
    with click.progressbar(length=1, label=label, file=sys.stderr, item_show_func=lambda item: item) as bar:

        def advance(done: int, total: int, what: str) -> None:
            bar.length = total
            bar.update(done - bar.pos, what)

        yield advance
