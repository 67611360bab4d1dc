"""`splitnet deploy`, `splitnet rollback`, `splitnet bundle`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from splitnet.batching import Batching
from splitnet.commands.showing import print_table, size_text, where_of
from splitnet.plan import Plan

if TYPE_CHECKING:
    from collections.abc import Callable

    from splitnet.install import Deployed
    from splitnet.installation import Progress
    from splitnet.rollout import Updated

__all__ = ["bundle", "deploy", "rollback"]

_FILE = click.Path(dir_okay=False, path_type=Path)


class Duration(click.ParamType[float]):
    """Seconds, from "2ms", "0.5s" or "0.5"."""

    name = "duration"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        text = str(value).strip()
        number, factor = (text[:-2], 1e-3) if text.endswith("ms") else (text.removesuffix("s"), 1.0)
        try:
            seconds = float(number) * factor
        except ValueError:
            seconds = math.nan
        if not 0 <= seconds < math.inf:
            self.fail(f"{text!r} is not a time such as 2ms or 0.5s", param, ctx)
        return seconds


class Percentage(click.ParamType[float]):
    """A share, from "10%" or "0.1"."""

    name = "percentage"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        text = str(value).strip()
        number, factor = (text[:-1], 0.01) if text.endswith("%") else (text, 1.0)
        try:
            share = float(number) * factor
        except ValueError:
            share = math.nan
        if not 0 < share <= 1:
            self.fail(f"{text!r} is not a share such as 10% or 0.1", param, ctx)
        return share


@click.command()
@click.argument("plan", type=_FILE, required=False)
@click.option("--name", default="", help="The deployment's name; made of the model's if not given.")
@click.option(
    "--shards", type=click.Path(path_type=Path), help="Where the shards are, one folder (or .zip) per stage.  [default: PLAN.shards]"
)
@click.option("--bundle", "bundle_file", type=_FILE, help="A file that `splitnet bundle` wrote, in place of PLAN and its shards.")
@click.option("--update", is_flag=True, help="Put the plan in the place of the one that is deployed under that name, without a gap.")
@click.option(
    "--canary",
    type=Percentage(),
    help="With --update: only this share of the new requests, such as 10%; again with more, or without, to go on.",
)
@click.option(
    "--cluster", "where", type=_FILE, help="With --update: where else to look for what is deployed: cluster.toml, or the older plan."
)
@click.option(
    "--no-keep", is_flag=True, help="With --update: take the older plan off once its requests are done; nothing is left to roll back to."
)
@click.option(
    "--replace",
    is_flag=True,
    help="With --update: where both do not fit into memory, take the older one off first, and refuse requests meanwhile.",
)
@click.option("--force", is_flag=True, help="With --update: even where inputs or outputs are others. Clients must connect again.")
@click.option(
    "--drain",
    "drain_s",
    type=Duration(),
    default="30s",
    show_default=True,
    help="With --update: how long requests of what is taken off may still take.",
)
@click.option(
    "--max-batch",
    type=click.IntRange(min=1),
    help="Join small requests, of any clients, up to this many rows. Only for models that treat each row of a batch by itself.  [default: as the plan says, else 1]",
)
@click.option(
    "--max-delay", type=Duration(), help="How long a request may wait to be joined, such as 2ms.  [default: 0: only what waits anyway]"
)
@click.option(
    "--microbatch",
    type=click.IntRange(min=0),
    help="Send requests of more rows through the pipeline in pieces of this many, for the same kind of models.  [default: as the plan says, else 0: whole]",
)
@click.option(
    "--sessions",
    type=click.IntRange(1),
    help="How many requests at once (of a model that generates: sessions of full length, with their caches) it reserves on its nodes.  [default: as the plan says]",
)
@click.option("--exclusive", is_flag=True, help="Reserve the nodes' threads: they take no other deployment beside this one.")
@click.option("--fixed-codecs", is_flag=True, help="Keep the plan's codecs, whatever becomes of the links.")
@click.option(
    "--draft",
    default="",
    help="Of a model that generates: the deployment of a small model with the same vocabulary, whole on the first stage's node, that guesses what comes next.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def deploy(
    plan: Path | None,
    name: str,
    shards: Path | None,
    bundle_file: Path | None,
    update: bool,
    canary: float | None,
    where: Path | None,
    no_keep: bool,
    replace: bool,
    force: bool,
    drain_s: float,
    max_batch: int | None,
    max_delay: float | None,
    microbatch: int | None,
    sessions: int | None,
    exclusive: bool,
    fixed_codecs: bool,
    draft: str,
    as_json: bool,
) -> None:
    """Ship the shards of a PLAN to its nodes, verify and activate them.

    A node that holds a part already is not sent it again, and an upload that broke off goes on where it stopped. Either all nodes
    serve the plan in the end, or none does.

    With --update the plan takes the place of the one that serves under that name: it is loaded beside it, new requests go to it at once,
    those under way are finished by the old one, and `splitnet rollback` goes back.

    A batch that was joined or divided may differ in the last bits from the same rows asked for in one request: kernels round
    differently for other sizes.

    \b
    Example: what `splitnet plan ... -o plan.json` has left here
      splitnet deploy plan.json --name search
    Example: many clients with small requests
      splitnet deploy plan.json --max-batch 16 --max-delay 2ms
    Example: a new version, first for every tenth request
      splitnet deploy new.json --name search --update --canary 10%
      splitnet deploy new.json --name search --update
    """
    if plan is None and bundle_file is None:
        raise click.UsageError("Missing argument 'PLAN' (or --bundle FILE).")
    if plan is not None and bundle_file is not None:
        raise click.UsageError("a bundle holds its plan: give PLAN or --bundle, one of them")
    if bundle_file is not None and shards is not None:
        raise click.UsageError("a bundle holds its shards: leave out --shards")
    given = {"--canary": canary, "--cluster": where, "--no-keep": no_keep, "--replace": replace, "--force": force}
    if not update and (alone := [flag for flag, value in given.items() if value]):
        raise click.UsageError(f"{alone[0]} goes with --update")
    with _material(plan, shards, bundle_file) as (loaded, opened):
        loaded = loaded.with_fixed_codecs() if fixed_codecs else loaded
        loaded = loaded.reserving(sessions or loaded.sessions, exclusive=exclusive or loaded.exclusive)
        loaded = loaded.with_draft(draft) if draft else loaded
        batching = _batching(loaded.batching, max_batch, max_delay, microbatch)
        if not update:
            _deploy(loaded, opened, name, batching, as_json)
            return
        from splitnet.install import checked_name, default_name
        from splitnet.rollout import update as put_in_place

        with _progress() as on_progress:
            updated = put_in_place(
                loaded, opened, name=checked_name(name or default_name(loaded.model)), where=where_of(where) if where else None,
                canary=canary or 1.0, keep=not no_keep, force=force, replace=replace, drain_s=drain_s, batching=batching, on_progress=on_progress,
            )  # fmt: skip
    _show_update(updated, loaded, as_json)


@click.command()
@click.argument("name")
@click.option("--cluster", "where", type=_FILE, required=True, help="cluster.toml, or a plan of the deployment.")
@click.option(
    "--drain", "drain_s", type=Duration(), default="30s", show_default=True, help="How long requests of what is taken off may still take."
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def rollback(name: str, where: Path, drain_s: float, as_json: bool) -> None:
    """Undo the last update of the deployment NAME: give up a canary, or serve the plan again that served before.

    No request fails for it: those under way are finished by the plan that they began with.

    \b
    Example: the new version was not better
      splitnet rollback search --cluster cluster.toml
    """
    from splitnet.rollout import go_back

    back = go_back(where_of(where), name, drain_s=drain_s)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(back), indent=1, sort_keys=True))
        return
    click.echo(
        f"{back.name!r} is served by generation {back.generation} again; generation {back.before} was taken off: send requests to {back.ingress}"
    )
    _show_cancelled(back)


@click.command()
@click.argument("plan", type=_FILE)
@click.option("-o", "--output", type=_FILE, required=True, help="The file to write, such as model.splitnet.")
@click.option(
    "--shards", type=click.Path(path_type=Path), help="Where the shards are, one folder (or .zip) per stage.  [default: PLAN.shards]"
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def bundle(plan: Path, output: Path, shards: Path | None, as_json: bool) -> None:
    """Put a PLAN and its shards into one file, for where there is no network.

    Every byte in it is known by its sha256; `splitnet deploy --bundle FILE` checks all of it before it ships anything. An operator's signatures on the shards
    go into it, where your credentials have the key.

    \b
    Example: to a stick, and on the other side
      splitnet bundle plan.json -o /media/stick/model.splitnet
      splitnet deploy --bundle /media/stick/model.splitnet --update
    """
    from splitnet.bundle import write_bundle
    from splitnet.preflight import open_shards
    from splitnet.security.credentials import sign_shards

    loaded = Plan.load(plan)
    opened = open_shards(loaded, shards or plan.with_suffix(".shards"))
    signatures = sign_shards(shard.sha256 for shard in opened.values())
    size_bytes = write_bundle(loaded, opened, output, signatures=signatures).stat().st_size
    if as_json:
        click.echo(json.dumps({"file": str(output), "size_bytes": size_bytes, "stages": [stage.name for stage in loaded.stages]}))
    else:
        click.echo(f"wrote {output}: {size_text(size_bytes)}, {len(loaded.stages)} stages of {loaded.model}")


@contextmanager
def _material(plan: Path | None, shards: Path | None, bundle_file: Path | None) -> Iterator[tuple[Plan, Mapping[str, Any] | Path]]:
    with contextlib.ExitStack() as stack:
        if bundle_file is not None:
            from splitnet.bundle import open_bundle
            from splitnet.security.credentials import know_signatures

            opened = stack.enter_context(open_bundle(bundle_file))
            know_signatures(opened.signatures)
            yield opened.plan, opened.shards
        else:
            assert plan is not None
            yield Plan.load(plan), shards or plan.with_suffix(".shards")


def _batching(planned: Batching, max_batch: int | None, max_delay: float | None, microbatch: int | None) -> Batching:
    return Batching(
        planned.max_batch if max_batch is None else max_batch,
        planned.max_delay_s if max_delay is None else max_delay,
        planned.microbatch if microbatch is None else microbatch,
    )


def _deploy(plan: Plan, shards: Mapping[str, Any] | Path, name: str, batching: Batching, as_json: bool) -> None:
    from splitnet.install import deploy as install

    with _progress() as on_progress:
        deployed = install(plan, shards, name=name, batching=batching, on_progress=on_progress)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(deployed), indent=1, sort_keys=True))
        return
    click.echo(f"deployed {deployed.name!r}: send requests to {deployed.ingress}")
    for reason in deployed.not_taken:
        click.echo(f"sent from here, for it could not be taken from there: {reason}", err=True)
    _show_nodes(plan, deployed)


def _show_update(updated: Updated, plan: Plan, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(updated), indent=1, sort_keys=True))
        return
    if not updated.changed:
        click.echo(f"{updated.name!r} serves this plan already, as generation {updated.generation}")
        return
    if updated.share < 1:
        click.echo(
            f"{updated.name!r}: generation {updated.generation} gets {updated.share * 100:g}% of the new requests, generation {updated.before} the others; "
            f"deploy it again without --canary to go on, or `splitnet rollback {updated.name}`"
        )
    else:
        kept = f"generation {updated.kept} is kept for `splitnet rollback`" if updated.kept else "nothing is kept to roll back to"
        click.echo(f"updated {updated.name!r} to generation {updated.generation}: send requests to {updated.ingress}; {kept}")
    _show_cancelled(updated)
    _show_nodes(plan, updated)


def _show_cancelled(updated: Updated) -> None:
    if updated.cancelled:
        click.echo(f"{updated.cancelled} requests were cancelled: they were not done within --drain", err=True)


def _show_nodes(plan: Plan, done: Deployed | Updated) -> None:
    rows: list[Sequence[str]] = [("node", "stages", "sent", "from other nodes", "loaded in")]
    for node, sent in done.sent_bytes.items():
        stages = ", ".join(stage.name for stage in plan.stages if stage.node == node)
        taken = done.taken_bytes.get(node, 0)
        rows.append(
            (node, stages, size_text(sent) if sent else "nothing new", size_text(taken) if taken else "", f"{done.load_s[node]:.2f} s")
        )
    print_table(rows)


@contextmanager
def _progress() -> Iterator[Callable[[Progress], None] | None]:
    """A bar on a terminal (stderr, so that the result can be piped); nothing elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    labels = {"ship": "shipping", "activate": "activating", "switch": "switching", "drain": "draining"}
    with click.progressbar(length=0, label="shipping", file=sys.stderr, show_pos=False, item_show_func=lambda item: item) as bar:

        def on_progress(progress: Progress) -> None:
            bar.length = max(1, progress.total_bytes)
            bar.label = labels[progress.phase].ljust(10)
            bar.update(
                progress.held_bytes - bar.pos, f"{progress.node}  {size_text(progress.held_bytes)} of {size_text(progress.total_bytes)}"
            )

        yield on_progress
