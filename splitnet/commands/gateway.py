"""`splitnet gateway` and `splitnet keys`."""

from __future__ import annotations

from pathlib import Path

import click

from splitnet.errors import BadInput

__all__ = ["gateway", "keys"]

_MIB = 1 << 20


@click.command()
@click.argument("plans", metavar="[NAME=]PLAN...", nargs=-1, required=True)
@click.option("--listen", default="127.0.0.1:8000", show_default=True, metavar="HOST:PORT", help="Where to serve; port 0 takes a free one.")
@click.option(
    "--tokenizer",
    type=click.Path(file_okay=False, path_type=Path),
    help="Directory of the model's tokenizer.json.  [default: where the plan's model was read from]",
)
@click.option(
    "--chat-template", type=click.Path(dir_okay=False, path_type=Path), help="A Jinja file, for a model without one, or in its place."
)
@click.option("--deployment", default="", help="The deployment's name.  [default: the one of the plan]")
@click.option(
    "--keys",
    "key_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Ask callers for one of the keys in this file, which `splitnet keys` makes.",
)
@click.option("--tls-cert", type=click.Path(dir_okay=False, path_type=Path), help="Certificate (PEM) to serve HTTPS with.")
@click.option("--tls-key", type=click.Path(dir_okay=False, path_type=Path), help="Its private key.")
@click.option("--insecure", is_flag=True, help="Allow an address that other machines reach without TLS. Keys are needed still.")
@click.option(
    "--max-requests", type=click.IntRange(1), default=64, show_default=True, help="Answers under way at once; more are refused with 429."
)
@click.option(
    "--max-body", "max_body_mib", type=click.IntRange(1, 1024), default=4, show_default=True, metavar="MIB", help="The largest request."
)
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0, min_open=True),
    default=600.0,
    show_default=True,
    metavar="SECONDS",
    help="What one answer may take.",
)
@click.option("--quiet", is_flag=True, help="Say nothing of requests.")
@click.option("--announce", type=click.Path(dir_okay=False, path_type=Path), help="Write the URL to this file once it serves.")
def gateway(
    plans: tuple[str, ...],
    listen: str,
    tokenizer: Path | None,
    chat_template: Path | None,
    deployment: str,
    key_file: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    insecure: bool,
    max_requests: int,
    max_body_mib: int,
    timeout_s: float,
    quiet: bool,
    announce: Path | None,
) -> None:
    """Serve deployed decoder models by OpenAI's HTTP interface: /v1/models, /v1/completions, /v1/chat/completions, streamed or not, and /healthz and /readyz.

    A model's name is its deployment's, or NAME. It serves until it gets SIGTERM or Ctrl-C, then finishes what is under way.

    \b
    Examples:
      splitnet gateway plan.json
      splitnet keys create laptop
      splitnet gateway plan.json --listen 0.0.0.0:8443 --keys ~/.config/splitnet/gateway-keys.json --tls-cert cert.pem --tls-key key.pem
    """
    import asyncio

    import uvicorn  # noqa: F401 - a missing extra is told before anything begins

    from splitnet.gateway.asgi import Limits
    from splitnet.gateway.opening import ModelSource
    from splitnet.gateway.running import run_gateway
    from splitnet.gateway.server import GatewayConfig

    if len(plans) > 1 and (tokenizer or chat_template or deployment):
        raise BadInput(
            "--tokenizer, --chat-template and --deployment are for one PLAN", remedy="start a gateway for each, or leave them out"
        )
    config = GatewayConfig(listen, key_file is not None, tls_cert, tls_key, insecure)
    limits = Limits(max_body_bytes=max_body_mib * _MIB, max_requests=max_requests, generation_s=timeout_s)
    sources = [ModelSource.parse(plan, deployment, tokenizer, chat_template) for plan in plans]

    def say(line: str) -> None:
        click.echo(line, err=True)

    asyncio.run(run_gateway(sources, config, limits, key_file, say, requests=not quiet, announce=announce))


@click.group()
def keys() -> None:
    """Make, list and revoke the API keys of a gateway. A running gateway follows at once.

    \b
    Examples:
      splitnet keys create laptop
      splitnet keys list
      splitnet keys revoke laptop
    """


_FILE = click.option(
    "--keys", "path", type=click.Path(dir_okay=False, path_type=Path), help="The file.  [default: ~/.config/splitnet/gateway-keys.json]"
)


@keys.command()
@click.argument("name")
@_FILE
def create(name: str, path: Path | None) -> None:
    """Make a key and print it, this one time: the file keeps its hash only."""
    from splitnet.gateway.keys import KeyFile, default_key_file

    file = KeyFile(path or default_key_file())
    click.echo(file.create(name))
    click.echo(f"Kept as a hash in {file.path}; it cannot be shown again. Give it to clients as their API key.", err=True)


@keys.command("list")
@_FILE
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_keys(path: Path | None, as_json: bool) -> None:
    """Print whose keys there are."""
    import json

    from splitnet.gateway.keys import KeyFile, default_key_file

    found = KeyFile(path or default_key_file()).keys()
    if as_json:
        click.echo(json.dumps([{"name": key.name, "created": key.created} for key in found]))
        return
    for key in found:
        click.echo(f"{key.name:24} {key.created}")


@keys.command()
@click.argument("name")
@_FILE
def revoke(name: str, path: Path | None) -> None:
    """Take a key away."""
    from splitnet.gateway.keys import KeyFile, default_key_file

    KeyFile(path or default_key_file()).revoke(name)
    click.echo(f"{name} is revoked")
