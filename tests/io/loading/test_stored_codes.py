"""Models that keep the codes of their files: values, types per layer, meshes, the fingerprint, and errors."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from pallas_kernels.formats.ggml_tensor import BLOCKS, SPLIT_K, GgmlTensor, block_layout
from pallas_kernels.formats.qtensor import QTensor
from qlora_jax import quantize
from qlora_jax.config import ModelArgs
from qlora_jax.io.gguf.header import parse_header
from qlora_jax.io.hf.quantized_folder import write_quantized_folder
from qlora_jax.io.loading.loader import Loaded, load_model
from qlora_jax.io.loading.stored_codes import with_dense_layers, with_stored_codes
from qlora_jax.io.open_model import open_model
from qlora_jax.io.tensor_map import slots_of
from qlora_jax.models.config import DENSE, STORED, WeightFormat
from qlora_jax.models.families import model_config
from qlora_jax.models.tensor_names import layer_name
from qlora_jax.nn.frozen_weight import MixedStack, dense_weight
from qlora_jax.sharding import make_mesh
from qlora_jax.training.plan.target import model_features, planned_weights
from tests.ggml_codes import dequantized
from tests.io.tiny_models import random_weights, tiny_config, write_folder, write_gguf
from tests.io.tiny_tokenizers import byte_level

CONFIG = tiny_config()
WEIGHTS = random_weights(CONFIG)
FORMAT = WeightFormat(quant_type=STORED, dtype="float32")
Q8_0 = "model.layers.1.self_attn.q_proj.weight"
TYPES = {
    Q8_0: Kind.Q8_0,
    "model.layers.0.mlp.down_proj.weight": Kind.F16,
    "model.layers.0.mlp.up_proj.weight": Kind.F32,
    "model.layers.1.mlp.up_proj.weight": Kind.F32,
}


@pytest.fixture(scope="module")
def mixed_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file in Q4_1, some of whose layers have other types; rows of queries and keys are in llama.cpp's order."""
    return write_gguf(tmp_path_factory.mktemp("stored") / "tiny.gguf", CONFIG, WEIGHTS, Kind.Q4_1, types=TYPES)


def _load(path: Path, weights: WeightFormat = FORMAT, **kwargs: Any) -> Loaded:
    source = open_model(path)
    return load_model(source, model_config(source.config), weights, **kwargs)


def test_every_layer_has_the_files_values_and_bytes(mixed_gguf: Path) -> None:
    source, slots = open_model(mixed_gguf), slots_of(_load(mixed_gguf).model)
    packed = 0
    for slot in slots:
        for index, name in enumerate(slot.names):
            part, expected = slot.part(index), source.tensors[name].read().astype(np.float32)
            row = slot.leaf.locate(index)[1] if isinstance(slot.leaf, MixedStack) else index
            if slot.stacked:
                part = jax.tree.map(lambda leaf, row=row: leaf[row], part)
            np.testing.assert_array_equal(dense_weight(part, "float32"), expected, err_msg=name)
            if isinstance(part, GgmlTensor):
                assert (part.ggml_type, part.nbytes) == (source.tensors[name].file_type, source.tensors[name].nbytes)
                packed += 1
    assert packed == 2 * 7 - 3  # embedding and head are dequantized, as are files' layers in 16 and 32 bits


def test_formats_are_those_of_the_file(mixed_gguf: Path) -> None:
    source = open_model(mixed_gguf)
    weights = with_dense_layers(FORMAT, source, model_config(source.config))
    formats = dict(weights.stored)
    assert formats["self_attn.q_proj"] == ("Q4_1", "Q8_0") and formats["self_attn.k_proj"] == ("Q4_1", "Q4_1")
    assert formats["mlp.down_proj"] == (DENSE, "Q4_1") and formats["mlp.up_proj"] == (DENSE, DENSE)
    assert weights.parts("mlp.down_proj", 2) == {"Q4_1": (1,), DENSE: (0,)}


def test_a_config_whose_rows_are_not_whole_blocks_is_refused_by_file(mixed_gguf: Path) -> None:
    source = open_model(mixed_gguf)
    config = dataclasses.replace(model_config(source.config), embed_dim=72)
    with pytest.raises(
        ValueError, match=r"(?s)tiny\.gguf: .*q_proj: found 72 columns, expected a multiple of 32 for Q4_1"
    ):
        with_dense_layers(FORMAT, source, config)


def test_a_mesh_loads_the_same_base(mixed_gguf: Path) -> None:
    on_one, on_mesh = _load(mixed_gguf), _load(mixed_gguf, mesh=make_mesh(2, 4))
    assert on_mesh.fingerprint == on_one.fingerprint
    for found, expected in zip(slots_of(on_mesh.model), slots_of(on_one.model), strict=True):
        assert jax.tree.structure(found.leaf) == jax.tree.structure(expected.leaf)
        for ours, theirs in zip(jax.tree.leaves(found.leaf), jax.tree.leaves(expected.leaf), strict=True):
            np.testing.assert_array_equal(ours, theirs, err_msg=str(found.path))


@pytest.mark.parametrize("mesh", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["one device", "mesh"])
def test_a_gpu_holds_the_same_base_in_the_order_of_its_kernels(tmp_path: Path, mesh: bool) -> None:
    """Queries are in Q4_1, which no kernel takes; the fingerprint is that of the file's bytes."""
    path = write_gguf(tmp_path / "tiny.gguf", CONFIG, WEIGHTS, Kind.Q4_0, types={Q8_0: Kind.Q4_1})
    expected = _load(path)
    found = _load(path, dataclasses.replace(FORMAT, platform="gpu"), mesh=make_mesh(2, 4) if mesh else None)
    assert found.fingerprint == expected.fingerprint
    layouts = set()
    for ours, theirs in zip(slots_of(found.model), slots_of(expected.model), strict=True):
        for index in range(len(ours.names)):
            part, other = ours.part(index), theirs.part(index)
            if isinstance(part, GgmlTensor):
                layouts.add((part.ggml_type, part.layout))
                assert part.layout == block_layout("gpu", part.ggml_type, part.shape)
                np.testing.assert_array_equal(dense_weight(part, "float32"), dense_weight(other, "float32"))
    assert {("Q4_0", SPLIT_K), ("Q4_1", BLOCKS)} <= layouts


@pytest.mark.slow
def test_the_fingerprint_has_the_codes_alone(mixed_gguf: Path, tmp_path: Path) -> None:
    """Settings of quantization and the compute dtype do not matter; the type of one layer does."""
    found = _load(mixed_gguf).fingerprint
    same = WeightFormat(quant_type=STORED, block_size=128, double_quant=False, dtype="bfloat16")
    assert _load(mixed_gguf, same).fingerprint == found
    other = write_gguf(tmp_path / "other.gguf", CONFIG, WEIGHTS, Kind.Q4_1, types=TYPES | {Q8_0: Kind.Q4_1})
    assert _load(other).fingerprint != found != _load(mixed_gguf, WeightFormat(dtype="float32")).fingerprint


@pytest.mark.slow
def test_files_of_bitsandbytes_keep_their_settings(tmp_path: Path) -> None:
    dense = write_folder(tmp_path / "dense", CONFIG, WEIGHTS, 1, **{"tokenizer.json": byte_level()})
    quantize.main(["--model", str(dense), "--output", str(tmp_path / "fp4"), "--quant_type", "fp4"])
    kept = _load(tmp_path / "fp4")
    assert kept.fingerprint == _load(tmp_path / "fp4", WeightFormat(quant_type="fp4", dtype="float32")).fingerprint
    values = kept.model.model.layers.self_attn.v_proj.weight.get_value()
    assert isinstance(values, QTensor) and values.quant_type == "fp4"
    with pytest.raises(ValueError, match=r"has no codes to keep \(found linear layers in F32,"):
        _load(dense)


def test_scales_that_are_not_finite_are_refused(mixed_gguf: Path, tmp_path: Path) -> None:
    (info,) = [info for info in parse_header(mixed_gguf).tensors if info.name == "blk.1.attn_v.weight"]
    damaged = bytearray(mixed_gguf.read_bytes())
    damaged[info.offset + 20 + 2 : info.offset + 20 + 4] = np.float16("inf").tobytes()  # the second block's minimum
    (tmp_path / "damaged.gguf").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"scales of model.layers.1.self_attn.v_proj.weight are not finite \(Q4_1\)"):
        _load(tmp_path / "damaged.gguf")


def test_rows_are_read_in_hugging_faces_order(mixed_gguf: Path) -> None:
    """llama.cpp's files have the rows of keys in another order; a process of a mesh reads some of them."""
    value = _load(mixed_gguf).model.model.layers.self_attn.k_proj.weight.get_value()
    assert isinstance(value, GgmlTensor) and value.stack_shape == (2,) and value.codes.dtype == jnp.uint8
    read = open_model(mixed_gguf).tensors[layer_name("model.layers.self_attn.k_proj.weight", 1)].read_stored
    assert read is not None
    rows = read(5, 9)
    assert (rows.ggml_type, rows.shape) == ("Q4_1", (4, 64))
    np.testing.assert_array_equal(value.codes[1, 5:9], rows.codes)
    np.testing.assert_array_equal(dequantized(rows), dequantized(read(0, 32))[5:9])


def test_plans_count_the_codes_of_the_file(mixed_gguf: Path) -> None:
    args = ModelArgs(path=str(mixed_gguf), quant_type="stored", compute_dtype="float32")
    weights = planned_weights(args, model_features(args.path), "cpu")
    assert weights.stored_counts == "10 layers in Q4_1, 1 layer in Q8_0"
    assert weights.stored == with_stored_codes(weights, open_model(mixed_gguf), model_features(args.path)).stored
    with pytest.raises(ValueError, match=r"'stored', whose codes are those of the files .found model.path=qwen3-0.6b"):
        planned_weights(ModelArgs(path="qwen3-0.6b", quant_type="stored"), model_features("qwen3-0.6b"), "cpu")


def test_plans_leave_layers_dense_that_the_file_has_in_16_bits(tmp_path: Path) -> None:
    dense, output = write_folder(tmp_path / "dense", CONFIG, WEIGHTS), tmp_path / "nf4"
    output.mkdir()
    weights = WeightFormat(dtype="float32", dense=(("mlp.down_proj", (1,)),))
    write_quantized_folder(output, open_model(dense), weights, lambda *_: None)
    args = ModelArgs(path=str(output), quant_type="stored", compute_dtype="float32")
    planned = planned_weights(args, model_features(args.path), "cpu")
    assert (planned.quant_type, planned.dense) == ("nf4", weights.dense)
