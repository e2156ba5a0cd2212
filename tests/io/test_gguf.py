"""GGUF files: every tensor type, names, row order, metadata, and what is refused."""

import struct
from pathlib import Path
from typing import Any

import gguf
import hypothesis
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from hypothesis import strategies

from qlora_jax.io import gguf as reader
from qlora_jax.io.gguf_architectures import ARCHITECTURES
from qlora_jax.io.gguf_config import llama3_factors
from qlora_jax.io.gguf_header import parse_header
from qlora_jax.io.source import open_model
from tests.io.tiny_models import TOKENS, gguf_name, permute_rows, random_weights, tiny_config, write_gguf

CONFIG = tiny_config()
WEIGHTS = random_weights(CONFIG)
QUANTIZED = [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1]


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", CONFIG, WEIGHTS)


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
    [(Kind.Q4_K, _q4_k, (0, 2)), (Kind.Q5_K, _q5_k, (0, 2)), (Kind.Q6_K, _q6_k, (208,))],
    ids=["Q4_K", "Q5_K", "Q6_K"],
)
def test_k_quants_equal_ggml_written_out(tmp_path: Path, kind: Kind, decode, halves: tuple[int, ...]) -> None:
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
    np.testing.assert_array_equal(reader._read(tmp_path / "k.gguf", info, reader.Change()), expected)


def test_slices_of_a_large_tensor_join(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "SLICE_WEIGHTS", 200)  # 3 rows of 64, so that 32 rows end with a short slice
    source = open_model(write_gguf(tmp_path / "tiny.gguf", CONFIG, WEIGHTS, Kind.Q8_0))
    name = "model.embed_tokens.weight"
    expected = gguf.dequantize(gguf.quantize(WEIGHTS[name], Kind.Q8_0), Kind.Q8_0)
    np.testing.assert_array_equal(source.tensors[name].read(), expected)


def test_header_equals_the_gguf_package(tiny_gguf: Path) -> None:
    theirs, ours = gguf.GGUFReader(tiny_gguf), parse_header(tiny_gguf)
    fields = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert fields.keys() == ours.metadata.keys()
    for key, value in fields.items():
        assert ours.metadata[key] == (pytest.approx(value) if isinstance(value, float) else value)
    assert [tensor.name for tensor in theirs.tensors] == [info.name for info in ours.tensors]
    assert [tensor.data_offset for tensor in theirs.tensors] == [info.offset for info in ours.tensors]


def test_every_metadata_type(tmp_path: Path) -> None:
    values = {
        "u8": ("add_uint8", 200),
        "i8": ("add_int8", -100),
        "u16": ("add_uint16", 60000),
        "i16": ("add_int16", -30000),
        "u32": ("add_uint32", 4_000_000_000),
        "i32": ("add_int32", -2_000_000_000),
        "f32": ("add_float32", 1e-6),
        "u64": ("add_uint64", 2**63),
        "i64": ("add_int64", -(2**62)),
        "f64": ("add_float64", 0.1),
        "bool": ("add_bool", True),
        "str": ("add_string", "naïve ☃"),
        "strs": ("add_array", ["", "é", "x"]),
        "ints": ("add_array", [1, -2, 3]),
        "floats": ("add_array", [0.1, 2.5]),
    }
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for key, (add, value) in values.items():
        getattr(writer, add)(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    metadata = parse_header(tmp_path / "m.gguf").metadata
    assert metadata == {"general.architecture": "llama"} | {key: value for key, (_, value) in values.items()}


def test_config_is_that_of_hugging_face(tiny_gguf: Path) -> None:
    assert open_model(tiny_gguf).config == CONFIG


def test_tied_head_biases_and_a_long_head(tmp_path: Path) -> None:
    config = tiny_config(tie_word_embeddings=True, attention_bias=True, mlp_bias=True, head_dim=32)
    weights = random_weights(config)
    extra = {"llama.attention.key_length": 32, "llama.attention.value_length": 32}
    source = open_model(write_gguf(tmp_path / "tiny.gguf", config, weights, extra=extra))
    assert source.config == config
    assert source.tensors.keys() == weights.keys()
    for name, entry in source.tensors.items():
        np.testing.assert_array_equal(entry.read(), weights[name])


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SCALINGS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "type none": ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, None),
    "factor 0": ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 0.0}, None),
    "linear": (
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
        {"rope_type": "linear", "factor": 4.0},
    ),
    "old name": ({"llama.rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
    "yarn": (
        {
            "llama.rope.scaling.type": "yarn",
            "llama.rope.scaling.factor": 4.0,
            "llama.rope.scaling.original_context_length": 64,
            "llama.rope.scaling.finetuned": True,
            "llama.rope.scaling.yarn_beta_fast": 16.0,
        },
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 16.0,
            "beta_slow": 1.0,
        },
    ),
}


@pytest.mark.parametrize("case", SCALINGS)
def test_rope_scaling(tmp_path: Path, case: str) -> None:
    extra, expected = SCALINGS[case]
    assert open_model(write_gguf(tmp_path / "t.gguf", CONFIG, WEIGHTS, extra=extra)).config["rope_scaling"] == expected


def test_llama3_factors_become_parameters(tmp_path: Path) -> None:
    config = tiny_config(head_dim=64, rope_theta=500000.0)
    factors = llama3_factors(64, 500000.0, LLAMA3)
    path = write_gguf(
        tmp_path / "t.gguf", config, random_weights(config), tensors={"rope_freqs.weight": factors},
        extra={"llama.attention.key_length": 64, "llama.attention.value_length": 64},
    )  # fmt: skip
    source = open_model(path)
    assert source.config["rope_scaling"] == LLAMA3
    assert "rope_freqs.weight" not in source.tensors


@pytest.mark.parametrize("factors", [np.linspace(1, 8, 8, dtype=np.float32), np.full(4, 8, np.float32)])
def test_other_rotary_factors_are_refused(tmp_path: Path, factors: np.ndarray) -> None:
    path = write_gguf(tmp_path / "t.gguf", CONFIG, WEIGHTS, tensors={"rope_freqs.weight": factors})
    with pytest.raises(ValueError, match=r"rope_freqs.weight \[\d\] does not follow from Llama 3.1's scaling"):
        open_model(path)


def test_rotary_factors_of_one_scale_nothing(tmp_path: Path) -> None:
    ones = {"rope_freqs.weight": np.ones(8, np.float32)}
    assert open_model(write_gguf(tmp_path / "t.gguf", CONFIG, WEIGHTS, tensors=ones)).config["rope_scaling"] is None


def test_tokenizer(tmp_path: Path) -> None:
    extra = {
        "tokenizer.chat_template": "{{ messages }}",
        "tokenizer.ggml.padding_token_id": 2**32 - 1,
        "tokenizer.ggml.eot_token_id": 5,
        "tokenizer.ggml.add_space_prefix": False,
    }
    assert open_model(write_gguf(tmp_path / "t.gguf", CONFIG, WEIGHTS, extra=extra)).tokenizer == {
        "chat_template": "{{ messages }}",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": None,
        "unk_token": "<unk>",
        "add_bos_token": False,
        "stop_token_ids": [2, 5],
        "gguf": {
            "model": "gpt2",
            "pre": "smollm",
            "tokens": TOKENS,
            "token_type": [3, 3, 3] + [1] * 29,
            "merges": ["t 0", "t 1"],
            "scores": [],
            "add_space_prefix": False,
        },
    }


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


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "experts": ({"llama.expert_count": 8}, "llama.expert_count = 8: expected 0"),
    "unknown key": ({"llama.logit_scale": 2.0}, "llama.logit_scale = 2.0: unknown key"),
    "partial rotary": ({"llama.attention.key_length": 32}, "llama.rope.dimension_count = 16: expected 32"),
    "value length": ({"llama.attention.value_length": 8}, "llama.attention.value_length = 8: expected 16"),
    "longrope": (
        {"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0},
        "rope.scaling.type = 'longrope' is not supported; supported: none, linear, yarn",
    ),
    "attention factor": ({"llama.rope.scaling.attn_factor": 1.5}, "attn_factor = 1.5: expected 1.0"),
    "adapter": ({"general.type": "adapter"}, "holds a LoRA adapter"),
    "split": ({"split.count": 3}, "one of 3 parts .* llama-gguf-split --merge"),
    "special id": (
        {"tokenizer.ggml.padding_token_id": 99},
        "outside the vocabulary of 32 tokens: .*padding_token_id = 99",
    ),
    "wrong type": ({"tokenizer.chat_template": 3}, "tokenizer.chat_template is int, expected str"),
    "fraction of a token": ({"tokenizer.ggml.eot_token_id": 1.5}, "eot_token_id is float, expected int"),
    "odd alignment": ({"general.alignment": 24}, "general.alignment is 24, expected a power of two"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_metadata(tmp_path: Path, case: str) -> None:
    extra, message = REFUSED[case]
    path = write_gguf(tmp_path / "t.gguf", CONFIG, WEIGHTS, extra=extra)
    with pytest.raises(ValueError, match=message) as error:
        open_model(path)
    assert str(path) in str(error.value)


def test_all_metadata_problems_at_once(tmp_path: Path) -> None:
    extra = {"llama.logit_scale": 2.0, "llama.residual_scale": 1.0, "llama.expert_count": 8}
    with pytest.raises(ValueError, match=r"(?s)logit_scale.*residual_scale.*expert_count"):
        open_model(write_gguf(tmp_path / "t.gguf", CONFIG, WEIGHTS, extra=extra))


def _bare(tmp_path: Path, architecture: str) -> Path:
    writer = gguf.GGUFWriter(tmp_path / "bare.gguf", architecture)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return tmp_path / "bare.gguf"


def test_other_architecture(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="architecture 'mamba' is not supported; supported in GGUF files: llama"):
        open_model(_bare(tmp_path, "mamba"))


def test_missing_metadata(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"(?s)llama.embedding_length: missing.*llama.context_length: missing"):
        open_model(_bare(tmp_path, "llama"))


def test_unsupported_tensor_type(tmp_path: Path) -> None:
    blocks = np.zeros((4, 84), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    writer.add_tensor("output.weight", blocks, raw_dtype=Kind.Q2_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"not supported \(Q2_K\), the first is output.weight; supported: F32"):
        open_model(tmp_path / "t.gguf")


BAD_FILES = {
    "empty": (b"", "it has 0 bytes"),
    "other format": (b"PK\3\4" + bytes(20), r"begins with b'PK\\x03\\x04', a GGUF file with b'GGUF'"),
    "version 1": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "a version 1 GGUF file"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "a big-endian GGUF file"),
    "only magic": (b"GGUF", "the version at byte 4 takes 4 bytes, but the file ends at byte 4"),
    "endless key": (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**63), f"a metadata key at byte 32 takes {2**63} bytes"),
    "endless array": (
        b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 4, 2**40),
        f"k at byte 49 takes {2**42} bytes",
    ),
    "unknown value type": (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"k", 77), "byte 33: unknown type 77"),
    "no UTF-8": (b"GGUF" + struct.pack("<IQQQ2s", 3, 0, 1, 2, b"\xff\xfe"), "byte 24: a metadata key is no UTF-8"),
    "many tensors": (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "a tensor's name at byte 24 takes 8 bytes"),
    "axes": (b"GGUF" + struct.pack("<IQQQ1sI", 3, 1, 0, 1, b"t", 9), "tensor 't' has 9 axes, expected 1 to 4"),
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
        ValueError, match=r"truncated: tensor 'output.weight' lies in bytes \d+ to \d+, but the file ends"
    ):
        open_model(tmp_path / "cut.gguf")


@hypothesis.given(data=strategies.data())
def test_damage_is_read_or_refused(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory, data) -> None:
    """Bytes of the header changed, or the file cut: ValueError or a sound result, nothing else."""
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
