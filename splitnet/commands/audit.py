"""`splitnet audit`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click

__all__ = ["audit"]


@click.group()
def audit() -> None:
    """Look after the audit logs: a node's in its --data folder, an authority's in its own.

    \b
    Example:
      splitnet audit verify ~/.local/share/splitnet/attic/audit.jsonl
    """


@audit.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--head",
    default="",
    metavar="HASH",
    help="A hash that must occur, as this command printed it earlier: so that missing last lines are found.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_context
def verify(ctx: click.Context, file: Path, head: str, as_json: bool) -> None:
    """Follow the hash chain of FILE. Exit status 1 where a line was changed, removed or added.

    \b
    Example: now, and with what was printed then a week later
      splitnet audit verify audit.jsonl
      splitnet audit verify audit.jsonl --head 3f2a...
    """
    from splitnet.security.audit import verify_audit

    report = verify_audit(file, head)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(report)))
    elif report.fault:
        click.echo(f"{file}: {report.fault}; the {report.lines} lines before are whole", err=True)
    else:
        torn = f", {report.recovered} of them after a crash" if report.recovered else ""
        click.echo(f"{file}: {report.lines} lines, whole{torn}; head {report.head}")
    if report.fault:
        ctx.exit(1)
