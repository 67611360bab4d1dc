"""Starts a node where it belongs, in place of this process: `launch.py [--group TASKS_FILE]... [--cpu N] -- COMMAND...`

Joins control groups by writing itself into them, keeps to one processor where it is told to, and asks the kernel for SIGTERM when the testbed dies, so that no node outlives it. The
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
    for flag, value in zip(options[::2], options[1::2], strict=True):
        if flag == "--group":
            with open(value, "w") as tasks:
                tasks.write(str(os.getpid()))
        elif flag == "--cpu":
            os.sched_setaffinity(0, {int(value)})
        else:
            sys.exit(f"unknown option {flag}")
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
