"""`splitnet watch`."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from partitioner.options import FILE, Share, progress_bar, say
from partitioner.watching import Rules
from partitioner.wishes import wish_options, wishes
from splitnet.cluster import Cluster
from splitnet.errors import BadInput
from splitnet.explain import seconds_text
from splitnet.plan import Plan

if TYPE_CHECKING:
    from partitioner.rescheduling import Look, Watch

__all__ = ["watch"]

_DEFAULT = Rules()


@click.command()
@click.argument("plan", type=FILE)
@click.option("--cluster", "cluster_file", type=FILE, required=True, help="The cluster file: all nodes that may be used.")
@click.option("--profile", "profile_file", type=FILE, required=True, help="The profile that the plan was made from.")
@click.option("--model", default="", help="What new plans are cut from: as for `splitnet plan`.  [default: what PLAN was made of]")
@click.option("--name", default="", help="The deployment's name.  [default: the one of this plan]")
@click.option(
    "--every", "every_s", type=click.FloatRange(min=0.1, max=3600), default=2.0, show_default=True, help="Seconds between two looks."
)
@click.option("--gain", type=Share(), default=f"{_DEFAULT.margin:.0%}", show_default=True, help="By how much another plan must be better.")
@click.option(
    "--steady",
    "steady_s",
    type=click.FloatRange(min=0),
    default=_DEFAULT.steady_s,
    show_default=True,
    help="For how many seconds without a break.",
)
@click.option(
    "--pause",
    "pause_s",
    type=click.FloatRange(min=0),
    default=_DEFAULT.pause_s,
    show_default=True,
    help="Seconds after a switch without another; twice as many each time that it went back.",
)
@click.option(
    "--probe",
    "probe_s",
    type=click.FloatRange(min=0),
    default=30.0,
    show_default=True,
    help="How often a link that was slow and is not used now is probed, in seconds; 0: never.",
)
@click.option("--move-ingress", is_flag=True, help="Another node may take the requests: clients are sent there.")
@click.option("--for", "for_s", type=click.FloatRange(min=0), help="Stop after so many seconds.  [default: never]")
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing. Needs no model, but where text is generated.")
@click.option(
    "--weights",
    type=click.Choice(["auto", "float32", "bfloat16", "int8", "int4"]),
    help="Of a model that generates: the format of new plans' matrices.  [default: as PLAN has them]",
)
@wish_options
@click.option("--json", "as_json", is_flag=True, help="Print each look as a line of JSON.")
def watch(
    plan: Path, cluster_file: Path, profile_file: Path, model: str, name: str, every_s: float, gain: float, steady_s: float, pause_s: float,
    probe_s: float, move_ingress: bool, for_s: float | None, dry_run: bool, weights: str | None, as_json: bool, **others: Any,
) -> None:  # fmt: skip
    """Follow a deployed PLAN, and switch to a better one when there is one for long enough.

    Looks at what the nodes measure while they serve: the goodput of links, the times of stages, who is there. When another plan is predicted to
    be better by --gain for --steady seconds, its shards are cut and loaded beside the old ones, new requests go to it, and those under way are
    finished: none fails. It does not flap: after a switch there is a pause, which doubles each time that it goes back. New plans are kept beside
    PLAN, in PLAN.watch/. The other options are those of `splitnet plan`, and should be the same.

    \b
    Example: as long as it runs
      splitnet watch plan.json --cluster cluster.toml --profile model.profile.json
    Example: what would it do
      splitnet watch plan.json --cluster cluster.toml --profile model.profile.json --dry-run --for 60
    """
    from partitioner.followers import CapturedFollower
    from partitioner.profiling import Profile
    from partitioner.rescheduling import Watch
    from splitnet import background
    from splitnet.install import default_name

    asked = wishes(others)
    if asked.get("max_accuracy_loss") or asked.get("at"):
        raise BadInput(
            "--max-accuracy-loss and --at hold for one plan, and not for those that follow it",
            remedy="leave them out: new plans use codecs without loss, or that round as bfloat16 does",
        )
    planned, cluster = Plan.load(plan), Cluster.load(cluster_file)
    named: dict[str, Any] = {
        "folder": plan.with_suffix(".watch"), "rules": Rules(margin=gain, steady_s=steady_s, pause_s=pause_s), "asked": asked, "move_ingress": move_ingress,
        "probe_s": probe_s, "on_switch": lambda new: say(f"cutting and loading {len(new.stages)} stages"),
    }  # fmt: skip
    called = name or default_name(planned.model)
    follow: Watch[Any]
    if planned.generation is not None:
        from partitioner.decoders.figures import DecoderProfile
        from partitioner.decoders.follower import DecoderFollower

        measured = DecoderProfile.load(profile_file)
        decoder = _load_decoder(model or planned.generation.tokenizer)
        follow = Watch(called, cluster, measured, follower=DecoderFollower(decoder, measured, weights=weights or "", dry=dry_run), **named)
    else:
        if weights is not None:
            raise BadInput("--weights is for models that generate", remedy="leave it away")
        profile = Profile.load(profile_file)
        graph = None if dry_run else _load(model or planned.model, profile)
        follow = Watch(called, cluster, profile, follower=CapturedFollower(graph, profile), **named)
    follow.lease_s += every_s  # what it tells the ingress holds until the next look
    try:
        _follow(follow, background.run, every_s, for_s, as_json)
    except KeyboardInterrupt:
        say("stopped")


def _follow(follow: Watch[Any], run: Any, every_s: float, for_s: float | None, as_json: bool) -> None:
    began = time.monotonic()
    last = ""
    while True:
        started = time.monotonic()
        look = run(follow.look())
        if as_json:
            click.echo(json.dumps(_document(look)))
        elif (line := _line(look)) != last or look.switched is not None:
            click.echo(f"{time.strftime('%H:%M:%S')}  {line}")
            last = line
        if for_s is not None and time.monotonic() - began >= for_s:
            return
        time.sleep(max(every_s - (time.monotonic() - started), 0.0))


def _load(model: str, profile: Any) -> Any:
    import partitioner
    from partitioner.resizing import at_sizes

    say(f"capturing {model}")
    return at_sizes(partitioner.load_model(model), profile.structure.symbols)


def _load_decoder(model: str) -> Any:
    """Reads every weight once, to know that it is the deployed model."""
    from partitioner.decoders.model import load_decoder

    with progress_bar("reading the model") as advance:
        return load_decoder(model.removeprefix("hf:"), lambda done, total: advance(done, total, ""))


def _line(look: Look) -> str:
    if look.error:
        return f"generation {look.generation}: {look.error}"
    parts = [f"generation {look.generation}: {_seconds(look.present_s)}, best {_seconds(look.best_s)}: {look.why}"]
    parts += list(look.changed)
    if look.probed:
        parts.append(f"probed {', '.join(look.probed)}")
    if look.would and look.best is not None:
        parts.append(f"would switch to {_stages(look.best)}")
    if look.switched is not None and look.best is not None:
        parts.append(f"switched to generation {look.switched.generation}: {_stages(look.best)}")
    return "; ".join(parts)


def _stages(plan: Plan) -> str:
    return ", ".join(f"{stage.node}: {stage.first or stage.operators[0]}..{stage.last or stage.operators[-1]}" for stage in plan.stages)


def _seconds(seconds: float) -> str:
    return "cannot serve" if math.isinf(seconds) else seconds_text(seconds)


def _document(look: Look) -> dict[str, Any]:
    def figure(value: float) -> float | None:
        return value if math.isfinite(value) else None

    return {
        "generation": look.generation,
        "present_s": figure(look.present_s),
        "best_s": figure(look.best_s),
        "gain": figure(look.gain),
        "why": look.why,
        "changed": list(look.changed),
        "planning_s": look.planning_s,
        "probed": list(look.probed),
        "would_switch": look.would,
        "switched": dataclasses.asdict(look.switched) if look.switched else None,
        "error": look.error,
        "best": [{"node": s.node, "operators": len(s.operators), "first": s.first, "last": s.last} for s in look.best.stages]
        if look.best
        else None,
    }
