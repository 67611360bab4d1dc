"""Starts a node where it belongs, in place of this process: `launch.py [--group TASKS_FILE]... -- COMMAND...`

Joins control groups by writing itself into them, and asks the kernel for SIGTERM when the testbed dies, so that no node outlives it. The
process id stays the same. Only the standard library: it runs before everything.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    split = sys.argv.index("--")
    options, command = sys.argv[1:split], sys.argv[split + 1 :]
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit("the testbed is gone already")
    for flag, group in zip(options[::2], options[1::2], strict=True):
        if flag != "--group":
            sys.exit(f"unknown option {flag}")
        with open(group, "w") as tasks:
            tasks.write(str(os.getpid()))
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
