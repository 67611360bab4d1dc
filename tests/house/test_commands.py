from __future__ import annotations

import subprocess
import sys
import warnings
from importlib.metadata import entry_points
from pathlib import Path

import click
import pytest

from splitnet import __version__
from splitnet.cli import GROUP, SUMMARIES, cli, main, run_command
from splitnet.errors import BadInput, NodeUnavailable

ENTRIES = {point.name: point for point in entry_points(group=GROUP)}
HEAVY = ("torch", "networkx", "transformers", "safetensors", "sklearn", "numpy", "partitioner", "nodes")


def _fail(error: BaseException) -> click.Command:
    @click.command()
    def command() -> None:
        raise error

    return command


def test_every_command_stands_in_the_list_and_nothing_else() -> None:
    assert set(SUMMARIES) == {*ENTRIES, *cli.commands}


@pytest.mark.parametrize("name", sorted(SUMMARIES))
def test_every_command_explains_itself_with_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"Usage: splitnet {name}" in out
    assert "Example" in out
    assert f"splitnet {name}" in out.split("Example", 1)[1]
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    for parameter in command.params:
        if isinstance(parameter, click.Option) and not parameter.hidden:
            assert parameter.help, f"{name} {parameter.opts[0]} has no help"


def test_the_list_of_commands_imports_none_of_them() -> None:
    program = f"import sys; from splitnet.cli import main; main(['--help']); print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    for name, summary in SUMMARIES.items():
        assert f"{name} " in done.stdout
        assert summary in done.stdout


def test_no_command_loads_torch_to_explain_itself() -> None:
    program = (
        "import sys; from splitnet.cli import main, SUMMARIES\n"
        "for name in SUMMARIES: assert main([name, '--help']) == 0, name\n"
        "print([name for name in ('torch', 'networkx', 'transformers', 'sklearn') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"splitnet {__version__}\n"


def test_python_m_is_the_same_command() -> None:
    done = subprocess.run([sys.executable, "-m", "splitnet", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"splitnet {__version__}\n", "")


@pytest.mark.parametrize("args", [["nonsense"], ["--nonsense"], ["doctor", "--nonsense"], ["completion", "tcsh"], ["completion"]])
def test_wrong_usage_is_status_2_and_says_where_help_is(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Try 'splitnet" in captured.err


def test_a_users_mistake_is_one_message_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(_fail(BadInput("input 'x': expected float32, got int64", remedy="convert it")), []) == 2
    assert capsys.readouterr().err == "error: input 'x': expected float32, got int64\n  remedy: convert it\n"


def test_a_service_error_is_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(_fail(NodeUnavailable("gone", node="b")), []) == 1
    assert capsys.readouterr().err == "error: node 'b': gone\n"


def test_the_cause_is_found_in_a_group_of_errors(capsys: pytest.CaptureFixture[str]) -> None:
    group = BaseExceptionGroup("tasks", [ValueError("noise"), ExceptionGroup("inner", [BadInput("the cause")])])
    assert run_command(_fail(group), []) == 2
    assert capsys.readouterr().err == "error: the cause\n"


def test_a_bug_is_one_line_and_says_how_to_see_more(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(_fail(ValueError("first line\nsecond line")), []) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: internal error: ValueError: first line (")
    assert "--debug" in err
    assert err.count("\n") == 1


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(cli.commands, "doctor", _fail(ValueError("deep")))
    assert main(["--debug", "doctor"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "--debug" not in err.splitlines()[-1]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), BaseExceptionGroup("tasks", [KeyboardInterrupt()])])
def test_an_interrupt_is_status_130_without_a_word(error: BaseException, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(_fail(error), []) == 130
    assert capsys.readouterr().err.strip() == ""


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "missing" / "plan.json"

    @click.command()
    def command() -> None:
        target.write_text("{}")

    assert run_command(command, []) == 1
    assert capsys.readouterr().err == f"error: {target}: No such file or directory\n"


def test_a_command_chooses_its_status() -> None:
    @click.command()
    @click.pass_context
    def command(ctx: click.Context) -> None:
        ctx.exit(1)

    assert run_command(command, []) == 1


@pytest.mark.parametrize(
    ("command", "module", "extra"),
    [
        ("plan", "torch", "planner"),
        ("node", "torch", "node"),
        ("node", "structlog", "node"),
        ("plan", "networkx.drawing", "planner"),
        ("demo", "sklearn", "demo"),
    ],
)
def test_a_missing_package_names_its_extra(
    command: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(cli.commands, command, _fail(ModuleNotFoundError(f"No module named {module!r}", name=module)))
    assert main([command]) == 2
    err = capsys.readouterr().err
    assert (
        err
        == f"error: `splitnet {command}` needs {module.split('.')[0]}, which is not installed\n  remedy: pip install 'splitnet[{extra}]'\n"
    )


def test_a_module_of_ours_that_is_missing_is_a_bug(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(_fail(ModuleNotFoundError("No module named 'nodes.lost'", name="nodes.lost")), []) == 1
    assert "internal error" in capsys.readouterr().err


def test_warnings_of_libraries_are_silent_and_ours_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    @click.command()
    def command() -> None:
        warnings.warn_explicit("look out", UserWarning, "plan.py", 1, module="splitnet.plan")
        warnings.warn_explicit("noise", DeprecationWarning, "x.py", 1, module="torch.x")

    with warnings.catch_warnings():
        assert run_command(command, []) == 0
    assert capsys.readouterr().err == "warning: look out\n"


@pytest.mark.parametrize("shell", ["bash", "fish", "zsh"])
def test_completion_scripts(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    assert "_SPLITNET_COMPLETE" in capsys.readouterr().out


def test_completion_completes_commands_and_options() -> None:
    def complete(words: str, position: int) -> str:
        environment = {"_SPLITNET_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(position)}
        done = subprocess.run([sys.executable, "-m", "splitnet"], env=environment, capture_output=True, text=True, check=False)
        assert done.stderr == ""
        return done.stdout

    assert complete("splitnet de", 1).split() == ["plain,deploy", "plain,demo"]
    assert "plain,--data" in complete("splitnet doctor --d", 2).split()


def test_a_closed_pipe_is_quiet() -> None:
    program = f"{sys.executable} -m splitnet doctor --help | true"
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=False)
    assert done.stderr == ""
