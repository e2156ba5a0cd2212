"""4-bit checkpoints that contradict themselves: an error names each weight and all its problems."""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qlora_jax.io.hf.quantized_folder import write_quantized_folder
from qlora_jax.io.hf.reader import SINGLE
from qlora_jax.io.loading.loader import read_quantized
from qlora_jax.io.open_model import open_model
from qlora_jax.models.config import WeightFormat
from tests.io.tiny_models import random_weights, tiny_config, write_folder

UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"
STATE = ".quant_state.bitsandbytes__nf4"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of ours, double-quantized."""
    config, folder = tiny_config(), tmp_path_factory.mktemp("bnb")
    (folder / "4 bit").mkdir()
    source = open_model(write_folder(folder / "dense", config, random_weights(config)))
    write_quantized_folder(folder / "4 bit", source, WeightFormat(dtype="float32"), lambda *_: None)
    assert open_model(folder / "4 bit").tensors[UP].read_quantized is not None
    return folder / "4 bit"


@pytest.mark.parametrize("left_out", [(), ("_load_in_4bit", "_load_in_8bit", "bnb_4bit_quant_storage")])
def test_configs_of_old_and_new_writers(sound: Path, tmp_path: Path, left_out: tuple[str, ...]) -> None:
    (tmp_path / SINGLE).write_bytes((sound / SINGLE).read_bytes())
    config = json.loads((sound / "config.json").read_text())
    for key in left_out:
        del config["quantization_config"][key]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert open_model(tmp_path).tensors[DOWN].read_quantized is not None


def state(name: str, **changes: object) -> Callable[[dict], None]:
    def change(tensors: dict) -> None:
        told = json.loads(tensors[name + STATE].tobytes()) | changes
        tensors[name + STATE] = np.frombuffer(json.dumps(told).encode(), np.uint8)

    return change


def without(*names: str) -> Callable[[dict], None]:
    return lambda tensors: [tensors.pop(name) for name in names] and None


def put(name: str, value: np.ndarray) -> Callable[[dict], None]:
    return lambda tensors: tensors.update({name: value})


CASES = {
    "another shape": (
        state(UP, shape=[64, 64]),
        [UP, "codes: found ", "expected 2048", "for [64, 64] in blocks of 64"],
    ),
    "another block size": (state(UP, blocksize=128), [UP, "absmax: found ", "in blocks of 128"]),
    "another code": (state(UP, quant_type="fp4"), [UP, "fp4 in its quant_state, nf4 in the tensor's name"]),
    "no shape": (
        state(UP, shape=None, blocksize=-1),
        [UP, "blocksize: found -1, expected at least 1", "shape: found None, expected a list"],
    ),
    "no object": (
        put(UP + STATE, np.frombuffer(b"[]", np.uint8)),
        [UP, "its quant_state: found [], expected an object"],
    ),
    "no constants": (without(UP + ".absmax", DOWN + ".quant_map"), [UP, DOWN, "'absmax'", "'quant_map'", "missing"]),
    "no state": (without(UP + STATE), [UP, "bytes (U8) without a quant_state"]),
    "no codes": (without(UP), [UP, "the codes"]),
    "no JSON": (put(UP + STATE, np.frombuffer(b"{nf4", np.uint8)), [UP, "its quant_state, line 1, column 2: not JSON"]),
    "texts and lists": (
        state(UP, nested_offset="0", dtype=["float32"], nested_blocksize=2.5),
        ["nested_offset: found '0', expected a number", "dtype: found ['float32'], expected 'float32', 'float16' or"],
    ),
    "another type": (
        put(UP + ".nested_absmax", np.ones(1, np.uint8)),
        [UP, "nested_absmax: found U8, expected F32"],
    ),
    "a longer table": (put(UP + ".quant_map", np.zeros(32, np.float32)), [UP, "table of nf4"]),
    "another table": (put(UP + ".quant_map", np.linspace(-1, 1, 16, dtype=np.float32)), [UP, "table of nf4"]),
}


@pytest.mark.parametrize("case", CASES)
def test_every_weight_that_contradicts_itself_is_named(sound: Path, tmp_path: Path, case: str) -> None:
    change, told = CASES[case]
    tensors = load_file(sound / SINGLE)
    change(tensors)
    save_file(tensors, tmp_path / SINGLE)
    (tmp_path / "config.json").write_text((sound / "config.json").read_text())
    with pytest.raises(ValueError, match="4-bit weights that cannot be read") as error:
        open_model(tmp_path)
    for words in told:
        assert words.replace("\\", "") in str(error.value)


def test_a_weight_of_another_format_than_its_stack_is_named(sound: Path, tmp_path: Path) -> None:
    tensors = load_file(sound / SINGLE)
    state(DOWN, nested_blocksize=255)(tensors)
    save_file(tensors, tmp_path / SINGLE)
    (tmp_path / "config.json").write_bytes((sound / "config.json").read_bytes())
    source = open_model(tmp_path)
    read = source.tensors[UP].read_quantized
    assert read is not None
    with pytest.raises(ValueError, match=rf"{DOWN} is quantized with other.*nested_block_size=255, expected 256"):
        read_quantized(source, source.tensors[DOWN], read())


@pytest.mark.parametrize("part", ["absmax", "nested_absmax"])
def test_constants_of_another_shape_and_the_right_size_are_read(sound: Path, tmp_path: Path, part: str) -> None:
    tensors = load_file(sound / SINGLE)
    put(f"{DOWN}.{part}", tensors[f"{DOWN}.{part}"].reshape(-1, 1))(tensors)
    save_file(tensors, tmp_path / SINGLE)
    (tmp_path / "config.json").write_bytes((sound / "config.json").read_bytes())
    reads = [open_model(folder).tensors[DOWN].read_quantized for folder in (sound, tmp_path)]
    first, second = (read() for read in reads if read is not None)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert jax.tree.map(np.shape, first) == jax.tree.map(np.shape, second)
