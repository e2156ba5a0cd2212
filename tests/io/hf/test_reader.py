"""Hugging Face folders are read as they were written; a damaged folder raises one clear error."""

import json
import resource
from pathlib import Path

import hypothesis
import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies
from safetensors.numpy import save_file

from qlora_jax.io.hf import reader
from qlora_jax.io.hf.reader import read_header, read_index
from qlora_jax.io.open_model import open_model
from tests.io.tiny_models import random_weights, tiny_config, write_folder

CONFIG = tiny_config()
WEIGHTS = random_weights(CONFIG)
INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("shards", [1, 3])
def test_reads_what_was_written(tmp_path: Path, shards: int) -> None:
    source = open_model(write_folder(tmp_path, CONFIG, WEIGHTS, shards))
    assert source.config == CONFIG
    assert source.tensors.keys() == WEIGHTS.keys()
    for name, entry in source.tensors.items():
        assert (entry.name, entry.shape, entry.file_type) == (name, WEIGHTS[name].shape, "F32")
        assert entry.nbytes == WEIGHTS[name].nbytes
        np.testing.assert_array_equal(entry.read(), WEIGHTS[name], strict=True)


@pytest.mark.parametrize(("dtype", "file_type"), [("float16", "F16"), ("float32", "F32"), ("bfloat16", "BF16")])
def test_reads_each_type_to_the_bit(tmp_path: Path, dtype: str, file_type: str) -> None:
    values = np.random.default_rng(0).normal(size=(5, 7)).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    save_file({"w": values}, tmp_path / "w.safetensors")
    (entry,) = read_header(tmp_path / "w.safetensors")
    assert (entry.file_type, entry.read().dtype) == (file_type, values.dtype)
    assert entry.read().tobytes() == values.tobytes()
    assert entry.read_rows(1, 4).tobytes() == values[1:4].tobytes()
    assert [part.nbytes for part in entry.ranges_of(1, 4)] == [values[1:4].nbytes]


def test_reads_what_transformers_wrote(tmp_path: Path, oracle) -> None:
    expected = oracle(Path("tests/oracle/peft_save_llama.py").absolute(), folder=str(tmp_path), config=CONFIG)
    source = open_model(tmp_path)
    assert {entry.file_type for entry in source.tensors.values()} == {"BF16"}
    assert source.tensors.keys() == expected.keys()
    for name, entry in source.tensors.items():
        np.testing.assert_array_equal(entry.read().astype(np.float32), expected[name])


def test_one_tensor_in_memory_at_a_time(tmp_path: Path) -> None:
    weights = {f"w{index}": np.zeros((2048, 2048), np.float32) for index in range(6)}  # 16 MiB each
    save_file(weights, tmp_path / "w.safetensors")
    del weights
    before = _resident_bytes()
    for entry in read_header(tmp_path / "w.safetensors"):
        assert entry.read().sum() == 0
        assert _resident_bytes() - before < 24 * 2**20


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _header(**tensors: object) -> bytes:
    text = json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}

BAD_FILES = {
    "empty": (b"", "byte 0 announces a header of 0 bytes .*, the file has 0"),
    "header longer than the file": (b"\xff\xff\0\0\0\0\0\0{}", "announces a header of 65535 bytes .*, the file has 10"),
    "an unbelievable header": (b"\xff" * 8 + b"{}", "header of 18446744073709551615 bytes"),
    "no JSON": (b"\2\0\0\0\0\0\0\0{]", "header from byte 8, line 1, column 2: not JSON"),
    "no object": (b"\2\0\0\0\0\0\0\0[]", r"header from byte 8: found \[\], expected an object"),
    "nested": ((1 << 20).to_bytes(8, "little") + b'{"a":' + b"[" * (1 << 20), "header from byte 8: nested too deeply"),
    "truncated": (
        _header(w=GOOD) + b"1234567",
        r"truncated: tensor w is stored in bytes \d+ to \d+, but the file ends",
    ),
    "more data": (_header(w=GOOD) + b"123456789", r"the tensors end at byte \d+, but the file ends at byte"),
    "wrong size": (_header(w=GOOD | {"shape": [3]}) + b"12345678", "requires 12 bytes, .* which are 8"),
    "negative": (_header(w=GOOD | {"shape": [-2]}), "w.shape.0: found -2, expected at least 0"),
    "no offsets": (_header(w={"dtype": "F32", "shape": [2]}), "w.data_offsets: missing"),
    "odd offsets": (_header(w=GOOD | {"data_offsets": [0, 4, 8]}), "w.data_offsets: found .* at most 2 elements"),
    "backwards": (_header(w=GOOD | {"shape": [0], "data_offsets": [8, 0]}) + bytes(8), "tensor w is stored in bytes 8"),
    "overlapping": (_header(a=GOOD, w=GOOD) + bytes(8), "tensor w is stored in bytes 0 to 8 .* begin at byte 8"),
    "a gap": (_header(w=GOOD | {"data_offsets": [8, 16]}) + bytes(16), "tensor w .* expected it to begin at byte 0"),
    "boolean axis": (_header(w=GOOD | {"shape": [True, 2]}), "w.shape.0: found True, expected a whole number"),
    "many axes": (_header(w=GOOD | {"shape": [1] * 99}), "w.shape: found .*, expected at most 8 elements"),
    "product that overflows": (
        _header(w=GOOD | {"shape": [2**40] * 4}) + bytes(8),
        f"w, F32 .*, requires {2**162} bytes",
    ),
    "odd type": (_header(w=GOOD | {"dtype": ["F32"]}), r"w.dtype: found \['F32'\], expected text"),
    "integers": (_header(w=GOOD | {"dtype": "I64"}) + bytes(8), r"tensor w .* \(found 'I64', expected F32, F16, BF16"),
    "not an object": (_header(w=3), "w: found 3, expected an object"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file(tmp_path: Path, case: str) -> None:
    content, message = BAD_FILES[case]
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        list(read_header(tmp_path / "w.safetensors"))
    assert str(tmp_path / "w.safetensors") in str(error.value)


@pytest.fixture(scope="module")
def sound_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return (write_folder(tmp_path_factory.mktemp("sound"), CONFIG, WEIGHTS) / "model.safetensors").read_bytes()


@hypothesis.given(data=strategies.data())
def test_damage_is_read_or_refused(sound_bytes: bytes, tmp_path_factory: pytest.TempPathFactory, data) -> None:
    """A damaged header or a cut file raises ValueError or gives a valid result."""
    damaged = bytearray(sound_bytes)
    header_end = 8 + int.from_bytes(sound_bytes[:8], "little")
    damaged[data.draw(strategies.integers(0, header_end - 1))] = data.draw(strategies.integers(0, 255))
    cut = data.draw(strategies.one_of(strategies.none(), strategies.integers(0, len(damaged))))
    path = tmp_path_factory.mktemp("damaged") / "w.safetensors"
    path.write_bytes(damaged[:cut])
    try:
        entries = list(read_header(path))
    except ValueError as error:
        assert str(path) in str(error)
        return
    for entry in entries:
        assert entry.read().shape == entry.shape


def test_a_header_may_be_a_small_part_of_a_large_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "SMALL_HEADER", 16)
    path = write_folder(tmp_path, CONFIG, WEIGHTS) / "model.safetensors"
    assert len([*read_header(path)]) == len(WEIGHTS)
    save_file({f"tensor {n}": np.zeros(1, np.float32) for n in range(9)}, path)
    with pytest.raises(ValueError, match=r"a header of \d+ bytes \(at most 16 are read\)"):
        list(read_header(path))


def test_a_model_type_that_is_not_text_is_refused_by_file(tmp_path: Path) -> None:
    write_folder(tmp_path, {**CONFIG, "model_type": ["llama"]}, WEIGHTS)
    with pytest.raises(ValueError, match=r"config\.json: model_type: found \['llama'\], expected text"):
        open_model(tmp_path)


def test_missing_shards_all_named(tmp_path: Path) -> None:
    write_folder(tmp_path, CONFIG, WEIGHTS, 3)
    for shard in (1, 3):
        (tmp_path / f"model-0000{shard}-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match=r"2 of the 3 shards in .* are missing: model-00001-of.*, model-00003-of"):
        open_model(tmp_path)


def test_index_of_many_experts(tmp_path: Path) -> None:
    """One weight per expert gives indices of several megabytes."""
    names = [f"model.layers.{i // 768}.mlp.experts.{i % 768}.down_proj.weight_scale_inv" for i in range(60_000)]
    shards = dict.fromkeys(names, "model-00001-of-000163.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": shards}))
    assert (tmp_path / INDEX).stat().st_size > 5 << 20
    assert read_index(tmp_path / INDEX) == shards


def test_index_that_does_not_fit_its_shards(tmp_path: Path) -> None:
    write_folder(tmp_path, CONFIG, WEIGHTS, 2)
    index = json.loads((tmp_path / INDEX).read_text())
    del index["weight_map"]["model.norm.weight"]
    index["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="2 tensors do not match the shards") as error:
        open_model(tmp_path)
    assert "ghost: named, but not in model-00001-of-00002.safetensors" in str(error.value)
    assert "model.norm.weight: in model-" in str(error.value)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "line 1, column 2: not JSON"),
        ("[]", r"found \[\], expected an object"),
        ("{}", "weight_map: missing"),
        ('{"weight_map": {"a": 1, "b": [], "c": "d"}}', "(?s)weight_map.a: found 1, expected text.*weight_map.b"),
        ('{"weight_map": {"w": "../secret.safetensors"}}', "shards outside its folder \\(found '../secret"),
    ],
)
def test_bad_index(tmp_path: Path, index: str, message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / INDEX).write_text(index)
    with pytest.raises(ValueError, match=message):
        open_model(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "config.json is missing.* It contains: nothing"),
        ({"config.json": json.dumps(CONFIG)}, "model.safetensors and model.safetensors.index.json are both missing"),
        ({"config.json": '{"model_type": "bert"}'}, "model_type='bert' is not supported.*known are .*'llama'"),
        (
            {"config.json": json.dumps(CONFIG), "a.bin": ""},
            r"a pickle, which is not read because it can run any code.*save_pretrained",
        ),
        ({"model-q4.gguf": ""}, "contains model-q4.gguf: give the path of that file"),
        ({"adapter_config.json": "{}"}, r"is missing\)\. It is a PEFT adapter: .*lora\.start"),
        ({"config.yaml": "", "checkpoints": ""}, r"is missing\)\. It is a training run\. Resume it with --config RUN"),
        ({"config.json": '{"hidden_size": 5,}'}, r"config.json, line 1, column \d+: not JSON"),
        (
            {"config.json": json.dumps(CONFIG | {"quantization_config": {"quant_method": "hqq"}})},
            "found .*hqq.*16-bit model",
        ),
        ({"config.json": '{"model_type": {"": "llama"}}'}, r"model_type: found {'': 'llama'}, expected text"),
    ],
)
def test_folder_without_a_model(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        open_model(tmp_path)


def test_paths_that_hold_no_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no such file or folder\. Give a Hugging Face folder"):
        open_model("some-model")
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match="a weight file, expected a model"):
        open_model(tmp_path / "model.safetensors")


def test_masks_that_old_checkpoints_save_are_left_out(tmp_path: Path) -> None:
    weights = random_weights(tiny_config())
    masks = {
        "gpt_neox.layers.0.attention.bias": np.ones((1, 1, 4, 4), bool),
        "gpt_neox.layers.0.attention.masked_bias": np.float32([-1e9]),
        "gpt_neox.layers.0.attention.rotary_emb.inv_freq": np.ones(4, np.float32),
    }
    for shards in (1, 3):
        source = open_model(write_folder(tmp_path / str(shards), tiny_config(), weights | masks, shards))
        assert source.tensors.keys() == weights.keys()
