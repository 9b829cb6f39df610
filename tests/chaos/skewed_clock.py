"""Runs a Python command whose clock is wrong by some seconds: `python -m tests.chaos.skewed_clock -0.75 python -m ...`.

Before anything is imported, since much is imported as `from time import time`. libfaketime would reach C as well, but
its waits hang or fail.
"""

import runpy
import sys
import time

if __name__ == "__main__":
    ahead_seconds, true_time = float(sys.argv[1]), time.time
    time.time = lambda: true_time() + ahead_seconds
    sys.argv = sys.argv[4:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
