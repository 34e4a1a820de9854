"""`python -m tests.chaos.worker`: the real supervisor over the serving process of the chaos tests."""

from __future__ import annotations

import sys

from worker.supervisor import main

if __name__ == "__main__":
    sys.exit(main((sys.executable, "-m", "tests.chaos.serving")))
