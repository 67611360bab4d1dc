from __future__ import annotations

import re
import runpy
from pathlib import Path

import click
import pytest

from splitnet.cli import SUMMARIES, cli


@pytest.fixture(scope="module")
def readme(repository: Path) -> str:
    return (repository / "README.md").read_text()


def _unknown_options(line: str) -> list[str]:
    """The options of a `splitnet COMMAND ...` line that the command does not have."""
    match = re.match(r"(?:\s*\w+\$)?\s*splitnet (\w+)([^#(|>&]*)", line)
    if match is None or match[1] not in SUMMARIES:
        return []
    command = cli.get_command(click.Context(cli), match[1])
    assert command is not None
    if isinstance(command, click.Group):
        command = command.commands[match[2].split()[0]]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}
    return [option for option in re.findall(r"(?<!\S)--?[a-z][\w-]*", match[2]) if option not in known]


def test_its_table_lists_the_commands(readme: str) -> None:
    assert re.findall(r"^\| `splitnet (\w+)` \|", readme, re.MULTILINE) == list(SUMMARIES)


def test_its_links_lead_somewhere(readme: str, repository: Path) -> None:
    links = re.findall(r"\]\(([^):#]+)\)", readme)
    assert len(links) > 3
    assert [link for link in links if not (repository / link).exists()] == []


def test_its_commands_have_the_options_that_it_uses(readme: str) -> None:
    lines = [line for line in readme.splitlines() if re.match(r"^\s*\w+\$ splitnet ", line)]
    assert len(lines) >= 6
    assert {line: unknown for line in lines if (unknown := _unknown_options(line))} == {}


@pytest.mark.parametrize("name", sorted(SUMMARIES))
def test_the_examples_in_the_help_have_the_options_that_they_use(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    assert {line: unknown for line in (command.help or "").splitlines() if (unknown := _unknown_options(line))} == {}


def test_its_python_session_runs(readme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from nodes.testing import LocalCluster

    (session,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    (tmp_path / "session.py").write_text(session)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    with LocalCluster(3) as cluster:
        cluster.cluster().save(tmp_path / "cluster.toml")
        names = runpy.run_path(str(tmp_path / "session.py"))
    (answer,) = names["outputs"].values()
    assert answer.shape == (8, 10)
