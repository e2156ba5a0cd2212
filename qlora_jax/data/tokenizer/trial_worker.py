"""Loads a tokenizer and encodes texts in a process with limits on memory and processor time (validation.py).

The standard input is a pickle of the text of tokenizer.json and of the texts to encode. An error is printed.
"""

import os
import pickle
import resource
import signal
import sys

import tokenizers

from qlora_jax.data.tokenizer.template_pipe import MEMORY_REACHED
from qlora_jax.sandbox.landlock_seccomp import seal_if_possible
from qlora_jax.sandbox.limits import limit_resources

_LOADING = 60.0  # seconds; ten times as long as the largest published files take
_LONGEST_ERROR = 300  # characters


def main(seconds: str, memory: str) -> None:
    """Runs the process with the fields of Limits that it needs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process
    limit_resources({resource.RLIMIT_AS: int(memory), resource.RLIMIT_CORE: 0})
    seal_if_possible(tokenizers)
    text, probes = pickle.load(sys.stdin.buffer)
    try:
        signal.setitimer(signal.ITIMER_PROF, _LOADING)
        tokenizer = tokenizers.Tokenizer.from_str(text)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        for probe in probes:
            signal.setitimer(signal.ITIMER_PROF, float(seconds))
            tokenizer.decode(tokenizer.encode(probe, add_special_tokens=False).ids)
    except MemoryError:
        os._exit(MEMORY_REACHED)
    except BaseException as error:  # a panic of the library does not derive from Exception
        sys.stdout.write(str(error)[:_LONGEST_ERROR])


if __name__ == "__main__":
    main(*sys.argv[1:])
