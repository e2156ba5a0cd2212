"""Files of records that an interrupted tournament or study resumes from.

The first line holds the inputs that all records depend on. Every line ends with a digest of itself, and is on the disk
before `append` returns. A process that was killed while it wrote leaves half a line at the end, which is dropped.
"""

import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

from qlora_jax.atomic_files import LineFile, append_lines, sync_folder, write_text
from qlora_jax.line_digests import with_digest, without_digest
from qlora_jax.untrusted_json import decode_json, shorten

type Inputs = Mapping[str, str | int | float | bool | None]  # JSON values


class _Header(TypedDict):
    inputs: dict[str, str | int | float | bool | None]


class RecordFile[T]:
    """Records in a file; several threads may append.

    Attributes:
      path: the file.
      records: those that were in the file when it was opened, in order.
    """

    def __init__(self, path: Path, inputs: Inputs, kind: type[T]):
        """Opens the file, which is created if it does not exist.

        Args:
          inputs: all that the records depend on.
          kind: a TypedDict, the type of a record.

        Raises:
          ValueError: the file is of other inputs, or a line is damaged.
          OSError: the file cannot be read or written.
        """
        self.path, self.records = path, []
        self._lock = threading.Lock()
        path.parent.mkdir(exist_ok=True)  # only its own folder: an output that was deleted is not made anew
        sync_folder(path.parent.parent)
        lines = _whole_lines(path)
        if lines:
            # Without its header, the file would not tell of which inputs its records are.
            header = _text(lines[0], f"{path}:1", "Delete this file to make it again")
            _check_inputs(path, decode_json(header, _Header, path)["inputs"], dict(inputs))
            numbered = enumerate(lines[1:], 2)
            self.records = [decode_json(_text(line, f"{path}:{n}"), kind, f"{path}:{n}") for n, line in numbered]
        else:
            write_text(path, with_digest(json.dumps({"inputs": dict(inputs)})))
        self._file: LineFile = append_lines(path)

    def append(self, record: T) -> None:
        """Adds a record; it is on the disk when this returns.

        Raises:
          OSError: the file cannot be written, or was deleted or moved; names it.
        """
        line = with_digest(json.dumps(record))
        with self._lock:
            if not self._file.is_in_place():
                raise OSError(
                    f"{self.path}: it or its folder was deleted, moved or replaced, so the command ends. Move it back, "
                    "and start again"
                )
            self._file.write(line)
            self._file.sync()

    def close(self) -> None:
        """Closes the file, after a record that another thread is writing."""
        with self._lock:
            self._file.close()

    def __enter__(self) -> "RecordFile[T]":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def stored_records[T](path: Path, inputs: Inputs, kind: type[T]) -> list[T]:
    """The records of a file, or none if it does not exist; creates nothing.

    Raises:
      ValueError: the file is of other inputs, or a line is damaged.
      OSError: the file cannot be read.
    """
    if not path.exists():
        return []
    with RecordFile(path, inputs, kind) as file:
        return file.records


def _whole_lines(path: Path) -> Sequence[str]:
    """The lines that end with a line break; removes half a line at the end of the file."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    try:
        text = whole.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text at byte {error.start}. Correct the file") from None
    if len(whole) < len(content):
        write_text(path, text)
    return text.split("\n")[:-1]


def _text(line: str, place: str, fix: str = "Delete this line") -> str:
    return without_digest(line, place, fix, required=True)


def _check_inputs(path: Path, found: Mapping[str, object], expected: Mapping[str, object]) -> None:
    changed = [
        f"{key} (found {shorten(found.get(key))}, expected {shorten(expected.get(key))})"
        for key in {**found, **expected}
        if found.get(key) != expected.get(key)
    ]
    if changed:
        raise ValueError(
            f"{path}: made with other inputs: {'; '.join(changed)}. Restore them, choose another output, or "
            "delete this file to make it again"
        )
