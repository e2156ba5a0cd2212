"""Checks that all processes see the same run folder."""

import secrets
import time
from pathlib import Path

from qlora_jax.atomic_files import write_text
from qlora_jax.hosts.group import Group

_PREFIX = ".shared-"
SECONDS = 20.0  # network filesystems show a new file to other machines after a few seconds


def sees_first(group: Group, folder: Path, seconds: float = SECONDS) -> bool:
    """Returns True if this process can read a file that process 0 writes into its folder; all processes call this."""
    if group.processes == 1:
        return True
    name = group.gather("shared folder: name", f"{_PREFIX}{secrets.token_hex(8)}")[0]
    file = folder / name
    if group.is_first:
        write_text(file, name)
    try:
        group.meet("shared folder: written")
        seen = _appears(file, name, seconds)
        group.meet("shared folder: read")
        return seen
    finally:
        if group.is_first:
            file.unlink(missing_ok=True)


def _appears(file: Path, text: str, seconds: float) -> bool:
    """Returns True when the file has the text; False if it has not within `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            # Listing the folder makes a network filesystem look again.
            if file.name in {entry.name for entry in file.parent.iterdir()} and file.read_text("utf-8") == text:
                return True
        except OSError:
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
