"""Compiles strangers' grammars in another process first, which may run out of time, memory or stack.

llguidance bounds its work, but some intersections of expressions take it for ever, and long chains of rules overflow
the stack. Run as a program, this module is that process: it answers each line, a grammar as JSON, with an empty one.
"""

import json
import resource
import signal
import subprocess
import sys
import threading
import weakref

import llguidance

from qlora_jax.sandbox.limits import limit_resources, python_environment

SECONDS = 1.0  # processor time per grammar
_MEMORY = 1 << 30
# Threads of a server have twice as much, so they can compile what was compiled with this.
_STACK = 4 << 20
_STEPS = 8  # a reply of this many tokens is tried
LIMITS = llguidance.LLParserLimits(max_lexer_states=50_000, verbose_errors=False)  # 2 kB each


class Trial:
    """A process that tries grammars; it starts with the first, and again after one that ended it."""

    def __init__(self):
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def check(self, grammar: str) -> None:
        """Raises ValueError if compiling the grammar, in llguidance's own form, takes too long or ends the process."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", __name__],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    env=python_environment(),
                )
                weakref.finalize(self, _end, self._process)
            if not _answers(self._process, grammar):
                _end(self._process)
                raise ValueError("too complex: compiling it takes too much time, memory or stack")


def _answers(process: "subprocess.Popen[bytes]", grammar: str) -> bool:
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(json.dumps(grammar).encode() + b"\n")
        process.stdin.flush()
    except BrokenPipeError:
        return False
    return process.stdout.readline() == b"\n"


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.communicate()


class _Bytes:
    """A tokenizer whose tokens are bytes, in the form that llguidance reads."""

    is_tokenizer_wrapper = True
    eos_token_id, bos_token_id = 256, None
    tokens = (*(bytes([value]) for value in range(256)), b"<end>")
    special_token_ids = (256,)

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


def _try(tokenizer: llguidance.LLTokenizer, grammar: str) -> None:
    matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)
    for _ in range(_STEPS):
        allowed = [token for token, bias in enumerate(matcher.compute_logit_bias()) if bias]
        if not allowed or matcher.is_stopped():
            break
        matcher.consume_token(allowed[len(allowed) // 2])


def main() -> None:
    """Tries the grammars of the standard input until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process
    limit_resources({resource.RLIMIT_AS: _MEMORY, resource.RLIMIT_CORE: 0})
    threading.stack_size(_STACK)
    tokenizer = llguidance.LLTokenizer(_Bytes(), slices=[])  # pyright: ignore[reportArgumentType]
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        thread = threading.Thread(target=_try, args=(tokenizer, json.loads(line)))
        thread.start()
        thread.join()
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write("\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
