"""Runs scripts of this folder, each in a fork of a process that has imported the oracle's libraries once.

Importing them takes longer than most scripts run. Reads requests from stdin, one JSON object per line: the script with
its arguments (`argv`), the environment (`env`), and the file for what it prints (`output`). Writes its status per line.
"""

import json
import os
import runpy
import sys
import traceback

import bitsandbytes  # noqa: F401
import peft  # noqa: F401
import torch  # noqa: F401
from transformers import AutoModelForCausalLM  # noqa: F401


def _run(request: dict) -> None:
    """Runs a script in this process, which it ends."""
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.clear()
    os.environ.update(request["env"])
    sys.argv = request["argv"]
    status = 1
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    """Serves requests until stdin ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keeps what scripts print out of the replies
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _run(json.loads(line))
        _, ended = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(ended), file=replies, flush=True)


main()
