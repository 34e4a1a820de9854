"""Kills the supervisor's children when the supervisor itself was killed and could not end them.

A process of its own, in a session of its own, run as a plain script so that it starts in milliseconds.
Standard input tells it which process groups live: `+123` started, `-123` ended. The end of the input
means that the supervisor is gone, however it went: what has not ended by then is killed.
"""

import contextlib
import os
import signal
import sys


def main() -> None:
    living: set[int] = set()
    for line in sys.stdin:
        group = int(line[1:])
        if line.startswith("+"):
            living.add(group)
        else:
            living.discard(group)
    for group in living:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    main()
