"""Pictures of a plan: `draw(plan, "plan.html")`, or `.svg`, or `.png`.

What is drawn: the model's graph by stages with the bytes on the cuts; the timeline that the simulator plays; the front of latency against
throughput; the best cut against bandwidth. The last two plan anew, so they need the profile and the cluster; the timeline needs
the cluster's links. What cannot be drawn is left out, and the picture says so.

matplotlib draws (its file backends, no window): it is maintained, ships its own letters, writes SVG with real text and PNG without a
system library, and knows logarithmic axes. It is imported when something is drawn.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from partitioner.drawing.studies import Planner
from partitioner.profiling import Profile
from splitnet.cluster import Cluster
from splitnet.errors import BadInput, BadPlan, MissingExtra
from splitnet.plan import Plan

__all__ = ["FORMATS", "check_path", "draw"]

FORMATS = (".html", ".png", ".svg")


def check_path(path: str | Path) -> str:
    """The format of a picture of that name. Raises BadInput for one that is not known or a folder that is not there, MissingExtra where
    nothing here can draw. To be asked before long work whose result is to be drawn."""
    target = Path(path)
    suffix = target.suffix.lower()
    if suffix not in FORMATS:
        raise BadInput(f"cannot draw into {target.name!r}: a picture's name ends in {', '.join(FORMATS)}", remedy="name it plan.html, say")
    if not target.parent.is_dir():
        raise BadInput(f"cannot draw into {str(target)!r}: there is no folder {str(target.parent)!r}", remedy="make the folder first")
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtra("drawing needs matplotlib, which is not installed", remedy="pip install 'splitnet[draw]'")
    return suffix


def draw(
    plan: Plan,
    path: str | Path,
    *,
    profile: Profile | None = None,
    cluster: Cluster | None = None,
    planner: Planner | None = None,
    shown: Plan | None = None,
) -> None:
    """Draws a plan into a file; the suffix says the format: an HTML page that needs nothing else, one SVG, or one PNG.

    profile: what the plan was made from. cluster: where it is to run. planner: how the plans that it is compared with are made
    (default: `partitioner.plan`; bind your constraints to it). shown: the plan whose transfers the pictures show, where they are others than what goes
    over a link at once.
    Raises what `check_path` raises, BadPlan for the profile of another model, BadCluster where the cluster lacks a node of the plan.
    """
    suffix = check_path(path)
    if profile is not None and plan.model_sha256 != profile.structure.sha256:
        raise BadPlan(f"the profile is of another model ({profile.structure.name}) than the plan ({plan.model})")
    if cluster is not None:
        for node in plan.nodes:
            cluster.node(node.name)
    from partitioner.drawing.pages import compose, html_page, pictures

    found = pictures(shown or plan, profile, cluster, planner)
    Path(path).write_bytes(html_page(plan, found) if suffix == ".html" else compose(plan, found, "svg" if suffix == ".svg" else "png"))
