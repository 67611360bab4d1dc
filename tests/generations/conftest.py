"""Three real nodes for all tests of a file, and versions of one small model cut for them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from chain_versions import PLACES, version
from small_models import Split, same, split

import splitnet
from nodes.testing import LocalCluster
from splitnet.errors import NotFound, SplitnetError
from splitnet.install import undeploy


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(3) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def made(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str], Split]:
    """Version `number` of the model, cut for the nodes of a key of PLACES."""

    @functools.cache
    def make(number: int, where: str) -> Split:
        cut = split(version(number), cluster.cluster(), tmp_path_factory.mktemp("shards"), PLACES[where])
        return dataclasses.replace(cut, plan=dataclasses.replace(cut.plan, model="chain"))

    return make


@pytest.fixture
def name(cluster: LocalCluster, request: pytest.FixtureRequest) -> Iterator[str]:
    """Of a deployment that is taken off after the test; nodes that it killed live again."""
    called = "m" + str(abs(hash(request.node.name)) % 10**6)
    yield called
    for node in cluster.cluster().nodes:
        if not cluster.alive(node.name):
            cluster.restart(node.name)
    with contextlib.suppress(NotFound):
        undeploy(cluster.cluster(), called, drain_s=0.0)


class Clients:
    """Threads that send one request after another, until the block is left; each answer is one of `versions`, bit for bit, or counted as mixed."""

    def __init__(self, address: str, name: str, versions: dict[int, Split], threads: int = 3) -> None:
        self._address, self._name = address, name
        self._inputs = next(iter(versions.values())).inputs(2)
        self._expected = {number: made.whole(self._inputs) for number, made in versions.items()}
        self.answers: Counter[int] = Counter()
        self.mixed = 0
        self.failed: list[SplitnetError] = []
        self._lock = threading.Lock()
        self._ended = False
        self._threads = [threading.Thread(target=self._run) for _ in range(threads)]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        for thread in self._threads:
            thread.join()

    def wait_for(self, number: int, count: int = 20) -> None:
        """Until so many more answers of that version have come."""
        goal, done = self.answers[number] + count, threading.Event()
        for _ in range(1000):
            if self.answers[number] >= goal or self.failed or done.wait(0.01):
                return

    def _run(self) -> None:
        with splitnet.Client(self._address, self._name) as client:
            while not self._ended:
                try:
                    outputs = client.infer(self._inputs)
                except SplitnetError as error:
                    with self._lock:
                        self.failed.append(error)
                    return
                number = next((n for n, expected in self._expected.items() if same(outputs, expected)), None)
                with self._lock:
                    if number is None:
                        self.mixed += 1
                    else:
                        self.answers[number] += 1


@pytest.fixture
def clients() -> Callable[..., Clients]:
    return Clients


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[Split, str], Path]:
    """plan.json with its shards beside it, for commands."""

    def save(cut: Split, stem: str) -> Path:
        folder = tmp_path / f"{stem}.shards"
        folder.mkdir()
        for stage, shard in cut.shards.items():
            (folder / stage).symlink_to(shard.path, target_is_directory=True)
        cut.plan.save(tmp_path / f"{stem}.json")
        return tmp_path / f"{stem}.json"

    return save
