"""`splitnet token`: what a client may do without a certificate of its own role, for how long, and how much of it."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import click

from splitnet.commands.authority_options import directory_option, json_option
from splitnet.commands.limits import limit_options, limits_of, seconds_of

__all__ = ["token"]


@click.group()
def token() -> None:
    """Make, list and revoke bearer tokens.

    A token goes over mutual TLS, beside a certificate: often one of the role guest, which may do nothing by itself. Nodes keep only its hash.

    \b
    Example: for a month, for one deployment, 20 requests a second
      splitnet token create camera --deployment digits --expires 30d --rate 20
      splitnet token push --cluster cluster.toml
    """


@token.command()
@click.argument("name")
@directory_option
@click.option(
    "--role", type=click.Choice(["client", "observer", "operator"]), default="client", show_default=True, help="What its holder may do."
)
@click.option(
    "--deployment", "deployments", multiple=True, metavar="NAME", help="Only this deployment; repeat it for several.  [default: all]"
)
@click.option("--expires", default="90d", show_default=True, metavar="TIME", help="How long it holds: 30d, 12h.")
@limit_options
@json_option
def create(
    name: str,
    directory: Path,
    role: str,
    deployments: tuple[str, ...],
    expires: str,
    rate: float,
    bytes_per_s: str,
    sessions: int,
    as_json: bool,
) -> None:
    """Make a token, and print it once: nobody can read it again.

    \b
    Example: into the folder of a guest's certificate
      splitnet token create camera --deployment digits > certs/camera/token && chmod 600 certs/camera/token
    """
    from splitnet.security.authority import Authority
    from splitnet.security.roles import Role

    until = int(time.time()) + seconds_of(expires)
    with Authority.opened(directory) as authority:
        limits = limits_of(rate, bytes_per_s, sessions)
        policy, secret = authority.policy.with_token(name, Role(role), expires=until, deployments=deployments, limits=limits)
        authority.change_policy(policy, "token create", f"{role} {name} for {', '.join(deployments) or 'all deployments'}")
    click.echo(json.dumps({"name": name, "role": role, "expires": until, "token": secret}) if as_json else secret)
    click.echo("bring it to the nodes: splitnet token push --cluster cluster.toml", err=True)


@token.command(name="list")
@directory_option
@json_option
def list_(directory: Path, as_json: bool) -> None:
    """Show the tokens, without their secrets.

    \b
    Example:
      splitnet token list
    """
    from splitnet.security.authority import Authority

    with Authority.opened(directory) as authority:
        tokens = list(authority.policy.tokens.values())
    now = time.time()
    rows: list[Sequence[str]] = [("name", "role", "deployments", "until", "")]
    for t in tokens:
        state = "revoked" if t.revoked else "expired" if t.expires <= now else ""
        until = datetime.fromtimestamp(t.expires, UTC).strftime("%Y-%m-%d %H:%M UTC")
        rows.append((t.name, t.role, ", ".join(t.deployments) or "all", until, state))
    if as_json:
        keys = ("name", "role", "deployments", "expires", "state")
        click.echo(
            json.dumps(
                [
                    dict(zip(keys, (t.name, t.role, t.deployments, t.expires, row[4]), strict=True))
                    for t, row in zip(tokens, rows[1:], strict=True)
                ]
            )
        )
        return
    widths = [max(len(row[k]) for row in rows) for k in range(5)]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@token.command()
@click.argument("name")
@directory_option
@json_option
def revoke(name: str, directory: Path, as_json: bool) -> None:
    """Refuse the token NAME from now on.

    \b
    Example:
      splitnet token revoke camera && splitnet token push --cluster cluster.toml
    """
    from splitnet.security.authority import Authority

    with Authority.opened(directory) as authority:
        authority.change_policy(authority.policy.without_token(name), "token revoke", name)
    click.echo(json.dumps({"name": name, "revoked": True}) if as_json else f"revoked {name!r}; bring it to the nodes: splitnet token push")


@token.command()
@directory_option
@click.option("--cluster", "where", type=click.Path(dir_okay=False, path_type=Path), required=True, help="cluster.toml, or a plan.")
@json_option
@click.pass_context
def push(ctx: click.Context, directory: Path, where: Path, as_json: bool) -> None:
    """Bring tokens, revocations and limits to the nodes, which apply them at once, to calls under way, too.

    Exit status 1 when a node could not be told.

    \b
    Example:
      splitnet token push --cluster cluster.toml
    """
    from splitnet.cluster import Cluster
    from splitnet.plan import Plan
    from splitnet.security.authority import Authority
    from splitnet.security.pushing import push_policy
    from splitnet.security.signing import POLICY

    nodes = Plan.load(where) if where.suffix == ".json" else Cluster.load(where)
    with Authority.opened(directory) as authority:
        data = authority.policy.to_json()
        signature = authority.signing_key().sign(POLICY, hashlib.sha256(data).hexdigest())
    told = push_policy(nodes, data, signature)
    if as_json:
        click.echo(json.dumps([{"node": t.node, "error": t.error, "calls_ended": t.calls_ended} for t in told]))
    else:
        for t in told:
            click.echo(f"{t.node}: {t.error or 'has it' + (f', {t.calls_ended} calls ended' if t.calls_ended else '')}", err=bool(t.error))
    if any(t.error for t in told):
        ctx.exit(1)
