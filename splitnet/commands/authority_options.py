"""Options of the commands that work on an authority's folder."""

from __future__ import annotations

from pathlib import Path

import click

__all__ = ["directory_option", "json_option"]

directory_option = click.option(
    "--dir",
    "directory",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("certs"),
    show_default=True,
    envvar="SPLITNET_AUTHORITY",
    help="The authority's folder; also SPLITNET_AUTHORITY.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
