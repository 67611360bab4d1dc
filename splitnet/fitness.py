"""Is this box fit to be a node? Each question is one function that answers with a `Finding`; nothing here changes the box."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

__all__ = ["Finding", "examine"]

_LEAST_MEMORY_BYTES = 512 << 20  # torch alone takes about 250 MiB
_LEAST_DISK_BYTES = 1 << 30
_LEAST_FILES = 256  # a node holds a few descriptors per peer and per shard
_CHILD_DEADLINE_S = 120.0
_PACKAGES = ("splitnet", "partitioner", "nodes")

# In a process of its own: a library built for another processor dies of an illegal instruction, and must not take the doctor along.
_ASK_NODE = """
import json
from nodes.config import default_data_dir
print(json.dumps({"data_dir": str(default_data_dir(""))}))
"""
_ASK_ENGINES = """
import json
from nodes.engines import engine_names
print(json.dumps({"engines": list(engine_names())}))
"""
_ASK_TORCH = """
import json, torch
product = torch.ones(64, 64) @ torch.ones(64, 64)
print(json.dumps({"version": torch.__version__, "threads": torch.get_num_threads(), "sum": float(product.sum())}))
"""


@dataclass(frozen=True, slots=True)
class Finding:
    """`state` "failure": a node cannot run here; "warning": it can, with a drawback. `remedy` is empty when all is well."""

    name: str
    state: Literal["ok", "warning", "failure"]
    finding: str
    remedy: str = ""


class _ChildFailed(Exception):
    pass


def examine(data_dir: Path | None = None) -> tuple[Finding, ...]:
    """Every finding, in the order in which a person would fix them. `data_dir` None: where a node keeps its shards by default."""
    return (_python(), _core(), _names(), *_extras(), _torch(), _engines(), _memory(), _disk(data_dir), _loopback(), _open_files())


def _python() -> Finding:
    return Finding("python", "ok", f"Python {platform.python_version()} on {platform.machine()}, {platform.system()} {platform.release()}")


def _core() -> Finding:
    names = _requirements().get("", ())
    missing = [name for name in names if _version(name) is None]
    if missing:
        return Finding("core", "failure", f"missing: {', '.join(missing)}", f"pip install {' '.join(missing)}")
    return Finding("core", "ok", ", ".join(f"{name} {_version(name)}" for name in ("splitnet", *names)))


def _names() -> Finding:
    """`nodes` and `partitioner` are names that another distribution may use too; whichever was installed last has overwritten files."""
    owners = packages_distributions()
    others = {package: sorted({*owners.get(package, ())} - {"splitnet"}) for package in _PACKAGES}
    clashes = [f"{package} (also from {', '.join(found)})" for package, found in others.items() if found]
    if clashes:
        return Finding("names", "failure", "; ".join(clashes), "install splitnet in a virtual environment without these distributions")
    root = Path(__file__).resolve().parent.parent
    strangers = [f"{package} comes from {place}" for package in _PACKAGES if (place := _home(package)) != root / package]
    if strangers:
        return Finding("names", "failure", "; ".join(strangers), "leave the directory that shadows it, or clear PYTHONPATH")
    return Finding("names", "ok", f"{', '.join(_PACKAGES)} all come from splitnet, in {root}")


def _extras() -> tuple[Finding, ...]:
    return tuple(_extra(extra, names) for extra, names in sorted(_requirements().items()) if extra not in ("", "all", "dev"))


def _extra(extra: str, names: tuple[str, ...]) -> Finding:
    missing = [name for name in names if _version(name) is None]
    if not missing:
        return Finding(f"extra {extra}", "ok", ", ".join(f"{name} {_version(name)}" for name in names))
    state: Literal["failure", "warning"] = "failure" if extra == "node" else "warning"
    return Finding(f"extra {extra}", state, f"missing: {', '.join(missing)}", f"pip install 'splitnet[{extra}]'")


def _torch() -> Finding:
    if find_spec("torch") is None:
        return Finding("torch", "warning", "not installed: only engines without torch can run here", "pip install 'splitnet[node]'")
    try:
        told = _ask(_ASK_TORCH)
    except _ChildFailed as error:
        return Finding("torch", "failure", f"does not run: {error}", "install a build of torch for this processor")
    processors = _processors()
    found = f"torch {told['version']}, {told['threads']} threads by default, {processors} processors for this process"
    return Finding("torch", "ok", found)


def _engines() -> Finding:
    try:
        names = _ask(_ASK_ENGINES)["engines"]
    except _ChildFailed as error:
        return Finding("engines", "failure", f"cannot be listed: {error}", "pip install 'splitnet[node]'")
    if not isinstance(names, list) or not names:
        return Finding("engines", "failure", "none can run here", "pip install 'splitnet[node]'")
    return Finding("engines", "ok", ", ".join(map(str, names)))


def _memory() -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = f"{_gib(total)} on the box"
    limit = _cgroup_limit()
    if limit is not None and limit < total:
        total, found = limit, f"{found}, {_gib(limit)} allowed to this process (cgroup)"
    if total < _LEAST_MEMORY_BYTES:
        return Finding("memory", "warning", found, f"at least {_gib(_LEAST_MEMORY_BYTES)} are needed for torch and a small shard")
    return Finding("memory", "ok", found)


def _disk(data_dir: Path | None) -> Finding:
    if data_dir is None:
        try:
            data_dir = Path(str(_ask(_ASK_NODE)["data_dir"]))
        except _ChildFailed as error:
            return Finding("disk", "failure", f"the data directory is not known: {error}", "pip install 'splitnet[node]'")
    there = data_dir.absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    found = f"{_gib(free)} free for {data_dir}"
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return Finding(
            "disk", "failure", f"{there} cannot be written by this user", "choose another directory with `splitnet node --data DIR`"
        )
    if free < _LEAST_DISK_BYTES:
        return Finding("disk", "warning", found, "make room, or choose another directory with `splitnet node --data DIR`")
    return Finding("disk", "ok", found)


def _loopback() -> Finding:
    try:
        with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()[:2], timeout=5):
            return Finding("loopback", "ok", f"listened on and reached 127.0.0.1:{server.getsockname()[1]}")
    except OSError as error:
        return Finding(
            "loopback", "failure", f"127.0.0.1 cannot be served: {error}", "bring up the loopback interface, or lift the firewall from it"
        )


def _open_files() -> Finding:
    import resource  # POSIX only, as is a node

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < _LEAST_FILES:
        return Finding("open files", "warning", f"at most {soft}", f"ulimit -n {_LEAST_FILES * 4}")
    return Finding("open files", "ok", "no limit" if soft == resource.RLIM_INFINITY else f"at most {soft}")


def _requirements() -> dict[str, tuple[str, ...]]:
    """What splitnet's own metadata ask for: distributions by extra; "" is the core. An extra that names another one includes it."""
    found: dict[str, list[str]] = {"": []}
    for line in distribution("splitnet").requires or ():
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", line)
        name = re.match(r"[\w.-]+", line)
        if name is not None and name[0] != "splitnet":
            found.setdefault(extra[1] if extra else "", []).append(name[0])
    return {extra: tuple(dict.fromkeys(names)) for extra, names in found.items()}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _home(package: str) -> Path | None:
    spec = find_spec(package)
    return None if spec is None or spec.origin is None else Path(spec.origin).resolve().parent


def _ask(program: str) -> dict[str, object]:
    """Runs a few lines in a fresh interpreter and reads the JSON that they print. Raises _ChildFailed with the last line of its errors."""
    try:
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=_CHILD_DEADLINE_S, check=False)
    except subprocess.TimeoutExpired:
        raise _ChildFailed(f"no answer within {_CHILD_DEADLINE_S:.0f} s") from None
    if done.returncode < 0:
        raise _ChildFailed(f"died of signal {-done.returncode}")
    if done.returncode:
        raise _ChildFailed((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    told = json.loads(done.stdout.splitlines()[-1])
    if not isinstance(told, dict):
        raise _ChildFailed(f"an answer of type {type(told).__name__}")
    return told


def _cgroup_limit() -> int | None:
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(path).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            return int(text)
    return None


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 30):.1f} GiB"
