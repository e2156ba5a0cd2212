"""`python -m qlora_jax.comparison.child WORDS...` becomes the command `python WORDS...`, which ends with its parent.

A training run would otherwise survive a worker that was killed, and keep its folder locked. The system sends SIGTERM
when the parent is gone (Linux), upon which a run saves a checkpoint.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Asks for the signal, and replaces this process by the command."""
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the system knew
        sys.exit(128 + signal.SIGTERM)
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])


if __name__ == "__main__":
    main()
