"""`python -m worker`: the one way to start a worker."""

from __future__ import annotations

import argparse
import sys

from worker.supervisor import main

if __name__ == "__main__":
    argparse.ArgumentParser(
        prog="python -m worker",
        description="Answers the questions in one model's queue until SIGTERM.",
        epilog="Settings are environment variables, such as PRISM_BROKER_URL: docs/settings.md.",
    ).parse_args()
    sys.exit(main())
