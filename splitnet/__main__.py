"""`python -m splitnet` is `splitnet`."""

from __future__ import annotations

import sys

from splitnet.cli import main

if __name__ == "__main__":
    sys.exit(main())
