"""How long a fresh interpreter takes to `import splitnet`, to import the client, and to print the list of commands.

    python scripts/bench/import_time.py [--runs 15] [--json] [--limit-s 0.3]

Each figure is the median over fresh interpreters, less the median of an interpreter that imports nothing. With --limit-s the exit
status is 1 when `import splitnet` takes longer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

PROGRAMS = {
    "nothing": "pass",
    "import splitnet": "import splitnet",
    "from splitnet import Plan": "from splitnet import Plan",
    "from splitnet import Client": "from splitnet import Client",
    "splitnet --help": "import sys; sys.argv = ['splitnet', '--help']; from splitnet.cli import main; main()",
}


def seconds(program: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=15, help="interpreters per figure")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--limit-s", type=float, help="exit with 1 when `import splitnet` takes longer")
    options = parser.parse_args()

    samples: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    for program in PROGRAMS.values():
        seconds(program)  # warms the file cache, and compiles
    for _ in range(options.runs):
        for name, program in PROGRAMS.items():  # interleaved, so that a busy moment falls on all
            samples[name].append(seconds(program))
    base = statistics.median(samples["nothing"])
    figures = {f"{name} (s)": round(statistics.median(values) - (base if name != "nothing" else 0), 4) for name, values in samples.items()}
    if options.json:
        print(json.dumps(figures, indent=2))
    else:
        for name, figure in figures.items():
            print(f"{name:<32} {figure:.3f}")
    return 1 if options.limit_s is not None and figures["import splitnet (s)"] > options.limit_s else 0


if __name__ == "__main__":
    sys.exit(main())
