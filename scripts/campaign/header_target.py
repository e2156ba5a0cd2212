"""The function that the coverage-guided fuzzer calls: reads bytes as a GGUF or safetensors file.

`headers.py` starts this module. The first argument is the format, the second the file for findings; the others are
those of libFuzzer.
"""

import json
import sys
import tempfile
from pathlib import Path

import atheris  # pyright: ignore[reportMissingImports, reportMissingModuleSource]

with atheris.instrument_imports(  # pyright: ignore[reportAttributeAccessIssue]
    include=["qlora_jax.io", "qlora_jax.data.tokenizer", "qlora_jax.untrusted_json"]
):
    from qlora_jax.io.gguf.reader import open_gguf
    from qlora_jax.io.hf.bnb_reader import group_quantized
    from qlora_jax.io.hf.reader import read_header

from scripts.campaign.file_kind import describe


def _read_gguf(path: Path) -> None:
    source = open_gguf(path)
    for entry in source.tensors.values():
        entry.read()


def _read_safetensors(path: Path) -> None:
    group_quantized(path, {entry.name: entry for entry in read_header(path)})


READERS = {"gguf": _read_gguf, "safetensors": _read_safetensors}


class Target:
    """Reads inputs, and writes each new kind of finding to a file."""

    def __init__(self, form: str, findings: Path):
        self._read, self._findings, self._seen = READERS[form], findings, set[str]()
        folder = "/dev/shm" if Path("/dev/shm").is_dir() else None
        self._path = Path(tempfile.mkdtemp(prefix="headers-", dir=folder)) / f"x.{form}"

    def __call__(self, data: bytes) -> None:
        """Reads one input; an error that is not ours, or does not name the file, is a finding."""
        self._path.write_bytes(data)
        try:
            self._read(self._path)
        except (ValueError, OSError) as error:
            if str(self._path) not in str(error):
                self._record(f"unclear: {describe(error)}", data)
        except Exception as error:
            self._record(f"traceback: {describe(error)}", data)

    def _record(self, text: str, data: bytes) -> None:
        place = text.partition("|")[0]
        if place not in self._seen:
            self._seen.add(place)
            with self._findings.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"finding": text, "input": data.hex()}) + "\n")


def main() -> None:
    """Fuzzes with the arguments of the process; does not return."""
    form, findings, *arguments = sys.argv[1:]
    atheris.Setup([sys.argv[0], *arguments], Target(form, Path(findings)))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
