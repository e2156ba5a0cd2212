"""Runs `python WORDS...` as `... end_with_parent PARENT WORDS...`, and ends it with the process PARENT.

A training run would otherwise survive a worker that was killed, and keep its folder locked. The system sends SIGTERM
when the parent is gone (Linux), and the run then saves a checkpoint.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main(parent: int, words: list[str]) -> None:
    """Asks for the signal, and replaces this process by the command.

    Args:
      parent: id of the process that starts this one. It may have ended before this process could ask for its id.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the system knew
        sys.exit(128 + signal.SIGTERM)
    os.execv(sys.executable, [sys.executable, *words])


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
