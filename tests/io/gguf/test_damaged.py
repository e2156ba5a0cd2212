"""Files that are not GGUF, or are truncated: the error says what is wrong and where."""

import struct
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies

from qlora_jax.io.gguf.header import parse_header
from qlora_jax.io.open_model import open_model

BAD_FILES = {
    "empty": (b"", "not a GGUF file .0 bytes"),
    "other format": (b"PK\3\4" + bytes(20), r"starts with b'PK\\x03\\x04', expected b'GGUF'"),
    "version 1": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "found version 1, expected"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "found big-endian, expected"),
    "only magic": (b"GGUF", "the version at byte 4 requires 4 bytes, but the file ends at byte 4"),
    "endless key": (
        b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**63) + bytes(8),
        f"key at byte 32 requires {2**63} bytes",
    ),
    "endless array": (
        b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 4, 2**22),
        f"k at byte 49 requires {2**24} bytes",
    ),
    "longer array than published": (
        b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 4, 2**40),
        f"byte 49: k has {2**40} elements, and metadata may have {2**22}",
    ),
    "long name": (
        b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**16 + 1) + bytes(2**16 + 10),
        "byte 24: a metadata key has 65537 characters",
    ),
    "unknown value type": (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"k", 77), "byte 33: unknown type 77"),
    "no UTF-8": (b"GGUF" + struct.pack("<IQQQ2sI", 3, 0, 1, 2, b"\xff\xfe", 4), "byte 24: a metadata key is not UTF-8"),
    "many tensors": (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), f"byte 8: the number of tensors is {2**60}"),
    "many keys": (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), "byte 16: the number of metadata keys is .* at most 0"),
    "axes": (b"GGUF" + struct.pack("<IQQQ1sIQQ", 3, 1, 0, 1, b"t", 9, 0, 0), "tensor 't' has 9 axes, expected 1 to 4"),
    "no axis": (
        b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 0, 0, 0) + bytes(64),
        r"tensor 't', F32 \[0\], at offset 0: expected axes above 0",
    ),
    "unknown tensor type": (
        b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 8, 999, 0),
        "tensor 't' has the unknown type 999",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file(tmp_path: Path, case: str) -> None:
    content, message = BAD_FILES[case]
    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        open_model(tmp_path / "bad.gguf")
    assert str(tmp_path / "bad.gguf") in str(error.value)


def test_truncated_data(tmp_path: Path, tiny_gguf: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(tiny_gguf.read_bytes()[:-1])
    with pytest.raises(
        ValueError, match=r"truncated: tensor 'output.weight' is stored in bytes \d+ to \d+, but the file ends"
    ):
        open_model(tmp_path / "cut.gguf")


def test_a_tensor_at_the_place_of_another_is_refused(tmp_path: Path, tiny_gguf: Path) -> None:
    """One changed offset would give a tensor another one's values; many would be one small file's gigabytes."""
    data, (first, second) = bytearray(tiny_gguf.read_bytes()), parse_header(tiny_gguf).tensors[:2]
    row = data.index(second.name.encode()) + len(second.name)
    place = row + 4 + 8 * len(second.shape) + 4  # after the axes and the type
    assert int.from_bytes(data[place : place + 8], "little") == second.offset - first.offset
    data[place : place + 8] = bytes(8)
    (tmp_path / "t.gguf").write_bytes(data)
    with pytest.raises(
        ValueError, match=f"'{second.name}' is stored at byte {first.offset}, expected {second.offset}, where"
    ):
        open_model(tmp_path / "t.gguf")


@hypothesis.given(data=strategies.data())
def test_damage_is_read_or_refused(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory, data) -> None:
    """A damaged header or a cut file raises ValueError or gives a valid result."""
    damaged = bytearray(tiny_gguf.read_bytes())
    header_end = parse_header(tiny_gguf).tensors[0].offset
    for _ in range(data.draw(strategies.integers(1, 3))):
        damaged[data.draw(strategies.integers(0, header_end - 1))] = data.draw(strategies.integers(0, 255))
    cut = data.draw(strategies.one_of(strategies.none(), strategies.integers(0, len(damaged))))
    path = tmp_path_factory.mktemp("damaged") / "t.gguf"
    path.write_bytes(damaged[:cut])
    try:
        source = open_model(path)
    except ValueError as error:
        assert str(path) in str(error)
        return
    for entry in source.tensors.values():
        assert entry.read().shape == entry.shape
