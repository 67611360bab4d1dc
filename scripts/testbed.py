"""Node processes on this machine with CPU shares, memory limits and shaped links, as a small TOML file or a preset says.

    python scripts/testbed.py presets
    python scripts/testbed.py up two-tier                                   # until Ctrl-C
    python scripts/testbed.py up factory -- splitnet status --cluster {cluster}
    python scripts/testbed.py check 4g                                      # how exact are shares and links here?
    python scripts/testbed.py sweep two-tier --bandwidths 1,5,20,100,1000 py:testbed.models:cnn

See docs/testbed.md. Run it with the project's Python (.venv/bin/python).
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from typing import Any, NoReturn

import click
from testbed.bed import Testbed
from testbed.exactness import measure_exactness
from testbed.shaping import UNSHAPED, LinkShape
from testbed.spec import CLIENT_NAME, BedSpec, load, preset_names

from splitnet.errors import SplitnetError
from splitnet.explain import bytes_text, seconds_text, table


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, help=(__doc__ or "").splitlines()[0])
def main() -> None:
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that every block is left


@main.command()
def presets() -> None:
    """List the presets."""
    width = max(map(len, preset_names()))
    for name in preset_names():
        click.echo(f"{name:<{width}}  {load(name).description}")


@main.command(context_settings={"ignore_unknown_options": True})
@click.argument("file", metavar="FILE|PRESET")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.option("--quiet", is_flag=True, help="Say only what could not be had.")
def up(file: str, command: tuple[str, ...], quiet: bool) -> None:
    """Start the nodes; run COMMAND against them (after --), or stay until Ctrl-C.

    {cluster} in COMMAND is replaced by the path of a cluster file, which is in the environment as SPLITNET_CLUSTER, too; its links are
    the configured ones, `splitnet probe` measures. The exit status is that of COMMAND.
    """
    spec = load(file)
    with Testbed(spec) as bed:
        for note in bed.notes:
            click.echo(f"note: {note}", err=True)
        if not quiet:
            click.echo("\n".join(_describe(spec, bed)), err=True)
        if not command:
            click.echo(f"cluster file: {bed.cluster_file}\nCtrl-C stops the nodes", err=True)
            try:
                signal.pause()
            except KeyboardInterrupt:
                return
        parts = [part.replace("{cluster}", str(bed.cluster_file)) for part in command]
        try:
            process = subprocess.Popen(parts, env={**os.environ, "SPLITNET_CLUSTER": str(bed.cluster_file)})
        except OSError as error:
            raise click.UsageError(
                f"COMMAND {parts[0]!r} cannot be started: {error.strerror}; what belongs to `up` stands before FILE"
            ) from None
        status = _wait(process)
    sys.exit(status)


@main.command()
@click.argument("file", metavar="FILE|PRESET")
def check(file: str) -> None:
    """Measure how exact the file's links are on this machine."""
    spec = load(file)
    with Testbed(spec) as bed:
        for note in bed.notes:
            click.echo(f"note: {note}", err=True)
        click.echo("\n".join(_describe(spec, bed)))


class _Numbers(click.ParamType[tuple[float, ...]]):
    name = "mbit/s,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple):  # click may convert twice
            return value
        try:
            numbers = tuple(float(part) for part in value.split(","))
        except ValueError:
            numbers = ()
        if not numbers or not all(0 < number < math.inf for number in numbers):
            self.fail(f"{value!r} is not a list of figures above 0, such as 1,5,20", param, ctx)
        return numbers


@main.command()
@click.argument("file", metavar="FILE|PRESET")
@click.argument("model")
@click.option("--bandwidths", type=_Numbers(), default="1,3,10,30,50,100,300,1000", show_default=True, help="Mbit/s of every shaped link.")
@click.option("--objective", type=click.Choice(["latency", "throughput"]), default="latency", show_default=True)
@click.option(
    "--margin", type=click.FloatRange(0, 1, max_open=True), default=0.1, show_default=True, help="A split must be so much better."
)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def sweep(file: str, model: str, bandwidths: tuple[float, ...], objective: str, margin: float, as_json: bool) -> None:
    """Plan, deploy and measure MODEL at each bandwidth, beside each device alone.

    MODEL is as for `splitnet plan`; py:testbed.models:cnn, :vit and :bert are at hand.
    """
    import torch
    from testbed.cpu import hurried
    from testbed.sweep import points_json, sweep_text
    from testbed.sweep import sweep as run

    import partitioner

    torch.set_num_threads(1)
    say = lambda text: click.echo(text, err=True)  # noqa: E731
    with hurried() as ahead:
        if not ahead:
            say("note: this process cannot go before others; on a busy machine its latencies are longer")
        points = []
        rates = [mbit * 1e6 / 8 for mbit in bandwidths]
        for point in run(load(file), partitioner.load_model(model), rates, objective, say, margin=margin):
            points.append(point)
            rate = f"{point.bandwidth_bytes_per_s * 8 / 1e6:g} Mbit/s"
            say(f"{rate}: {' > '.join(point.chosen.nodes)}, {point.ratio:.2f} of the best device alone")
            if point.reason:
                say(f"  {point.reason}")
    click.echo(points_json(points) if as_json else f"{objective}, predicted -> measured\n{sweep_text(points)}")


def _describe(spec: BedSpec, bed: Testbed) -> list[str]:
    rows = [("node", "address", "CPU share", "threads", "memory")]
    for node in spec.nodes:
        share = f"{node.cpu:g} cores" if node.cpu else "all"
        rows.append(
            (node.name, bed.addresses[node.name], share, str(node.threads), bytes_text(node.memory_bytes) if node.memory_bytes else "-")
        )
    links = [("link", "bandwidth", "latency", "jitter")]
    for a, b in spec.pairs():
        shape = spec.shape(a, b)
        if shape != UNSHAPED:
            links.append(
                (f"{a or CLIENT_NAME} -> {b or CLIENT_NAME}", _rate(shape), seconds_text(shape.latency_s), seconds_text(shape.jitter_s))
            )
    lines = [*table(rows), "", *table(links)]
    if bed.relay is not None:
        lines += ["", measure_exactness(bed.relay, [spec.shape(*pair) for pair in spec.pairs()]).text()]
    return lines


def _rate(shape: LinkShape) -> str:
    return f"{shape.bandwidth_bytes_per_s * 8 / 1e6:g} Mbit/s"


def _wait(process: subprocess.Popen[bytes]) -> int:
    """Ctrl-C reaches the command as well, which ends in its own time."""
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue
        except SystemExit:
            process.terminate()
            process.wait()
            raise


def _run() -> NoReturn:
    try:
        main(standalone_mode=True)
    except SplitnetError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_status)
    raise AssertionError("click exits")


if __name__ == "__main__":
    _run()
