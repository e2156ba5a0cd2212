"""Writers of tensors notice a full disk at every byte, and a disk that stores other bytes than were written."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from qlora_jax.atomic_files import staged_folder, write_bytes
from qlora_jax.io.gguf.reader import RowTransform
from qlora_jax.io.gguf.writer import GgufSpec, OutputTensor, typed_keys, write_gguf
from qlora_jax.io.hf.model_writer import TensorSpec, write_safetensors
from qlora_jax.io.peft.writer import write_adapter
from tests.conftest import SMALL_DISK_BYTES

PAGE = 4096
VALUES = {name: np.zeros((16, 64), np.float32) for name in ("first", "second")}
CONFIG = {"base_model_name_or_path": "base", "peft_type": "LORA", "use_dora": False, "r": 1, "lora_alpha": 1}
Write = Callable[[Path], None]


def _write_gguf(path: Path) -> None:
    tensors = {name: OutputTensor(name, value.shape, RowTransform()) for name, value in VALUES.items()}
    spec = GgufSpec("llama", typed_keys({"general.type": "model"}), tensors, {"table": np.zeros(32, np.float32)})
    write_gguf(path, spec, list(tensors), iter(VALUES.values()), "float32")


def _write_safetensors(path: Path) -> None:
    specs = [TensorSpec(name, np.dtype(ml_dtypes.bfloat16), value.shape) for name, value in VALUES.items()]
    write_safetensors(path, specs, (value.astype(ml_dtypes.bfloat16) for value in VALUES.values()))


def _write_peft(path: Path) -> None:
    write_adapter(path.parent, VALUES, CONFIG)


def _write_bytes(path: Path) -> None:
    write_bytes(path, bytes(10_000))


WRITERS: dict[str, tuple[Write, str]] = {
    "GGUF": (_write_gguf, "model.gguf"),
    "safetensors": (_write_safetensors, "model.safetensors"),
    "PEFT": (_write_peft, "adapter_model.safetensors"),
    "bytes": (_write_bytes, "file"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_at_every_page_is_an_error(small_disk: Path, name: str) -> None:
    """NumPy's tofile, with which the gguf package writes, loses the last bytes without an error."""
    write, file = WRITERS[name]
    with staged_folder(small_disk / "whole") as folder:
        write(folder / file)
    size = sum(path.stat().st_size for path in (small_disk / "whole").iterdir())
    for path in (small_disk / "whole").iterdir():
        path.unlink()
    for free in range(0, size - PAGE, PAGE):
        (small_disk / "rest").write_bytes(bytes(SMALL_DISK_BYTES - free))
        full = pytest.raises(OSError, match=r"cannot be written: No space left on device .*Free space")
        with full as caught, staged_folder(small_disk / "out") as folder:
            write(folder / file)
        assert Path(caught.value.filename).parent == small_disk / "out"
        assert sorted(path.name for path in small_disk.iterdir()) == ["rest", "whole"]
        (small_disk / "rest").unlink()


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("place", ["start", "header", "middle", "end"])
def test_a_disk_that_stores_other_bytes_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, place: str
) -> None:
    write, file = WRITERS[name]
    write(tmp_path / file)
    data = (tmp_path / file).read_bytes()
    offset = {"start": 0, "header": 40, "middle": len(data) // 2, "end": len(data) - 1}[place]
    sync = os.fsync

    def damage(descriptor: int) -> None:
        sync(descriptor)
        found = os.fstat(descriptor)
        if stat.S_ISREG(found.st_mode) and found.st_size == len(data):
            os.pwrite(descriptor, bytes([data[offset] ^ 1]), offset)

    monkeypatch.setattr(os, "fsync", damage)
    with pytest.raises(OSError, match=r"differs on the disk from what was written.*Check the disk") as caught:
        write(tmp_path / file)
    assert caught.value.filename == str(tmp_path / file)
    assert (tmp_path / file).read_bytes() == data
