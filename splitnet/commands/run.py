"""`splitnet run`: requests from files, answers to the terminal or to files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from splitnet.errors import BadInput, BadPlan, SplitnetError
from splitnet.plan import Plan

if TYPE_CHECKING:
    import numpy as np

__all__ = ["run"]

_SHOWN = 6  # values of each output


@dataclass(frozen=True)
class _Request:
    """`label` is what stands for it in what is printed. `files`: one file (name ""), or one for each input."""

    label: str
    files: tuple[tuple[str, Path], ...]


@click.command()
@click.argument("plan", type=click.Path(dir_okay=False, path_type=Path))
@click.argument("inputs", metavar="INPUT...", nargs=-1, required=True)
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), help="Write each answer to a .npz file in this folder.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line and answer; more than 4096 values as statistics.")
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0, min_open=True),
    default=60.0,
    show_default=True,
    help="Seconds that each request may take.",
)
@click.option("--window", type=click.IntRange(min=1), help="Requests under way at once.  [default: as many as the deployment takes]")
@click.option("--deployment", default="", help="The deployment's name.  [default: the one of this plan]")
def run(
    plan: Path, inputs: tuple[str, ...], output: Path | None, as_json: bool, timeout_s: float, window: int | None, deployment: str
) -> None:
    """Send requests to a deployed PLAN and print the answers, in the order of the inputs.

    An INPUT is a .npz or .json file with the arrays of one request by name, or a .npy file for a model with one input, or NAME=FILE
    for one input of several (NAME=FILE arguments make one request until a name comes again). Several are streamed through the
    pipeline.

    \b
    Examples:
      splitnet run plan.json image.npy
      splitnet run plan.json input_ids=ids.npy attention_mask=mask.npy --json
      splitnet run plan.json batch-*.npz --output answers/
    """
    from splitnet.array_files import to_json, write_arrays
    from splitnet.sync import Client

    loaded = Plan.load(plan)
    if loaded.generation is not None:
        raise BadPlan(f"{plan} is of a model that generates text", remedy=f'use `splitnet generate {plan} --prompt "..."`')
    requests = _requests(loaded, inputs)
    written = _files_for(requests, output) if output is not None else None
    name = deployment or _deployed(loaded, timeout_s)
    with Client(loaded.ingress.address, name, timeout_s=timeout_s) as client:
        noise = client.describe().noise
        answers = client.stream((_read(loaded, request) for request in requests), window=window)
        for index, request in enumerate(requests):
            try:
                outputs = next(answers)
            except SplitnetError as error:
                if error.batch is not None:
                    error.message = f"{requests[error.batch].label}: {error.message}"
                raise
            if written is not None:
                write_arrays(written[index], outputs)
            if as_json:
                answer = {"input": request.label, "outputs": {name: to_json(array) for name, array in outputs.items()}}
                if noise is not None:
                    answer["privacy"] = asdict(noise)
                click.echo(json.dumps(answer, allow_nan=False))
            else:
                _show(request, outputs, written[index] if written is not None else None)
                if noise is not None:
                    click.echo(f"  what other nodes saw of it is {noise.promise()}")


def _requests(plan: Plan, arguments: Sequence[str]) -> list[_Request]:
    """Raises BadInput for a file that is not there, before anything is sent."""
    names = [spec.name for spec in plan.inputs]
    requests: list[_Request] = []
    gathered: dict[str, Path] = {}

    def finish() -> None:
        if gathered:
            label = " ".join(f"{name}={path}" for name, path in gathered.items())
            requests.append(_Request(label, tuple(gathered.items())))
            gathered.clear()

    for argument in arguments:
        name, equals, rest = argument.partition("=")
        named = bool(equals) and (name in names or not Path(argument).exists())
        path = Path(rest if named else argument)
        if named and name not in names:
            raise BadInput(f"no input {name!r}; the model has {', '.join(names)}")
        if not path.is_file():
            raise BadInput(f"no file {str(path)!r}")
        if not named or name in gathered:
            finish()
        if named:
            gathered[name] = path
        else:
            requests.append(_Request(str(path), (("", path),)))
    finish()
    return requests


def _read(plan: Plan, request: _Request) -> dict[str, np.ndarray]:
    from splitnet.array_files import read_array, read_inputs

    specs = {spec.name: spec for spec in plan.inputs}
    if request.files[0][0]:
        return {name: read_array(path, specs[name]) for name, path in request.files}
    return read_inputs(request.files[0][1], plan.inputs)


def _deployed(plan: Plan, timeout_s: float) -> str:
    """The name under which the plan is deployed."""
    from splitnet import background, channel
    from splitnet.errors import NotFound
    from splitnet.rpc.v1 import node_pb2 as pb

    address = plan.ingress.address

    async def ask() -> pb.DescribeReply:
        async with channel.open_channel(address) as connection:
            with channel.translated(address):
                return await channel.stub(connection).Describe(pb.DescribeRequest(), timeout=timeout_s)

    reply = background.run(ask())
    for status in reply.deployments:
        if status.plan_sha256 == plan.sha256:
            return status.name
    others = ", ".join(repr(status.name) for status in reply.deployments)
    raise NotFound(
        f"this plan is not deployed at {address}" + (f", which serves {others} by other plans" if others else ""),
        node=reply.name,
        remedy="run `splitnet deploy` with it" + (", or say --deployment NAME to use what is there" if others else ""),
    )


def _files_for(requests: Sequence[_Request], directory: Path) -> list[Path]:
    """One for each request, after its first file; the second of a name gets a number. Makes the folder."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--output {str(directory)!r} cannot be made: {error.strerror}") from None
    taken: set[str] = set()
    names = []
    for request in requests:
        stem = request.files[0][1].stem
        name, number = stem, 1
        while name in taken:
            number += 1
            name = f"{stem}-{number}"
        taken.add(name)
        names.append(directory / f"{name}.npz")
    return names


def _show(request: _Request, outputs: dict[str, np.ndarray], written: Path | None) -> None:
    click.echo(request.label + (f" -> {written}" if written is not None else ""))
    for name, array in outputs.items():
        values = " ".join(_shown(value) for value in array.ravel()[:_SHOWN])
        more = " ..." if array.size > _SHOWN else ""
        shape = "x".join(str(size) for size in array.shape) or "scalar"
        click.echo(f"  {name}  {array.dtype.name} {shape}  {values}{more}")


def _shown(value: np.generic) -> str:
    return str(value) if value.dtype.kind in "biuc" else f"{float(value):.6g}"  # a float, or bfloat16
