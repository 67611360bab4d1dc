"""Fuzzes every decoder: scripts/fuzz.py [--inputs 1000000] [--only NAME] [--seed 0]

Each input is a valid document with random damage. A decoder may take it, or refuse it with one of splitnet's own errors; anything else is a fault: another exception, a crash of
the process, more than 5 s for one input, or memory that grows. An input depends on the seed and its number alone (but for certificates and policies, whose
keys are new each time), so a fault can be played again: --only NAME --from NUMBER --inputs 1.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import multiprocessing
import random
import signal
import sys
import tempfile
import time
import traceback
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parent))

from fuzzing.mutating import mutated
from fuzzing.targets import Target, targets

from splitnet.errors import SplitnetError

HANG_S = 5.0
GROWTH_BYTES = 64 << 20
WARM = 2000


def fuzz(target: Target, inputs: int, seed: int = 0, first: int = 0, progress: Synchronized[int] | None = None) -> tuple[int, str]:
    """How many inputs were refused, and the fault; empty for none. Memory is looked at between the first thousands and the last."""
    refused, before = 0, 0
    for number in range(first, first + inputs):
        if progress is not None:
            progress.value = number
        if number - first == WARM:
            gc.collect()
            before = resident_bytes()
        data = mutated(random.Random(f"{seed} {target.name} {number}"), target.seeds)
        signal.setitimer(signal.ITIMER_REAL, HANG_S)
        try:
            target.run(data)
        except SplitnetError:
            refused += 1
        except Hang:
            return refused, f"input {number} took more than {HANG_S:g} s: {data[:200]!r}"
        except Exception:  # noqa: BLE001 - this is what is looked for
            return refused, f"input {number}: {traceback.format_exc()}{data[:200]!r}"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    gc.collect()
    if before and (grown := resident_bytes() - before) > GROWTH_BYTES:
        return refused, f"memory grew by {grown >> 20} MiB"
    return refused, ""


class Hang(BaseException):
    """Not an Exception, so that no decoder can take it for one of its own."""


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def _alarm(number: int, frame: FrameType | None) -> None:
    raise Hang


def _work(
    name: str, inputs: int, seed: int, first: int, progress: Synchronized[int], results: multiprocessing.Queue[tuple[int, str]]
) -> None:
    signal.signal(signal.SIGALRM, _alarm)
    with tempfile.TemporaryDirectory(prefix="splitnet-fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        results.put(fuzz(targets(Path(folder))[name], inputs, seed, first, progress))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--inputs", type=int, default=1_000_000, help="of all decoders together")
    parser.add_argument("--only", default="")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--from", dest="first", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        shares = {t.name: t.share for t in targets(Path(folder)).values() if options.only in ("", t.name)}
    report, started = [], time.monotonic()
    for name, share in shares.items():
        # In a process of its own: a crash must be seen, and be told apart from what went before.
        progress, results = multiprocessing.Value("Q", 0, lock=False), multiprocessing.Queue()
        each, began = math.ceil(options.inputs * share / sum(shares.values())), time.monotonic()
        worker = multiprocessing.Process(target=_work, args=(name, each, options.seed, options.first, progress, results))
        worker.start()
        worker.join()
        if worker.exitcode == 0:
            refused, fault = results.get(timeout=5)
        else:
            refused, fault = 0, f"the process ended with {worker.exitcode} at input {progress.value}"
        took_s = time.monotonic() - began
        report.append({"decoder": name, "inputs": each, "refused": refused, "seconds": round(took_s, 1), "fault": fault})
        if not options.json:
            print(f"{name:12} {each:9,} inputs  {refused:9,} refused  {took_s:6.1f} s  {fault or 'ok'}", flush=True)
    if options.json:
        print(json.dumps(report, indent=1))
    else:
        print(
            f"{sum(r['inputs'] for r in report):,} inputs in {time.monotonic() - started:.0f} s, {sum(bool(r['fault']) for r in report)} faults"
        )
    return int(any(r["fault"] for r in report))


if __name__ == "__main__":
    sys.exit(main())
