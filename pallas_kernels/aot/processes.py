"""The compiler processes: one per architecture, started on first use, ended with this process."""

import atexit
import contextlib
import functools
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import jax

from pallas_kernels.aot.worker import Program, Reply, Request

_ROOT = Path(__file__).resolve().parents[2]  # the folder that contains pallas_kernels


class CompilerCrashedError(RuntimeError):
    """XLA's compiler ended its process; its last output is on stderr."""


def build(request: Request) -> Program:
    """Compiles a module in the process of the card's architecture.

    Raises:
      jax.errors.JaxRuntimeError: the compiler rejects the module.
      CompilerCrashedError: the compiler ended its process, as LLVM does for instructions that a card does not have.
    """
    reply = _compiler(request.card.architecture).ask(request)
    if reply.program is None:
        raise jax.errors.JaxRuntimeError(reply.error)
    return reply.program


@functools.cache
def _compiler(architecture: str) -> "_Compiler":
    compiler = _Compiler(architecture)
    atexit.register(compiler.end)
    return compiler


class _Compiler:
    """One compiler process, restarted after it has ended."""

    def __init__(self, architecture: str) -> None:
        self.architecture = architecture
        self.lock = threading.Lock()  # one request at a time
        self.process: subprocess.Popen[bytes] | None = None

    def ask(self, request: Request) -> Reply:
        with self.lock:
            process = self.process = self.process or _start()
            assert process.stdin is not None and process.stdout is not None
            try:
                pickle.dump(request, process.stdin)
                process.stdin.flush()
                return pickle.load(process.stdout)
            except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:  # ended between, or inside, messages
                code = self.end()
                raise CompilerCrashedError(
                    f"XLA's compiler for {self.architecture} ended with exit code {code}. Its last output is on stderr."
                ) from error

    def end(self) -> int | None:
        process, self.process = self.process, None
        if process is None:
            return None
        # Closes the pipes, which ends the process, and waits for it. A process that is dead refuses what is still
        # in the buffer of its pipe.
        with contextlib.suppress(BrokenPipeError), process:
            pass
        return process.returncode


def _start() -> subprocess.Popen[bytes]:
    path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    # XLA warns about programs that do not fit a device, which plans compile on purpose. Crashes are still reported.
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3"}
    environment = os.environ | quiet | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    # Not -m: the module would be __main__ there, and its pickled classes unknown here.
    command = [sys.executable, "-c", "from pallas_kernels.aot import worker; worker.main()"]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
