"""The testbed is part of scripts/, which is no package: its folder is put on the path, as `python scripts/testbed.py` does."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
