"""Writing a folder so that it is there whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """Yields an empty folder that takes the name `target` when the block ends well; after an error nothing is left.

    Raises:
      ValueError: `target` is there already and not empty.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{target} is there already and not empty: nothing is overwritten, choose another output")
    target.parent.mkdir(parents=True, exist_ok=True)
    stage = target.with_name(f".{target.name}.partial-{os.getpid()}")
    stage.mkdir()
    try:
        yield stage
        if target.exists():
            target.rmdir()
        stage.rename(target)
    finally:
        shutil.rmtree(stage, ignore_errors=True)  # renamed away where all went well
