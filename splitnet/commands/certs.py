"""`splitnet certs`: the private authority of a cluster."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import click

from splitnet.commands.authority_options import directory_option, json_option
from splitnet.commands.limits import limit_options, limits_of

__all__ = ["certs"]


@click.group()
def certs() -> None:
    """Make and renew the certificates by which nodes, operators and clients know each other.

    Keep the authority's folder on one machine that you trust; what it makes for each node and person is a folder of its own, to be copied there.

    \b
    Example: an authority, two nodes, a client
      splitnet certs init --dir certs
      splitnet certs issue attic --address 10.0.0.5 --dir certs
      splitnet certs issue cellar --address 10.0.0.6 --dir certs
      splitnet certs issue camera --role client --dir certs
      scp -pr certs/attic 10.0.0.5:certs          (and so on)
      splitnet node --listen 0.0.0.0:7001 --certs certs          (on attic)
      export SPLITNET_CERTS=$PWD/certs/operator                  (here)
    """


@certs.command()
@directory_option
@click.option("--operator", default="operator", show_default=True, help="The first operator's name.")
@click.option("--days", type=click.IntRange(1, 36500), default=3650, show_default=True, help="How long the authority holds.")
@json_option
def init(directory: Path, operator: str, days: int, as_json: bool) -> None:
    """Make an authority, and the first operator's certificate.

    \b
    Example:
      splitnet certs init --dir certs
    """
    from splitnet.security.authority import Authority

    made = Authority.init(directory, operator, days)
    folder = made.folder(operator)
    if as_json:
        click.echo(json.dumps({"cluster": made.cluster, "directory": str(directory), "operator": str(folder)}))
        return
    click.echo(
        f"authority of cluster {made.cluster} in {directory}: keep {directory / 'ca.key'} and {directory / 'signing.key'} to yourself"
    )
    click.echo(f"operator's credentials in {folder}: use them with `export {'SPLITNET_CERTS'}={folder.resolve()}`")


@certs.command()
@click.argument("name")
@directory_option
@click.option(
    "--role",
    type=click.Choice(["node", "operator", "client", "observer", "guest"]),
    default="node",
    show_default=True,
    help="What its holder may do; a guest needs a token besides.",
)
@click.option(
    "--address",
    "addresses",
    multiple=True,
    metavar="HOST",
    help="How others reach the node: a host or an IP address. Repeat it for several.",
)
@click.option("--days", type=click.IntRange(1, 36500), default=90, show_default=True, help="How long it holds.")
@limit_options
@json_option
def issue(
    name: str,
    directory: Path,
    role: str,
    addresses: tuple[str, ...],
    days: int,
    rate: float,
    bytes_per_s: str,
    sessions: int,
    as_json: bool,
) -> None:
    """Make the folder that NAME needs: certificate, key, and whom to trust. A node's NAME is the one in cluster.toml and plan.

    \b
    Examples:
      splitnet certs issue attic --address 10.0.0.5 --address attic.local
      splitnet certs issue camera --role client --rate 20
    """
    from splitnet.security.authority import Authority
    from splitnet.security.roles import Role

    with Authority.opened(directory) as authority:
        folder = authority.issue(name, Role(role), addresses, days=days, limits=limits_of(rate, bytes_per_s, sessions))
        until = authority.issued[-1].not_after
    if as_json:
        click.echo(json.dumps({"name": name, "role": role, "directory": str(folder), "not_after": until}))
        return
    click.echo(
        f"{role} {name!r}: {folder} (until {_day(until)}); copy it to its machine, readable by its owner only: scp -pr {folder} HOST:"
    )
    if role == "node":
        click.echo(f"there: splitnet node --listen 0.0.0.0:7001 --certs {folder.name}")


@certs.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@directory_option
@click.option("--authority", "of_authority", is_flag=True, help="Make a new authority, which is trusted beside the old one.")
@click.option("--drop-old", is_flag=True, help="Trust only the newest authority from now on.")
@json_option
def rotate(names: tuple[str, ...], directory: Path, of_authority: bool, drop_old: bool, as_json: bool) -> None:
    """Renew certificates, with new keys: all of them, or those named. Copy the folders again; nodes take them without a restart.

    \b
    Examples: one; and the authority itself, in three steps
      splitnet certs rotate attic
      splitnet certs rotate --authority        then copy the folders
      splitnet certs rotate                    then copy the folders
      splitnet certs rotate --drop-old         then copy the folders
    """
    from splitnet.errors import BadInput
    from splitnet.security.authority import Authority

    if of_authority + drop_old + bool(names) > 1:
        raise BadInput("names, --authority and --drop-old do not go together", remedy="do one after the other")
    with Authority.opened(directory) as authority:
        if of_authority:
            authority.rotate_authority()
            folders = [authority.folder(i.name) for i in authority.issued if not i.revoked]
        elif drop_old:
            authority.drop_old()
            folders = [authority.folder(i.name) for i in authority.issued if not i.revoked]
        else:
            folders = authority.rotate(names)
    folders = sorted(set(folders))
    if as_json:
        click.echo(json.dumps({"changed": [str(folder) for folder in folders]}))
        return
    click.echo("copy to their machines: " + ", ".join(map(str, folders)))


@certs.command()
@click.argument("name")
@directory_option
@json_option
def revoke(name: str, directory: Path, as_json: bool) -> None:
    """Refuse every certificate of NAME from now on. Nodes learn it from the policy: `splitnet token push`, or copy policy.json.

    \b
    Example:
      splitnet certs revoke camera && splitnet token push --cluster cluster.toml
    """
    from splitnet.security.authority import Authority

    with Authority.opened(directory) as authority:
        serials = authority.revoke(name)
    if as_json:
        click.echo(json.dumps({"name": name, "revoked": serials}))
        return
    click.echo(
        f"revoked {len(serials)} certificates of {name!r}; bring it to the nodes: splitnet token push --cluster cluster.toml --dir {directory}"
    )


@certs.command(name="list")
@directory_option
@json_option
def list_(directory: Path, as_json: bool) -> None:
    """Show what was issued to whom, and until when it holds.

    \b
    Example:
      splitnet certs list
    """
    from splitnet.security.authority import Authority

    with Authority.opened(directory) as authority:
        issued = authority.issued
    if as_json:
        click.echo(
            json.dumps(
                [{"name": i.name, "role": i.role, "serial": i.serial, "not_after": i.not_after, "revoked": i.revoked} for i in issued]
            )
        )
        return
    now = datetime.now(UTC).timestamp()
    rows: list[Sequence[str]] = [("name", "role", "until", "addresses", "")]
    for i in issued:
        state = "revoked" if i.revoked else "expired" if i.not_after < now else ""
        rows.append((i.name, i.role, _day(i.not_after), ", ".join(i.addresses), state))
    widths = [max(len(row[k]) for row in rows) for k in range(5)]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@certs.command()
@click.argument("address", metavar="HOST:PORT")
def check(address: str) -> None:
    """Show which certificate a node shows, which one this side has, and what both clocks have to do with it.

    \b
    Example:
      splitnet certs check 10.0.0.5:7001
    """
    from splitnet.security.checking import check_node

    findings = check_node(address)
    for line in findings.lines:
        click.echo(line)
    if findings.fault:
        from splitnet.errors import NotPermitted

        raise NotPermitted(findings.fault, remedy=findings.remedy)


def _day(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
