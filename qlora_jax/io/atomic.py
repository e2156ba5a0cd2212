"""Writes a folder completely or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """Yields an empty folder that is renamed to `target` when the block succeeds, and removed when it raises.

    Raises:
      ValueError: `target` exists and is not empty.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{target}: exists and is not empty, and exports never overwrite. Choose another output")
    target.parent.mkdir(parents=True, exist_ok=True)
    stage = target.with_name(f".{target.name}.partial-{os.getpid()}")
    stage.mkdir()
    try:
        yield stage
        if target.exists():
            target.rmdir()
        stage.rename(target)
    finally:
        shutil.rmtree(stage, ignore_errors=True)  # after success it is renamed, so there is nothing to remove
