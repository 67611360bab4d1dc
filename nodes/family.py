"""Which generation of a deployment takes a new call. A family is all generations of one name, as this node knows them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from nodes.deployment import Deployment
from nodes.records import FamilyRecord
from splitnet.errors import AlreadyExists, BadInput, Moved, NotFound, Overloaded
from splitnet.generations import generation_key, parse_key

__all__ = ["Families", "Family"]

_GOLDEN = (math.sqrt(5) - 1) / 2  # its multiples, modulo 1, are spread evenly: any run of calls holds close to the canary's share
_RESTORED_S = 0.5  # after which to ask again for what is being restored


@dataclass(eq=False)
class Family:
    """`active` takes the new calls (0: none does), but for a `share` of them that `canary` takes; `kept` was active before. A node may hold
    some of these only, or none: then `address` says where the active one's ingress is. Calls that were admitted stay with their generation."""

    name: str
    generations: dict[int, Deployment] = field(default_factory=dict)  # of this node
    active: int = 0
    canary: int = 0
    share: float = 0.0
    kept: int = 0
    address: str = ""
    entered_here: bool = False  #: it was this node that took the clients' requests, once, or it would: clients are sent on
    term: int = 0  #: counts the switches: whoever has seen more of them knows better which one is active
    _point: float = 0.0

    def state(self, generation: int) -> str:
        if generation in self.generations and self.generations[generation].draining:
            return "draining"
        return {self.kept: "kept", self.canary: "canary", self.active: "active"}.get(generation, "loaded")

    @property
    def ingress_address(self) -> str:
        """Of the active generation; "" where it is not known."""
        held = self.generations.get(self.active)
        return held.ingress.address if held is not None else self.address

    @property
    def takes_requests(self) -> bool:
        held = self.generations.get(self.active)
        return held is not None and held.is_ingress

    def only_other(self, generation: int) -> int:
        """What a node holds besides that it was given after the switch that put it out of use; 0 where that is not one."""
        others = [number for number in self.generations if number not in (generation, self.canary)]
        return others[0] if len(others) == 1 else 0

    def next_call(self) -> Deployment:
        """Where a new call goes. Raises Moved where it must go to another node, NotFound where this node never took the requests."""
        number = self.active
        if self.canary:
            self._point = (self._point + _GOLDEN) % 1.0
            number = self.canary if self._point < self.share else self.active
        found = self.generations.get(number)
        if found is not None and found.is_ingress:
            return found
        where = self.ingress_address
        if where and self.entered_here:
            raise Moved(f"requests for {self.name!r} go to another node now", address=where, remedy=f"connect to {where}")
        raise NotFound(
            f"requests for {self.name!r} go to its first stage's node" if self.active else f"{self.name!r} takes no requests yet",
            remedy=f"connect to {found.ingress.name!r} at {where}" if found is not None else "deploy the plan again: `splitnet deploy`",
        )


class Families:
    """All families of a node, and all generations by their keys."""

    def __init__(self, deployments: dict[str, Deployment]) -> None:
        self.deployments = deployments
        self._families: dict[str, Family] = {}
        self.restoring: dict[str, FamilyRecord] = {}  #: what will be here again in a moment
        self.on_change: Callable[[str], None] | None = None  #: hears the name of each that is not what it was

    def note(self, name: str) -> None:
        if self.on_change is not None:
            self.on_change(name)

    def __iter__(self) -> Iterator[Family]:
        return iter(list(self._families.values()))

    def get(self, name: str) -> Family | None:
        return self._families.get(name)

    def state(self, deployment: Deployment) -> str:
        family = self._families.get(deployment.family)
        return "active" if family is None else family.state(deployment.generation)

    def check_serving(self, name: str, generation: int) -> None:
        """Raises AlreadyExists where another generation takes the requests."""
        family = self._families.get(name)
        if family is not None and family.active not in (0, generation) and family.generations:
            raise AlreadyExists(
                f"deployment {name!r} is here already, with another plan",
                remedy=f"`splitnet deploy --update` puts this plan in its place; or unload it first: `splitnet unload {name}`, or deploy under another name",
            )

    def add(self, deployment: Deployment, *, wait: bool = False) -> None:
        """It is loaded. `wait`: it takes no calls before `switch`."""
        family = self._families.setdefault(deployment.family, Family(deployment.family))
        family.generations[deployment.generation] = deployment
        self.deployments[deployment.name] = deployment
        if not wait:
            family.active = deployment.generation
            family.entered_here = deployment.is_ingress or deployment.follows
            family.term = max(family.term, 1)
        self.note(family.name)

    def restore(self, record: FamilyRecord) -> Family | None:
        """Its generations are loaded, as far as that was possible: they are again what the record says, unless somebody has switched meanwhile. None where
        nothing of it is here."""
        family = self._families.setdefault(record.name, Family(record.name))
        if family.term < record.term or not family.active:
            family.active, family.address, family.term = record.active, record.address, record.term
            family.entered_here = record.entered_here
            family.kept = record.kept if record.kept in family.generations else 0
            if record.canary in family.generations and record.active in family.generations:
                family.canary, family.share = record.canary, record.share
        if not family.generations and not (family.active and family.entered_here and family.address):
            del self._families[record.name]
            return None
        return family

    def remove(self, deployment: Deployment) -> None:
        """It is gone. What is left of a family without generations: where the requests go now, if they came here once."""
        self.deployments.pop(deployment.name, None)
        self.note(deployment.family)
        family = self._families.get(deployment.family)
        if family is None:
            return
        family.generations.pop(deployment.generation, None)
        if family.canary == deployment.generation:
            family.canary, family.share = 0, 0.0
        if family.kept == deployment.generation:
            family.kept = 0
        if family.active == deployment.generation:
            family.active = 0
        if not family.generations and not (family.active and family.entered_here):
            del self._families[deployment.family]

    def forget(self, name: str) -> None:
        """Also what is known of where it went."""
        family = self._families.get(name)
        if family is not None and not family.generations:
            del self._families[name]
            self.note(name)

    def held(self, name: str, generation: int = 0) -> list[Deployment]:
        """That generation, or all of them, those that take no calls first. Raises NotFound where there is none; a name that has gone
        elsewhere has none. Raises Overloaded while it is being restored."""
        family = self._families.get(name)
        if name in self.restoring:
            raise _restoring(name)
        if family is not None:
            found = [d for number, d in family.generations.items() if generation in (0, number)]
            if found or not generation:
                return sorted(found, key=lambda d: (d.generation == family.active, d.generation))
        raise NotFound(f"no deployment {generation_key(name, generation)!r} here", remedy="see `splitnet status` for what is deployed")

    def switch(self, name: str, generation: int, share: float, address: str = "", *, keep: bool = True, term: int = 0) -> int:
        """From now on, `share` of the new calls go to that generation; with 1 it is the active one, with 0 it takes none. `address`: of its
        ingress, where it is not held here. `term`: the switches that whoever says so has seen, this one included; 0: one more than here. Returns which
        was active. Raises NotFound, BadInput, and AlreadyExists where a newer switch was made."""
        family = self._families.get(name)
        if family is None or (generation not in family.generations and not address):
            raise NotFound(
                f"no deployment {generation_key(name, generation)!r} here", remedy="activate it first, or say where its ingress is"
            )
        if not 0 <= share <= 1:
            raise BadInput(f"share is {share}", remedy="give 0 to 1")
        if 0 < term < family.term:
            raise AlreadyExists(
                f"{name!r} follows switch {family.term}, which put generation {family.active} in its place; this is switch {term}",
                remedy="see `splitnet status`, and switch again from what is there now",
            )
        found = family.generations.get(generation)
        if found is not None and found.draining:
            raise NotFound(f"{found.name!r} is being unloaded", remedy="activate it again")
        before, family.term = family.active, term or family.term + 1
        self.note(name)
        if share < 1:
            self._try_out(family, generation, share)
            return before
        if generation != before:
            family.entered_here = family.entered_here or family.takes_requests
            family.kept = (before or family.only_other(generation)) if keep else 0
        family.active, family.address = generation, address
        family.canary, family.share = 0, 0.0
        family.entered_here = family.entered_here or family.takes_requests or (found is not None and found.follows)
        return before

    def _try_out(self, family: Family, generation: int, share: float) -> None:
        if generation == family.active:
            raise BadInput(f"{generation_key(family.name, generation)!r} is the active one", remedy="give the share of another generation")
        found = family.generations.get(generation)
        if family.takes_requests and share > 0 and (found is None or not found.is_ingress):
            raise BadInput(
                "only a generation whose first stage is on the same node can take a share of the requests",
                remedy="plan with that node for the first stage (`splitnet plan --input-at NODE`), or switch all at once",
            )
        family.canary, family.share = (generation, share) if share > 0 else (0, 0.0)

    def enter(self, name: str) -> Deployment:
        """The generation that a new call for `name` goes to; without a name that of the only family whose requests come here; of a key, that
        very one. Raises NotFound, Moved."""
        here = [family for family in self._families.values() if family.takes_requests]
        if not name and len(here) == 1:
            return here[0].next_call()
        if not name and self.restoring:
            raise _restoring(", ".join(self.restoring))
        names = ", ".join(family.name for family in here) or "none"
        if not name:
            raise NotFound(
                f"name a deployment; this node takes requests for: {names}",
                remedy="deploy a plan whose first stage is here" if not here else "",
            )
        if parse_key(name)[1] and (pinned := self.deployments.get(name)) is not None and pinned.is_ingress:
            return pinned
        family = self._families.get(name)
        if parse_key(name)[0] in self.restoring:
            raise _restoring(name)
        if family is None:
            raise NotFound(
                f"no deployment {name!r} here; this node takes requests for: {names}", remedy="deploy it, or check the name and the address"
            )
        return family.next_call()


def _restoring(name: str) -> Overloaded:
    return Overloaded(f"{name!r} is being loaded from this node's disk", remedy="try again in a moment", retry_after_s=_RESTORED_S)
