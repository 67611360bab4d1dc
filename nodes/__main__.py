"""`python -m nodes` is `splitnet node`."""

from __future__ import annotations

import os
import sys

from nodes.cli import node
from splitnet.cli import run_command

if __name__ == "__main__":
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # as `splitnet` does
    sys.exit(run_command(node, prog_name="splitnet node"))
