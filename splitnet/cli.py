"""The `splitnet` command: finds the subcommands, and turns what goes wrong into one message and an exit status.

A subcommand is a `click.Command` in the entry-point group `splitnet.commands`; nothing is imported but the one that was asked for,
and `splitnet --help` imports none. Exit statuses: 0 done; 1 the system could not do it (`ServiceError`), or a bug; 2 the caller must
change something (`UserError`, wrong usage); 130 interrupted. A command that needs another status calls `ctx.exit(status)`.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import TextIO

import click
from click.shell_completion import CompletionItem, get_completion_class

from splitnet import __version__
from splitnet.errors import BadCluster, BadPlan, BadShard, MissingExtra, SplitnetError

__all__ = ["GROUP", "SUMMARIES", "CommandGroup", "main", "run_command"]

GROUP = "splitnet.commands"

#: One line for each command, in the order of `splitnet --help`, so that the list needs no import of what it lists.
SUMMARIES = {
    "node": "Start a node server.",
    "probe": "Measure nodes and the links between them.",
    "profile": "Measure the operators of a model.",
    "calibrate": "Measure what codecs cost in accuracy, on your samples.",
    "privacy": "Measure what nodes see of samples, and what noise costs.",
    "plan": "Choose the cuts, and cut the model.",
    "bundle": "Put a plan and its shards into one file.",
    "deploy": "Ship shards to the nodes, verify, activate.",
    "rollback": "Undo the last update of a deployment.",
    "generate": "Continue a prompt with a language model.",
    "run": "Send requests, print answers.",
    "chat": "Talk with a deployed language model.",
    "gateway": "Serve language models by OpenAI's HTTP interface.",
    "keys": "Make, list and revoke API keys of a gateway.",
    "status": "Show what each node holds and does.",
    "watch": "Switch to a better plan when there is one.",
    "unload": "Take a deployment off its nodes.",
    "bench": "Put measured figures beside the predicted ones.",
    "demo": "Do all of it on this machine, on real input.",
    "certs": "Make, renew and revoke certificates.",
    "token": "Make, list and revoke tokens; bring them to the nodes.",
    "audit": "See whether an audit log was changed.",
    "doctor": "Is this box fit to be a node?",
    "completion": "Print the completion script of a shell.",
}

#: Which extra brings a module that is missing. torch is needed by several: there the command decides.
_EXTRA_OF_MODULE = {
    "grpc_health": "node",
    "grpc_reflection": "node",
    "jinja2": "gateway",
    "matplotlib": "draw",
    "networkx": "planner",
    "psutil": "node",
    "sklearn": "demo",
    "structlog": "node",
    "sympy": "planner",
    "tokenizers": "gateway",
    "transformers": "hf",
    "uvicorn": "gateway",
}
_EXTRA_OF_COMMAND = {"node": "node", "demo": "demo"}
_SHARED_MODULES = ("torch", "safetensors")

_USER_INTERRUPT = 130
_WRONG_USE = 2
_REMEDIES = {  # where an error says what is wrong with a file, and no more
    BadCluster: "correct the cluster file, or measure again with `splitnet probe`",
    BadPlan: "make the plan again with `splitnet plan`",
    BadShard: "cut the model again with `splitnet plan`",
}


@dataclass
class _Settings:
    debug: bool = False
    command: str = ""


class CommandGroup(click.Group):
    """Loads a subcommand when it is chosen."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        found = {*_entry_points(), *self.commands}
        return [name for name in SUMMARIES if name in found] + sorted(found - set(SUMMARIES))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        own = super().get_command(ctx, cmd_name)
        entry_point = _entry_points().get(cmd_name)
        return own if own is not None or entry_point is None else _load(entry_point)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        settings = ctx.find_object(_Settings)
        if settings is not None:
            settings.command = args[0]
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, self._summary(ctx, name)) for name in self.list_commands(ctx)])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        names = [name for name in self.list_commands(ctx) if name.startswith(incomplete)]
        options = click.Command.shell_complete(self, ctx, incomplete)
        return [CompletionItem(name, help=self._summary(ctx, name)) for name in names] + options

    def _summary(self, ctx: click.Context, name: str) -> str:
        if name in SUMMARIES:
            return SUMMARIES[name]
        command = self.get_command(ctx, name)  # another distribution's
        return command.get_short_help_str(limit=80) if command is not None else ""


def _entry_points() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def _load(entry_point: EntryPoint) -> click.Command:
    command = entry_point.load()
    if not isinstance(command, click.Command):
        raise TypeError(f"entry point {entry_point.name!r} of {GROUP} is {type(command).__name__}, expected a click.Command")
    return command


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="splitnet", message="%(prog)s %(version)s")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.option(
    "--certs",
    type=click.Path(file_okay=False),
    default=None,
    help="The folder with your certificate.  [default: SPLITNET_CERTS, or ~/.config/splitnet/certs]",
)
@click.option("--insecure", is_flag=True, help="Speak plaintext to other machines, too; also SPLITNET_INSECURE=1.")
@click.pass_context
def cli(ctx: click.Context, debug: bool, certs: str | None, insecure: bool) -> None:
    """Split a model over several machines, where measurements say that it pays, and serve it as one.

    \b
    Example: a cut in three on this machine, from capture to answers
      splitnet demo

    \b
    Example: two boxes
      splitnet certs init && splitnet certs issue attic --address HOST          (a folder for each box, see splitnet certs)
      splitnet node --listen 0.0.0.0:7001 --certs attic                         (on each box)
      splitnet --certs certs/operator probe --node HOST:7001 --node HOST:7002 -o cluster.toml
      splitnet plan py:shop.model:build --cluster cluster.toml -o plan.json
      splitnet deploy plan.json
    """
    settings = ctx.ensure_object(_Settings)
    settings.debug = debug
    if certs is not None or insecure:
        from splitnet.security.addresses import INSECURE
        from splitnet.security.credentials import use_access

        if certs is not None and insecure:
            raise click.UsageError("--certs and --insecure exclude each other")
        use_access(INSECURE if certs is None else certs)


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "fish", "zsh"]))
def completion(shell: str) -> None:
    """Print the completion script of a shell.

    \b
    Example: for bash, zsh and fish
      splitnet completion bash > ~/.local/share/bash-completion/completions/splitnet
      splitnet completion zsh > "${fpath[1]}/_splitnet"
      splitnet completion fish > ~/.config/fish/completions/splitnet.fish
    """
    cls = get_completion_class(shell)
    if cls is None:  # click knows all three
        raise click.UsageError(f"no completion for {shell!r}")
    click.echo(cls(cli, {}, "splitnet", "_SPLITNET_COMPLETE").source())


def main(args: Sequence[str] | None = None) -> int:
    """Runs `splitnet` with these arguments (default: the process's) and returns the exit status. Never raises but SystemExit."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what it has to say (a peer's goodbye, a port in use) is said by us
    return run_command(cli, args, prog_name="splitnet")


def run_command(command: click.Command, args: Sequence[str] | None = None, *, prog_name: str | None = None) -> int:
    """Runs a command. Errors go to stderr: one message for what was foreseen, one line for a bug (its traceback with --debug)."""
    settings = _Settings()
    with warnings.catch_warnings():
        _tidy_warnings()
        try:
            result = command.main(list(args) if args is not None else None, prog_name=prog_name, standalone_mode=False, obj=settings)
        except click.Abort as abort:
            return _USER_INTERRUPT if isinstance(abort.__cause__, KeyboardInterrupt) else 1
        except click.ClickException as error:
            error.show()
            return error.exit_code
        except BaseExceptionGroup as group:
            return _report(_first_cause(group), settings)
        except Exception as error:  # noqa: BLE001 - the outermost frame: everything is reported, nothing goes on
            return _report(error, settings)
    return result if isinstance(result, int) and not isinstance(result, bool) else 0


def _report(error: BaseException, settings: _Settings) -> int:
    if isinstance(error, KeyboardInterrupt):
        return _USER_INTERRUPT
    if isinstance(error, ModuleNotFoundError):
        error = _missing_extra(error, settings.command) or error
    if settings.debug:
        traceback.print_exception(error)
    if isinstance(error, SplitnetError):
        if error.exit_status == _WRONG_USE and not error.remedy:
            known = (remedy for kind, remedy in _REMEDIES.items() if isinstance(error, kind))
            error.remedy = next(
                known, f"correct it; `splitnet {settings.command} --help` says what is expected" if settings.command else ""
            )
        _complain(str(error))
        return error.exit_status
    if isinstance(error, OSError) and error.filename is not None:
        _complain(f"{error.filename}: {error.strerror}")
        return 1
    hint = "" if settings.debug else ", rerun as `splitnet --debug ...` for the traceback"
    first = (str(error).splitlines() or [""])[0]
    _complain(f"internal error: {type(error).__name__}: {first} (this is a bug in splitnet: please report it{hint})")
    return 1


def _complain(message: str) -> None:
    click.echo(click.style("error:", fg="red", bold=True) + " " + message, err=True)


def _first_cause(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """What to tell the user of a group: our own error where there is one, else the first leaf."""
    leaves: list[BaseException] = []
    pending: list[BaseException] = [group]
    while pending:
        error = pending.pop(0)
        if isinstance(error, BaseExceptionGroup):
            pending = [*error.exceptions, *pending]
        else:
            leaves.append(error)
    return next((leaf for leaf in leaves if isinstance(leaf, SplitnetError)), leaves[0])


def _missing_extra(error: ModuleNotFoundError, command: str) -> MissingExtra | None:
    module = (error.name or "").partition(".")[0]
    extra = _EXTRA_OF_MODULE.get(module)
    if module in _SHARED_MODULES:
        extra = _EXTRA_OF_COMMAND.get(command, "planner")
    if extra is None:
        return None
    wanted = f"`splitnet {command}`" if command else "this command"
    return MissingExtra(f"{wanted} needs {module}, which is not installed", remedy=f"pip install 'splitnet[{extra}]'")


def _tidy_warnings() -> None:
    """Libraries' warnings are for programmers; ours are for the user, on one line. `python -W` still decides."""
    if sys.warnoptions:
        return
    warnings.simplefilter("ignore")
    warnings.filterwarnings("default", module=r"(splitnet|partitioner|nodes)(\.|$)")

    def show(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None, line: str | None = None
    ) -> None:
        click.echo(f"warning: {message}", err=True)

    warnings.showwarning = show
