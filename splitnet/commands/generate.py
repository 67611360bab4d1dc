"""`splitnet generate`: continue a prompt with a deployed decoder model, token by token."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from splitnet.errors import BadInput, BadPlan, MissingExtra
from splitnet.plan import Plan

if TYPE_CHECKING:
    from splitnet.generation_plan import Generation

__all__ = ["generate"]

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what stands for the first bytes of a character of several


@click.command()
@click.argument("plan", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--prompt", help="The text to continue; '-' reads it from standard input. Needs the model's tokenizer.json.")
@click.option("--ids", help="The prompt as token ids, as 1,2,3; answers with ids.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=64, show_default=True, help="At most so many new tokens.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 takes the most likely token each time.")
@click.option("--top-p", type=float, default=1.0, show_default=True, help="Draw among the fewest tokens whose probabilities reach it.")
@click.option("--top-k", type=int, default=0, show_default=True, help="Draw among so many of the most likely tokens; 0: all.")
@click.option("--repetition-penalty", type=float, default=1.0, show_default=True, help="Makes tokens that were there less likely; 1: not.")
@click.option("--seed", type=int, help="The same seed draws the same tokens.  [default: another each time]")
@click.option("--ignore-eos", is_flag=True, help="Go on after the model's own end.")
@click.option("--tokenizer", type=click.Path(path_type=Path), help="The directory with tokenizer.json.  [default: as the plan says]")
@click.option("--deployment", default="", help="The deployment's name.  [default: the model's]")
@click.option(
    "--timeout", "timeout_s", type=click.FloatRange(min=0, min_open=True), default=600.0, show_default=True, help="Seconds for the answer."
)
@click.option("--json", "as_json", is_flag=True, help="Print tokens, text and times as one JSON object.")
def generate(
    plan: Path, prompt: str | None, ids: str | None, max_tokens: int, temperature: float, top_p: float, top_k: int, repetition_penalty: float, seed: int | None,
    ignore_eos: bool, tokenizer: Path | None, deployment: str, timeout_s: float, as_json: bool,
) -> None:  # fmt: skip
    """Continue a prompt with the decoder model of a deployed PLAN, token by token.

    \b
    Examples:
      splitnet generate plan.json --prompt "Once upon a time" --max-tokens 100
      splitnet generate plan.json --ids 1,15,204 --temperature 0.8 --seed 7
    """
    from splitnet.install import default_name
    from splitnet.sync import Client

    loaded = Plan.load(plan)
    if loaded.generation is None:
        raise BadPlan(f"{plan} is of a model that takes tensors, it generates no text", remedy="use `splitnet run`")
    if (prompt is None) == (ids is None):
        raise BadInput("expected one of --prompt and --ids")
    words = _tokenizer(loaded.generation, tokenizer) if prompt is not None else None
    if words is not None:
        given = words.encode(sys.stdin.read() if prompt == "-" else prompt).ids
    else:
        assert ids is not None
        given = _ids(ids)
    shown, found, times = "", list[int](), [time.perf_counter()]
    with Client(loaded.ingress.address, deployment or default_name(loaded.model), timeout_s=timeout_s) as client:
        client.connect()
        times[0] = time.perf_counter()
        for token in client.generate(
            given, max_tokens, temperature, top_p, top_k, repetition_penalty, seed, ignore_eos=ignore_eos, timeout_s=timeout_s
        ):
            times.append(time.perf_counter())
            found.append(token)
            if as_json:
                continue
            if words is None:
                click.echo(("," if len(found) > 1 else "") + str(token), nl=False)
                continue
            text = words.decode(found)
            if not text.endswith(_UNFINISHED):
                click.echo(text[len(shown) :], nl=False)
                shown = text
    ttft_s = times[1] - times[0] if found else 0.0
    tpot_s = (times[-1] - times[1]) / (len(found) - 1) if len(found) > 1 else 0.0
    if as_json:
        document = {"tokens": found, "prompt_tokens": len(given), "ttft_s": ttft_s, "tpot_s": tpot_s}
        click.echo(json.dumps(document | ({"text": words.decode(found)} if words is not None else {})))
        return
    click.echo("")
    rate = f", then {1 / tpot_s:.3g} tokens/s" if tpot_s else ""
    click.echo(f"{len(found)} tokens after {len(given)}; the first came after {ttft_s:.3g} s{rate}", err=True)


def _ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.replace(" ", "").split(",") if part]
    except ValueError:
        raise BadInput(f"--ids: expected token ids as 1,2,3, got {text!r:.80}") from None


def _tokenizer(generation: Generation, given: Path | None) -> Any:
    folder = given or Path(generation.tokenizer)
    path = folder if folder.is_file() else folder / "tokenizer.json"
    if not path.is_file():
        raise BadInput(
            f"--prompt: there is no {path}", remedy="say where the model's tokenizer is (--tokenizer), or give token ids (--ids)"
        )
    if importlib.util.find_spec("tokenizers") is None:
        raise MissingExtra("--prompt: the package tokenizers is not installed", remedy="pip install tokenizers, or give token ids (--ids)")
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more exact
        raise BadInput(f"--prompt: {path} is no tokenizer: {str(error)[:200]}") from error
