"""Tensors of GGUF files: every type, names, row order."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from qlora_jax.io.gguf import reader
from qlora_jax.io.gguf.architectures import ARCHITECTURES
from qlora_jax.io.gguf.header import parse_header
from qlora_jax.io.open_model import open_model
from tests.io.tiny_models import gguf_name, permute_rows, random_weights, tiny_config, write_gguf

CONFIG = tiny_config()
WEIGHTS = random_weights(CONFIG)
QUANTIZED = [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1]


def test_f32_round_trip_in_hugging_face_order(tiny_gguf: Path) -> None:
    source = open_model(tiny_gguf)
    assert source.tensors.keys() == WEIGHTS.keys()
    for name, entry in source.tensors.items():
        assert (entry.name, entry.shape, entry.nbytes) == (name, WEIGHTS[name].shape, WEIGHTS[name].nbytes)
        np.testing.assert_array_equal(entry.read(), WEIGHTS[name], strict=True)


@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: kind.name)
def test_each_type_equals_the_gguf_package(tmp_path: Path, kind: Kind) -> None:
    source = open_model(write_gguf(tmp_path / "tiny.gguf", CONFIG, WEIGHTS, kind))
    for name, weight in WEIGHTS.items():
        entry = source.tensors[name]
        stored = kind if weight.ndim == 2 else Kind.F32
        # Blocks run along a row, so quantizing commutes with the order of rows.
        expected = gguf.dequantize(gguf.quantize(weight, stored), stored)
        assert entry.file_type == stored.name
        np.testing.assert_array_equal(entry.read().astype(np.float32), expected)
        np.testing.assert_array_equal(entry.read_rows(5, 27), entry.read()[5:27], strict=True)
        if weight.ndim == 2:
            assert sum(part.nbytes for part in entry.ranges_of(5, 27)) == 22 * entry.nbytes // entry.rows


# The sub-block scales of Q4_K and Q5_K: 8 scales and 8 minima of 6 bits in 12 bytes, as ggml's get_scale_min_k4.
def _scale_min_k4(index: int, packed: bytes) -> tuple[int, int]:
    if index < 4:
        return packed[index] & 63, packed[index + 4] & 63
    return (
        (packed[index + 4] & 15) | (packed[index - 4] >> 6 << 4),
        (packed[index + 4] >> 4) | (packed[index] >> 6 << 4),
    )


def _half(raw: bytes) -> np.float32:
    return np.float32(np.frombuffer(raw, np.float16)[0])


def _q4_k(block: bytes) -> list[np.float32]:
    d, dmin, packed, quants = _half(block[:2]), _half(block[2:4]), block[4:16], block[16:]
    values = []
    for sub in range(8):
        scale, minimum = _scale_min_k4(sub, packed)
        for index in range(32):
            q = quants[sub // 2 * 32 + index] >> (4 * (sub % 2)) & 15
            values.append(d * np.float32(scale) * np.float32(q) - dmin * np.float32(minimum))
    return values


def _q5_k(block: bytes) -> list[np.float32]:
    d, dmin, packed, high, quants = _half(block[:2]), _half(block[2:4]), block[4:16], block[16:48], block[48:]
    values = []
    for sub in range(8):
        scale, minimum = _scale_min_k4(sub, packed)
        for index in range(32):
            q = (quants[sub // 2 * 32 + index] >> (4 * (sub % 2)) & 15) + (high[index] >> sub & 1) * 16
            values.append(d * np.float32(scale) * np.float32(q) - dmin * np.float32(minimum))
    return values


def _q2_k(block: bytes) -> list[np.float32]:
    packed, quants, d, dmin = block[:16], block[16:80], _half(block[80:82]), _half(block[82:])
    values = []
    for index in range(256):
        half, part, inside = index // 128, index // 32 % 4, index % 32
        q, scale = quants[32 * half + inside] >> (2 * part) & 3, packed[index // 16]
        values.append(d * np.float32(scale & 15) * np.float32(q) - dmin * np.float32(scale >> 4))
    return values


def _q3_k(block: bytes) -> list[np.float32]:
    """Makes the scales as dequantize_row_q3_K does: four words of masked bytes from three."""
    high, quants, words, d = block[:32], block[32:96], np.frombuffer(block[96:108], "<u4"), _half(block[108:])
    first, second, last = (int(word) for word in words)
    twos, fours = 0x03030303, 0x0F0F0F0F
    mixed = [(first & fours) | (last & twos) << 4, (second & fours) | (last >> 2 & twos) << 4]
    mixed += [(first >> 4 & fours) | (last >> 4 & twos) << 4, (second >> 4 & fours) | (last >> 6 & twos) << 4]
    scales = b"".join(word.to_bytes(4, "little") for word in mixed)
    values = []
    for index in range(256):
        half, part, inside = index // 128, index // 32 % 4, index % 32
        q = (quants[32 * half + inside] >> (2 * part) & 3) - (0 if high[inside] >> (4 * half + part) & 1 else 4)
        values.append(d * np.float32(scales[index // 16] - 32) * np.float32(q))
    return values


def _q6_k(block: bytes) -> list[np.float32]:
    low, high, scales, d = block[:128], block[128:192], np.frombuffer(block[192:208], np.int8), _half(block[208:])
    values = [np.float32(0)] * 256
    for half in range(2):
        for index in range(32):
            for part in range(4):
                nibble = low[half * 64 + (part % 2) * 32 + index] >> (4 * (part // 2)) & 15
                q = (nibble | (high[half * 32 + index] >> (2 * part) & 3) << 4) - 32
                scale = scales[half * 8 + part * 2 + index // 16]
                values[half * 128 + part * 32 + index] = d * np.float32(scale) * np.float32(q)
    return values


@pytest.mark.parametrize(
    ("kind", "decode", "halves"),
    [
        (Kind.Q2_K, _q2_k, (80, 82)),
        (Kind.Q3_K, _q3_k, (108,)),
        (Kind.Q4_K, _q4_k, (0, 2)),
        (Kind.Q5_K, _q5_k, (0, 2)),
        (Kind.Q6_K, _q6_k, (208,)),
    ],
    ids=["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"],
)
def test_k_quants_equal_ggml_written_out(
    tmp_path: Path, kind: Kind, decode, halves: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gguf package can't make K-quants: random blocks with finite scales, decoded one weight at a time here."""
    rows, size = 6, gguf.GGML_QUANT_SIZES[kind][1]
    rng = np.random.default_rng(1)
    blocks = rng.integers(0, 256, (rows, 2, size), np.uint8)
    for start in halves:
        blocks[..., start : start + 2] = rng.normal(0, 0.1, (rows, 2, 1)).astype(np.float16).view(np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "k.gguf", "llama")
    writer.add_tensor("output.weight", blocks.reshape(rows, -1), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (info,) = parse_header(tmp_path / "k.gguf").tensors
    assert (info.shape, info.type) == ((rows, 512), kind)
    expected = np.array([[decode(block.tobytes()) for block in row] for row in blocks]).reshape(rows, 512)
    np.testing.assert_array_equal(reader._read_table(tmp_path / "k.gguf", info), expected)
    monkeypatch.setattr(reader, "loops_problem", lambda: "not built")
    np.testing.assert_array_equal(reader._read_table(tmp_path / "k.gguf", info), expected)


def test_slices_of_a_large_tensor_join(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "SLICE_WEIGHTS", 200)  # 3 rows of 64, so that 32 rows end with a short slice
    monkeypatch.setattr(reader, "loops_problem", lambda: "not built")
    source = open_model(write_gguf(tmp_path / "tiny.gguf", CONFIG, WEIGHTS, Kind.Q8_0))
    name = "model.embed_tokens.weight"
    expected = gguf.dequantize(gguf.quantize(WEIGHTS[name], Kind.Q8_0), Kind.Q8_0)
    np.testing.assert_array_equal(source.tensors[name].read(), expected)


def test_tensors_without_counterpart_keep_their_name(tmp_path: Path) -> None:
    odd = {"blk.0.ffn_gate_inp.weight": np.ones((2, 64), np.float32)}
    assert (
        "blk.0.ffn_gate_inp.weight" in open_model(write_gguf(tmp_path / "t.gguf", CONFIG, WEIGHTS, tensors=odd)).tensors
    )


def test_names_of_the_converter() -> None:
    assert all(reader.hugging_face_name(gguf_name(name), ARCHITECTURES["llama"]) == name for name in WEIGHTS)


def test_row_order_inverts_the_converter() -> None:
    rows = np.arange(48)
    np.testing.assert_array_equal(permute_rows(rows, 3)[reader._rotary_order(48, 3)], rows)


def test_unsupported_tensor_type(tmp_path: Path) -> None:
    blocks = np.zeros((4, 110), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    writer.add_tensor("output.weight", blocks, raw_dtype=Kind.IQ3_S)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        ValueError,
        match=r"not supported, such as output.weight \(found IQ3_S, expected F32, .*, IQ4_XS, MXFP4\)",
    ):
        open_model(tmp_path / "t.gguf")
