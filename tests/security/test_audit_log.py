from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner

from splitnet.commands.audit import audit
from splitnet.errors import NotFound
from splitnet.security.audit import AuditLog, verify_audit


def written(path: Path, lines: int = 5) -> AuditLog:
    log = AuditLog(path)
    for i in range(lines):
        log.append(who="operator 'me'", came_from="ipv4:10.0.0.9:1", act="Activate", what=f"digits@{i} — ü", result="ok")
    return log


def test_a_log_is_whole_and_private(tmp_path: Path) -> None:
    log = written(tmp_path / "audit.jsonl")
    report = verify_audit(log.path)
    assert (report.lines, report.fault) == (5, "")
    assert log.path.stat().st_mode & 0o077 == 0
    ended = CliRunner().invoke(audit, ["verify", str(log.path)])
    assert ended.exit_code == 0
    assert report.head in ended.output


@pytest.mark.parametrize("line", range(5))
@pytest.mark.parametrize("field", ["seq", "time", "who", "from", "act", "what", "result", "previous", "hash"])
def test_any_changed_field_of_any_line_is_found(tmp_path: Path, line: int, field: str) -> None:
    log = written(tmp_path / "audit.jsonl")
    lines = log.path.read_text().splitlines()
    record = json.loads(lines[line])
    record[field] = record[field] + 1 if field == "seq" else record[field][:-1] + ("0" if record[field][-1:] != "0" else "1")
    lines[line] = json.dumps(record)
    log.path.write_text("\n".join(lines) + "\n")
    report = verify_audit(log.path)
    assert f"line {line + 1}:" in report.fault
    ended = CliRunner().invoke(audit, ["verify", str(log.path)])
    assert ended.exit_code == 1


@pytest.mark.parametrize(
    "damage", [lambda ls: ls[:2] + ls[3:], lambda ls: ls[1:], lambda ls: [ls[1], ls[0], *ls[2:]], lambda ls: [*ls[:3], ls[2], *ls[3:]]]
)
def test_lines_that_are_gone_moved_or_added_are_found(tmp_path: Path, damage: object) -> None:
    log = written(tmp_path / "audit.jsonl")
    lines = log.path.read_text().splitlines(keepends=True)
    log.path.write_text("".join(damage(lines)))  # type: ignore[operator]
    assert verify_audit(log.path).fault


def test_missing_last_lines_are_found_by_what_was_seen_before(tmp_path: Path) -> None:
    log = written(tmp_path / "audit.jsonl")
    head = verify_audit(log.path).head
    lines = log.path.read_text().splitlines(keepends=True)
    log.path.write_text("".join(lines[:3]))
    assert not verify_audit(log.path).fault, "the chain alone cannot know"
    assert "lines are missing at the end" in verify_audit(log.path, head).fault


def test_a_line_that_a_crash_cut_off_is_named_and_gone_on_after(tmp_path: Path) -> None:
    log = written(tmp_path / "audit.jsonl")
    whole = log.path.read_bytes()
    log.path.write_bytes(whole[:-30])
    assert "a crash may have left it" in verify_audit(log.path).fault
    AuditLog(log.path).append(who="x", came_from="", act="Unload", what="", result="ok")
    report = verify_audit(log.path)
    assert (report.lines, report.fault, report.recovered) == (6, "", 1)
    log.path.write_bytes(log.path.read_bytes().replace(whole[-60:-30], b"y" * 30))
    assert verify_audit(log.path).fault, "and the rest may not be changed either"


def test_several_writers_make_one_chain(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    threads = [threading.Thread(target=written, args=(path, 10)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (verify_audit(path).lines, verify_audit(path).fault) == (40, "")


def test_no_log_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="there is no audit log"):
        verify_audit(tmp_path / "audit.jsonl")
