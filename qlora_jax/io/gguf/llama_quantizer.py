"""Quantizes GGUF files with llama.cpp's own quantizer, from the package llama-cpp-python.

It gives each tensor of a mixture such as Q4_K_M a type by its place in the model.
"""

import errno
import importlib.util
import math
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
from safetensors.numpy import save

from qlora_jax.atomic_files import sync_tree, write_bytes, write_error
from qlora_jax.io.gguf.expert_stacks import stack_name
from qlora_jax.io.gguf.header import parse_header
from qlora_jax.io.gguf.writer import GgufSpec, write_outline

SOURCE_DTYPE = "float16"  # dtype of the file that is quantized
NO_IMPORTANCE: Mapping[str, np.ndarray] = MappingProxyType({})
BUFFER_BYTES = 256 << 20  # rows of a tensor in f32 that the quantizer holds at once
SUPER_BLOCK, BLOCK = 256, 32  # weights of a block of the K types, and of iq4_nl
STAGE = "quantizing"
TENSOR = re.compile(r"\[ *\d+/ *\d+\] (?P<name>\S+) ")
PLANNED = re.compile(TENSOR.pattern + r".* type = +(?P<stored>\w+),.*?(?:\((?P<planned>\w+)\))?$", re.MULTILINE)
WORKER = Path(__file__).with_name("llama_quantize_worker.py")
FULL_BYTES = 1 << 20  # a disk with less left is full


def check_quantizer(dtype: str) -> None:
    """Raises ValueError if a type requires llama.cpp's quantizer, which is not installed."""
    if importlib.util.find_spec("llama_cpp") is None:
        raise ValueError(
            f"dtype: {dtype} requires llama.cpp's quantizer (found no package llama_cpp, expected llama-cpp-python). "
            'Run pip install "qlora-jax[gguf-quantize]", or use --dtype q8_0'
        )


def quantize_file(
    source: Path,
    target: Path,
    dtype: str,
    progress: Callable[..., None],
    importance: Mapping[str, np.ndarray] = NO_IMPORTANCE,
) -> None:
    """Quantizes the GGUF file `source`, in 16 bits, to the new file `target`.

    llama.cpp maps `source` and holds at most BUFFER_BYTES of it in f32.

    Args:
      dtype: a name of llama.cpp's, such as `config.exports.MIXTURES`.
      progress: called for each tensor with (bytes done, bytes in all, its name, STAGE).
      importance: f32, the importance of each column of some tensors, by their names in the file.

    Raises:
      ValueError: llama.cpp cannot quantize the file; has its last line.
      OSError: `target` cannot be written.
    """
    columns = target.with_name("importance.safetensors")
    write_bytes(columns, save({**importance}))
    command = [sys.executable, "-P", str(WORKER), str(source), str(target), dtype, str(BUFFER_BYTES), str(columns)]
    try:
        status, line = _run(command, {info.name: info.nbytes for info in parse_header(source).tensors}, progress)
    finally:
        columns.unlink()
    if status:
        raise _failure(target, dtype, line.strip())
    sync_tree(target.parent)


def mixture_types(spec: GgufSpec, dtype: str) -> dict[str, str]:
    """Returns the type that llama.cpp's quantizer gives each tensor of a model, by Hugging Face's name.

    llama.cpp itself says so, for a file without weights, which needs no space on the disk.

    Args:
      dtype: a name of llama.cpp's, such as `config.exports.MIXTURES`.

    Raises:
      ValueError: the quantizer is not installed, or refuses the model.
    """
    check_quantizer(dtype)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "outline.gguf")
        write_outline(source, spec, SOURCE_DTYPE)
        command = [sys.executable, "-P", str(WORKER), str(source), "", dtype, str(BUFFER_BYTES), ""]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace", check=False)
        if done.returncode:
            raise _failure(source, dtype, done.stderr.strip().rpartition("\n")[2])
    found = {match["name"]: match["planned"] or match["stored"] for match in PLANNED.finditer(done.stderr)}
    return {name: found[stack_name(tensor.name)].upper() for name, tensor in spec.tensors.items()}


def _run(command: Sequence[str], sizes: Mapping[str, int], progress: Callable[..., None]) -> tuple[int, str]:
    """Returns (exit status, last line of the log) of the quantizer."""
    done, line = 0, ""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace") as process:
        try:
            assert process.stderr is not None
            for line in process.stderr:
                if match := TENSOR.match(line):
                    done += sizes[match["name"]]
                    progress(done, sum(sizes.values()), match["name"], STAGE)
        except BaseException:
            process.kill()
            raise
    return process.returncode, line


def _failure(target: Path, dtype: str, line: str) -> Exception:
    """Returns the error of a quantizer that ended with `line`; a disk error has no reason in it but its type."""
    if "iostream error" not in line:
        return ValueError(f"dtype: llama.cpp cannot quantize the model to {dtype} ({line}). Use --dtype q8_0")
    full = shutil.disk_usage(target.parent).free < FULL_BYTES
    written = target.stat().st_size if target.exists() else None
    return write_error(OSError(errno.ENOSPC if full else errno.EIO, line), target, written)


def types_note(path: Path, dtype: str) -> str:
    """Returns a line on the size of a quantized file, the types in it, and rows that are not whole blocks."""
    matrices = [info for info in parse_header(path).tensors if len(info.shape) > 1]
    counts = Counter(info.type.name.lower() for info in matrices)
    types = ", ".join(f"{count} {name}" for name, count in counts.most_common())
    bits = 8 * sum(info.nbytes for info in matrices) / sum(math.prod(info.shape) for info in matrices)
    line = f"{dtype}: {path.stat().st_size / 1e6:,.0f} MB, {bits:.1f} bits per weight (matrices: {types})"
    block = SUPER_BLOCK if any(name.endswith("_k") for name in (dtype, dtype.rpartition("_")[0])) else BLOCK
    odd = sum(info.shape[-1] % block > 0 for info in matrices)
    return line + f"; {odd} of them have rows that are not whole blocks of {block}, and got a larger type" * (odd > 0)
