"""`splitnet doctor`: is this box fit to be a node?"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

__all__ = ["doctor"]

_MARKS = {"ok": ("ok", "green"), "warning": ("warn", "yellow"), "failure": ("FAIL", "red")}


@click.command()
@click.option("--data", "data_dir", type=click.Path(path_type=Path), help="Where the node would keep its shards.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@click.pass_context
def doctor(ctx: click.Context, data_dir: Path | None, as_json: bool) -> None:
    """Is this box fit to be a node?

    Looks at Python, the packages and their versions, torch, the engines, memory, disk, loopback, and whether another distribution
    has taken the name of one of splitnet's packages. Changes nothing. Exit status 0: fit, perhaps with warnings; 1: not fit, and
    each failure comes with its remedy.

    \b
    Example: before the first start, with the disk that will hold the shards
      splitnet doctor --data /srv/splitnet
    """
    from splitnet.fitness import examine

    findings = examine(data_dir)
    fit = all(finding.state != "failure" for finding in findings)
    if as_json:
        click.echo(json.dumps({"fit": fit, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        width = max(len(finding.name) for finding in findings)
        for finding in findings:
            text, colour = _MARKS[finding.state]
            click.echo(f"{click.style(f'{text:>4}', fg=colour)}  {finding.name:<{width}}  {finding.finding}")
            if finding.remedy:
                click.echo(f"      {'':<{width}}  remedy: {finding.remedy}")
        click.echo("This box is fit to be a node." if fit else "This box is not fit to be a node yet.")
    ctx.exit(0 if fit else 1)
