"""What `splitnet plan` lets people ask for: options, and what `partitioner.plan` takes of them."""

from __future__ import annotations

import dataclasses
import math
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from partitioner.options import Share
from splitnet.codecs import codec_names
from splitnet.errors import BadInput
from splitnet.noise import REQUEST, SAMPLE, Noise

if TYPE_CHECKING:
    from partitioner.cost import CodecFigures

__all__ = ["wish_options", "wishes"]

_Command = TypeVar("_Command", bound=Callable[..., Any])
_Wish = TypeVar("_Wish")
_FILE = click.Path(dir_okay=False, path_type=Path)
_DELTA = 1e-6
_UNITS = {"": 1, "B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


class _Stages(click.ParamType[Any]):
    name = "n|a..b"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | range:
        if isinstance(value, int | range):
            return value
        low, dots, high = str(value).partition("..")
        if not low.isdigit() or (dots and not high.isdigit()) or int(low) < 1 or (dots and int(high) < int(low)):
            self.fail(f"{value!r} is neither a number of at least 1 nor a range as 2..4", param, ctx)
        return range(int(low), int(high) + 1) if dots else int(low)


_OPTIONS = (
    click.option("--stages", type=_Stages(), help="Exactly so many stages, even where fewer would be better; or from..to, as 2..4."),
    click.option("--max-stages", type=click.IntRange(min=1), help="At most so many stages."),
    click.option(
        "--at", multiple=True, metavar="OPERATOR|MODULE", help="Cut by hand before this operator or module; may be given several times, in order."
    ),
    click.option("--on", "nodes", multiple=True, metavar="NODE", help="With --at: the nodes of the stages, in order."),
    click.option("--pin", multiple=True, metavar="PATTERN=NODE", help="This operator or module (* and ? allowed) runs on this node."),
    click.option("--forbid", multiple=True, metavar="NODE[=PATTERN]", help="Leave this node out; or only never run PATTERN on it."),
    click.option("--input-at", default="", metavar="NODE", help="The node that takes requests: the first stage runs there."),
    click.option("--output-at", default="", metavar="NODE", help="The node that makes the answer."),
    click.option(
        "--private", metavar="NODE=K|MODULE", help="The raw input and the first K operators, or all up to MODULE, stay on this node."
    ),
    click.option("--noise-epsilon", type=float, help="With --private: what leaves the node for others gets noise, and tells little of a sample: (epsilon, delta)-differential privacy of each. See `splitnet privacy`."),
    click.option("--noise-delta", type=float, help=f"With --noise-epsilon.  [default: {_DELTA:g}]"),
    click.option("--noise-clip", type=float, metavar="NORM", help="With --noise-epsilon: what leaves is scaled down to at most this norm; `splitnet privacy` suggests one."),
    click.option("--noise-per", type=click.Choice([SAMPLE, REQUEST]), help=f"With --noise-epsilon: whether it holds for each sample of a batch, or for a request as a whole.  [default: {SAMPLE}]"),
    click.option("--taken", multiple=True, metavar="NODE=SIZE[,SHARE]", help="Memory and share of time (0 to 1) that others use there."),
    click.option("--codec", "link_codecs", multiple=True, metavar="A->B=CODEC[,CODEC]", help="The codecs that may be used on this link."),
    click.option("--codec-figures", type=_FILE, help="A TOML file: per codec a table with ratio, encode_bytes_per_s, decode_bytes_per_s, error."),
    click.option("--max-accuracy-loss", type=Share(), help="How much the task may lose, as 0.5% or 0.005; see `splitnet calibrate`."),
    click.option("--lossless", is_flag=True, help="Only codecs that change no bit: the answers are the whole model's."),
    click.option(
        "--tolerance", type=click.FloatRange(min=0, max=0.5), default=0.01, show_default=True,
        help="Of plans within this share of the best, take what sends least.",
    ),
    click.option(
        "--margin", type=click.FloatRange(min=0, max=0.9), default=0.1, show_default=True,
        help="A split must be predicted to be better than one node alone by more than this share.",
    ),
)  # fmt: skip


def wish_options(command: _Command) -> _Command:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def wishes(given: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of `partitioner.plan`. Raises BadInput naming the option that is wrong."""
    found: dict[str, Any] = {
        name: given[name]
        for name in ("stages", "max_stages", "input_at", "output_at", "max_accuracy_loss", "lossless", "tolerance", "margin")
    }
    found["at"], found["nodes"] = given["at"] or None, given["nodes"] or None
    found["pin"] = dict(_pair(text, "--pin", "PATTERN=NODE") for text in given["pin"])
    if len(found["pin"]) != len(set(given["pin"])):
        twice = [pattern for pattern in found["pin"] if sum(text.startswith(pattern + "=") for text in set(given["pin"])) > 1]
        raise BadInput(f"--pin: {twice[0]!r} is pinned to more than one node", remedy="give one node for it")
    found["forbid"] = tuple(text for text in given["forbid"] if "=" not in text)
    patterns = [_pair(text, "--forbid", "NODE=PATTERN") for text in given["forbid"] if "=" in text]
    if patterns and found["forbid"]:
        patterns += [(node, "*") for node in found["forbid"]]
    if patterns:
        found["forbid"] = {node: tuple(p for n, p in patterns if n == node) for node, _ in patterns}
    if given["private"]:
        node, which = _pair(given["private"], "--private", "NODE=K|MODULE")
        found["private"] = node, int(which) if which.isdigit() else which
    if (noise := _noise(given)) is not None:
        found["noise"] = noise
    found["taken"] = _once("--taken", [_taken(text) for text in given["taken"]])
    pairs = _once("--codec", [(f"{a}->{b}", ((a, b), codecs)) for (a, b), codecs in map(_link, given["link_codecs"])])
    found["link_codecs"] = dict(pairs.values())
    if given["codec_figures"]:
        found["codecs"] = _read_figures(given["codec_figures"])
    return found


def _noise(given: Mapping[str, Any]) -> Noise | None:
    epsilon, clip = given.get("noise_epsilon"), given.get("noise_clip")
    if epsilon is None:
        for name in ("noise_delta", "noise_clip", "noise_per"):
            if given.get(name) is not None:
                raise BadInput(f"--{name.replace('_', '-')} is for noise", remedy="add --noise-epsilon")
        return None
    if given.get("generate"):
        raise BadInput("--noise-epsilon cannot be had with --generate: every token would be another release", remedy="leave it away")
    if clip is None:
        raise BadInput(
            "--noise-epsilon needs --noise-clip: the norm that what leaves may have at most",
            remedy="`splitnet privacy` suggests one for each cut",
        )
    return Noise(epsilon, _DELTA if given.get("noise_delta") is None else given["noise_delta"], clip, given.get("noise_per") or SAMPLE)


def _once(option: str, pairs: Sequence[tuple[str, _Wish]]) -> dict[str, _Wish]:
    for name, _ in pairs:
        if sum(name == other for other, _ in pairs) > 1:
            raise BadInput(f"{option}: {name!r} stands there twice", remedy="give all of it at once")
    return dict(pairs)


def _pair(text: str, option: str, form: str) -> tuple[str, str]:
    left, equals, right = text.rpartition("=")
    if not (left and equals and right):
        raise BadInput(f"{option}: expected {form}, got {text!r}")
    return left, right


def _taken(text: str) -> tuple[str, tuple[float, float]]:
    node, figures = _pair(text, "--taken", "NODE=SIZE[,SHARE]")
    size, _, share = figures.partition(",")
    number = size.rstrip("BbGgIiKkMm")
    try:
        taken = float(number) * _UNITS[size[len(number) :].upper()], float(share or 0)
    except (ValueError, KeyError):
        taken = math.nan, 0.0
    if not 0 <= taken[0] < math.inf:
        raise BadInput(f"--taken: expected NODE=SIZE[,SHARE] as pi=512MiB,0.3, got {text!r}")
    return node, taken


def _link(text: str) -> tuple[tuple[str, str], tuple[str, ...]]:
    pair, codecs = _pair(text, "--codec", "A->B=CODEC")
    a, arrow, b = pair.partition("->")
    if not (a and arrow and b):
        raise BadInput(f"--codec: expected A->B=CODEC as pi->server=zstd, got {text!r}")
    return (a, b), tuple(codecs.split(","))


def _read_figures(path: Path) -> dict[str, CodecFigures]:
    from partitioner.cost import CodecFigures

    try:
        document = tomllib.loads(path.read_text())
    except OSError as error:
        raise BadInput(f"cannot read {str(path)!r}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} is not TOML: {error}") from None
    fields = [field.name for field in dataclasses.fields(CodecFigures)]
    for codec, figures in document.items():
        if codec not in codec_names():
            raise BadInput(f"{path}: there is no codec {codec!r}; there are {', '.join(codec_names())}")
        if not isinstance(figures, dict):
            raise BadInput(f"{path}: {codec}: expected a table with {', '.join(fields)}, got {figures!r:.100}")
        for name, figure in figures.items():
            if name not in fields:
                raise BadInput(f"{path}: {codec} has no figure {name!r}; there are {', '.join(fields)}")
            given = figure.values() if isinstance(figure, dict) else (figure,)
            if not all(isinstance(number, int | float) and not isinstance(number, bool) for number in given):
                raise BadInput(f"{path}: {codec}.{name}: expected a number, or a table of numbers by name, got {figure!r:.100}")
    return {codec: CodecFigures(**figures) for codec, figures in document.items()}
