"""Where this checkout is, for processes that run from it what is not installed: the echo worker, faults to include."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Never an empty entry, which would be the working directory.
PYTHONPATH = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(ROOT))))
