"""The process that runs XLA's compiler for one architecture.

Each architecture has its own process, because Mosaic GPU (jaxlib 0.11.2 and 0.12.0.1) caches two things for the life of
a process: the first architecture that it assembled for, and the machine code of each kernel. A kernel for an A100 after
one for an H100 would silently be Hopper code.

`main` reads pickled Requests from stdin and writes pickled Replies to stdout until stdin ends.
"""

import importlib
import os
import pickle
import signal
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax._src import compiler  # as in jax.stages.Lowered.compile, for a module lowered in another process
from jax._src.interpreters import mlir
from jaxlib import xla_client
from jaxlib.mlir import ir

from pallas_kernels.aot import memory, toolchain
from pallas_kernels.gpu_specs import Card

CompilerOption = bool | int | float | str


class Request(NamedTuple):
    """A StableHLO module to compile for cards that run one program together.

    Fields:
      module: as MLIR bytecode.
      devices: the number of cards.
      options: compiler options by XLA's name.
    """

    card: Card
    module: bytes
    devices: int
    options: Mapping[str, CompilerOption]


class Program(NamedTuple):
    """XLA's result: the optimized HLO, the serialized executable, and bytes by kind."""

    text: str
    serialized: bytes
    memory: memory.MemoryUse


class Reply(NamedTuple):
    """A program, or the compiler's error message."""

    program: Program | None
    error: str = ""


def build(request: Request) -> Program:
    """Compiles a module in this process.

    Raises:
      jax.errors.JaxRuntimeError: the compiler rejects the module.
    """
    devices = toolchain.devices_for(request.card, request.devices)
    assignment = np.array([[device.id for device in devices]])
    options = compiler.get_compile_options(
        1, len(devices), device_assignment=assignment, env_options_overrides=dict(request.options)
    )
    with mlir.make_ir_context():
        module = ir.Module.parse(request.module)
        executable_devices: Any = xla_client.DeviceList(devices)
        made = devices[0].client.compile(module, executable_devices=executable_devices, compile_options=options)
    text = "\n\n".join(part.to_string() for part in made.hlo_modules())
    return Program(text, made.serialize(), memory.read_memory(made.get_compiled_memory_stats()))


def _answer(request: Request) -> Reply:
    try:
        return Reply(build(request))
    except jax.errors.JaxRuntimeError as error:
        return Reply(None, str(error))


def main() -> None:
    """Serves requests until stdin ends."""
    # This import sets the environment variable that names the folder of Mosaic's runtime. A parent that has made no
    # kernel has not set it, and the first program fixes it for later ones. It takes a second, so it is done here.
    importlib.import_module("jax.experimental.mosaic.gpu")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C, and then closes stdin
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # keeps what compilers print out of the replies
    while True:
        try:
            request = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(_answer(request), replies)
        replies.flush()
