from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

_FAULTS = """
import resource, sys
import numpy as np
from nodes.memory import keep_buffers

if sys.argv[1] == "keep":
    keep_buffers()

def once():
    one, two = np.empty(3 << 20, np.uint8), np.empty(3 << 20, np.uint8)
    one[:] = two[:] = 1

for _ in range(3):
    once()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    once()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


_WEIGHTS = """
import numpy as np, psutil
from nodes.memory import give_back, keep_buffers

keep_buffers()
weights = [np.ones(1 << 18) for _ in range(100)]  # 200 MiB
later = np.ones(1 << 18)
full = psutil.Process().memory_info().rss
del weights
give_back()
print((full - psutil.Process().memory_info().rss) >> 20)
"""


def page_faults(how: str) -> int:
    return int(subprocess.run([sys.executable, "-c", _FAULTS, how], capture_output=True, check=True, text=True).stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc's allocator")
def test_buffers_that_come_and_go_cost_no_page_faults() -> None:
    assert page_faults("default") > 20 * 768, "else nothing is shown: 6 MiB are 1536 pages"
    assert page_faults("keep") < 768


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc's allocator")
def test_weights_that_have_gone_are_given_back() -> None:
    freed_mib = int(subprocess.run([sys.executable, "-c", _WEIGHTS], capture_output=True, check=True, text=True).stdout)
    assert freed_mib > 180
