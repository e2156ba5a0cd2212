"""Paths and environment variables of benchmarks that run an opponent in its Python environment."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from scripts.fetch_smollm2 import cache_dir

ROOT = Path(__file__).resolve().parents[3]
OPPONENTS = ROOT / "scripts/bench/opponents"
ORACLE = os.environ.get("QLORA_ORACLE_PYTHON", str(ROOT / ".oracle/bin/python"))
LLAMA_CPP = os.environ.get("QLORA_LLAMA_CPP_NATIVE_PYTHON", str(ROOT / ".llama_cpp_native/bin/python"))
OURS = "ours"


@contextlib.contextmanager
def compilation_caches(keep: bool) -> Iterator[dict[str, str]]:
    """Yields environment variables that name caches of compiled programs.

    Args:
      keep: use caches that outlive this run; otherwise empty ones, removed at the end.
    """
    with contextlib.ExitStack() as stack:
        folder = cache_dir() / "bench" if keep else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        yield {
            "QLORA_JAX_CACHE": str(folder / "ours"),
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "theirs"),
            "TOKENIZERS_PARALLELISM": "false",
        }
