"""The process that runs XLA's compiler for one architecture; `main` is all that it does.

One process an architecture, since Mosaic GPU (jaxlib 0.11.2 and 0.12.0.1) keeps two things for the life of a process:
the architecture that it first assembled for, and the machine code of each kernel, whatever it was asked for later. A
kernel for an A100 that comes after one for an H100 would be Hopper code, without a word.

Reads pickled Requests from stdin and writes pickled Replies to stdout, until stdin ends; both are its parent's.
"""

import importlib
import os
import pickle
import signal
import sys
from typing import Any, NamedTuple

import jax
import numpy as np
from jax._src import compiler  # what jax.stages.Lowered.compile calls; a module that was lowered elsewhere needs it too
from jax._src.interpreters import mlir
from jaxlib import xla_client
from jaxlib.mlir import ir

from pallas_kernels.aot import memory, toolchain
from pallas_kernels.gpu_specs import Card


class Request(NamedTuple):
    """A module of StableHLO, as MLIR bytecode, to be compiled for so many of a card, which run one program together."""

    card: Card
    module: bytes
    devices: int


class Program(NamedTuple):
    """What XLA made: the optimized HLO, the executable as it serializes it, and bytes by kind."""

    text: str
    serialized: bytes
    memory: memory.MemoryUse


class Reply(NamedTuple):
    """A program, or the compiler's message where there is none."""

    program: Program | None
    error: str = ""


def build(request: Request) -> Program:
    """Compiles, in this process.

    Raises:
      jax.errors.JaxRuntimeError: the compiler refuses the module.
    """
    devices = toolchain.devices_for(request.card, request.devices)
    assignment = np.array([[device.id for device in devices]])
    options = compiler.get_compile_options(1, len(devices), device_assignment=assignment)
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
    """Serves until stdin ends."""
    # It tells Mosaic's compiler, by the environment, where its runtime lies; a parent that has made no kernel yet has
    # not, and the first program fixes what later ones find. Imported here, for it takes a second.
    importlib.import_module("jax.experimental.mosaic.gpu")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which then closes stdin
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what compilers print is no reply
    while True:
        try:
            request = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(_answer(request), replies)
        replies.flush()
