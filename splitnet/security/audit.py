"""The audit log: one JSON object on each line, each holding the hash of the one before it.

    {"seq": 7, "time": "2026-11-23T18:05:12.123456Z", "who": "operator 'alice'", "from": "ipv4:10.0.0.9:40122", "act": "Activate",
     "what": "digits plan 3f2a...", "result": "ok", "previous": "<hash of line 6>", "hash": "<sha256 over previous and the rest>"}

A line that was changed, removed, added or moved breaks the chain there. What the chain by itself cannot show is that lines are missing at the end: keep the newest hash
elsewhere (`splitnet audit verify` prints it, and takes it back with --head). A line that a crash left unfinished is named by the next one.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import threading
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from splitnet.errors import BadInput, NotFound, StorageFailure

__all__ = ["FIRST", "AuditLog", "AuditReport", "verify_audit"]

FIRST = "0" * 64  #: what the first line has for `previous`
_RECOVERED = "recovered"
_LONGEST = 500  # characters of one field
_TAIL_BYTES = 64 << 10
_KEYS = ("seq", "time", "who", "from", "act", "what", "result", "previous")


class AuditLog:
    """Appends to one file, readable by its owner only; made at the first line. Several threads and processes may append at a time. Blocks on the disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()

    def append(self, *, who: str, came_from: str, act: str, what: str, result: str) -> str:
        """The line's hash. Raises StorageFailure where it could not be written: then the act must not be done silently."""
        try:
            with self._lock:
                descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
                    seq, previous, torn = _last(descriptor)
                    lines = b""
                    if torn is not None:
                        found = hashlib.sha256(torn).hexdigest()
                        record = _record(seq, previous, "splitnet", "", _RECOVERED, f"an unfinished line, sha256 {found}", "ok")
                        seq, previous, lines = seq + 1, record["hash"], b"\n" + _line(record)
                    record = _record(seq, previous, who, came_from, act, what, result)
                    _write_all(descriptor, lines + _line(record))
                finally:
                    os.close(descriptor)
        except OSError as error:
            raise StorageFailure(
                f"cannot write the audit log {str(self.path)!r}: {error.strerror}", remedy="make room on the disk"
            ) from error
        return str(record["hash"])


@dataclass(frozen=True, slots=True)
class AuditReport:
    """`fault`: empty where the chain is whole, else the place and what is wrong there. `head`: the hash of the last good line."""

    lines: int
    head: str
    fault: str = ""
    recovered: int = 0  # lines that a crash left unfinished


def verify_audit(path: Path, head: str = "") -> AuditReport:
    """Follows the chain from the first line. `head`: a hash that must occur, as seen earlier, so that missing lines at the end are found. Raises NotFound, BadInput."""
    previous, seq, torn, recovered, seen = FIRST, 0, b"", 0, not head
    number = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                record, fault = _parsed(line)
                if record is None:
                    if torn:
                        return AuditReport(seq, previous, f"line {number}: {fault}", recovered)
                    torn = line.removesuffix(b"\n")
                    continue
                if torn:
                    if record["act"] != _RECOVERED or hashlib.sha256(torn).hexdigest() not in record["what"]:
                        return AuditReport(seq, previous, f"line {number - 1}: not a record, and the next line does not say why", recovered)
                    torn, recovered = b"", recovered + 1
                if record["seq"] != seq:
                    return AuditReport(
                        seq, previous, f"line {number}: number {record['seq']}, expected {seq}: lines are missing or were added", recovered
                    )
                if record["previous"] != previous:
                    return AuditReport(seq, previous, f"line {number}: does not follow the line before it", recovered)
                if record["hash"] != _hash(record):
                    return AuditReport(seq, previous, f"line {number}: was changed", recovered)
                previous, seq = record["hash"], seq + 1
                seen = seen or previous == head
    except FileNotFoundError:
        raise NotFound(f"there is no audit log {str(path)!r}", remedy="a node keeps it as audit.jsonl in its --data directory") from None
    except OSError as error:
        raise BadInput(f"cannot read {str(path)!r}: {error.strerror}") from None
    if torn:
        return AuditReport(
            seq, previous, f"line {number}: not a record (the last one: a crash may have left it; the next record will name it)", recovered
        )
    if not seen:
        return AuditReport(
            seq, previous, f"no line has the hash {head[:64]}: lines are missing at the end, or the log is another one", recovered
        )
    return AuditReport(seq, previous, "", recovered)


# ------------------------------------------------------------------------------------------------------------------- in pieces


def _record(seq: int, previous: str, who: str, came_from: str, act: str, what: str, result: str) -> dict[str, Any]:
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    texts = {"who": who, "from": came_from, "act": act, "what": what, "result": result}
    record: dict[str, Any] = {"seq": seq, "time": now, **{key: text[:_LONGEST] for key, text in texts.items()}, "previous": previous}
    return {**record, "hash": _hash(record)}


def _hash(record: dict[str, Any]) -> str:
    body = json.dumps([record[key] for key in _KEYS], ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(body.encode()).hexdigest()


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=True).encode() + b"\n"


def _parsed(line: bytes) -> tuple[dict[str, Any] | None, str]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None, "not JSON"
    if not isinstance(record, dict) or set(record) != {*_KEYS, "hash"}:
        return None, "not a record"
    if not isinstance(record["seq"], int) or not all(isinstance(record[key], str) for key in (*_KEYS[1:], "hash")):
        return None, "not a record"
    if not line.endswith(b"\n"):
        return None, "unfinished"
    return record, ""


def _last(descriptor: int) -> tuple[int, str, bytes | None]:
    """The next number, the hash of the last whole line, and the unfinished line behind it, if there is one."""
    size = os.fstat(descriptor).st_size
    tail = os.pread(descriptor, _TAIL_BYTES, max(0, size - _TAIL_BYTES))
    *whole, rest = tail.split(b"\n")
    torn = rest if rest else None
    for line in reversed(whole):
        record, _ = _parsed(line + b"\n")
        if record is not None:
            return record["seq"] + 1, record["hash"], torn
    return 0, FIRST, torn


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
    os.fsync(descriptor)
