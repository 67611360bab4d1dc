"""The testbed: real node processes on this machine, with CPU shares, memory limits and links as a small TOML file describes them.

`spec` reads the file, `bed` starts and stops everything, `relay` (a process of its own) carries and shapes what the nodes send each
other, `kernel` shapes with real queueing disciplines instead, `cpu` gives out shares, `measuring` and `sweep` run models on it. What it
can and cannot show: docs/testbed.md.
"""

from __future__ import annotations
