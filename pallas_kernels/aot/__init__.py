"""Ahead-of-time compilation of JAX functions for NVIDIA GPUs that are not in this machine.

compiled = compile_for("a100", step, params, on_host(moments), batch)
compiled.memory.device_total, compiled.fits, compiled.kernels, compiled.largest_temporaries()
"""

from pallas_kernels.aot.collectives import Collective as Collective
from pallas_kernels.aot.collectives import read_collectives as read_collectives
from pallas_kernels.aot.collectives import totals as totals
from pallas_kernels.aot.compile import CompiledFor as CompiledFor
from pallas_kernels.aot.compile import compile_for as compile_for
from pallas_kernels.aot.machine_code import Kernel as Kernel
from pallas_kernels.aot.machine_code import Loop as Loop
from pallas_kernels.aot.memory import Bytes as Bytes
from pallas_kernels.aot.memory import MemoryUse as MemoryUse
from pallas_kernels.aot.memory import Temporary as Temporary
from pallas_kernels.aot.memory import read_memory as read_memory
from pallas_kernels.aot.placement import on_host as on_host
from pallas_kernels.aot.processes import CompilerCrashedError as CompilerCrashedError
from pallas_kernels.aot.toolchain import CompilerUnavailableError as CompilerUnavailableError
from pallas_kernels.aot.toolchain import problem as problem
