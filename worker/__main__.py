"""`python -m worker`: the one way to start a worker."""

from __future__ import annotations

import sys

from worker.supervisor import main

if __name__ == "__main__":
    sys.exit(main())
