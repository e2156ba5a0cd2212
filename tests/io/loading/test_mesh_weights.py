"""A model loaded on a mesh is the model of one device to the bit: base, fingerprint, new rows and adapters."""

import dataclasses
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from pallas_kernels.formats.qtensor import QTensor
from qlora_jax import model_source
from qlora_jax.config import LoraArgs
from qlora_jax.io.hf import reader as hf_reader
from qlora_jax.io.hf.quantized_folder import write_quantized_folder
from qlora_jax.io.loading.base_fingerprint import SUFFIX
from qlora_jax.io.loading.loader import Loaded, load_model
from qlora_jax.io.open_model import open_model
from qlora_jax.io.pretrained import load_for_training
from qlora_jax.methods.attach import attach_method
from qlora_jax.models.config import WeightFormat
from qlora_jax.models.families import model_config
from qlora_jax.models.partition import ModelParts, partition, parts_specs
from qlora_jax.models.trainable_embeddings import add_tables
from qlora_jax.sharding import cut_axis, make_mesh
from tests.io.gguf_families import MIXTURES, random_tensors
from tests.io.tiny_models import random_weights, tiny_config, write_folder, write_gguf
from tests.marks import EXHAUSTIVE, some_in_ci

CONFIG = tiny_config(attention_bias=True)
WEIGHTS = random_weights(CONFIG)
WEIGHTS["model.layers.0.mlp.up_proj.weight"][:2] = [[1e-40], [0.0]]  # a subnormal block, and one of zeros
FORMAT = WeightFormat(dtype="float32")
MESHES = [
    (1, 8),
    pytest.param((2, 4), marks=EXHAUSTIVE),
    pytest.param((4, 2), marks=EXHAUSTIVE),
    pytest.param((8, 1), marks=EXHAUSTIVE),
]


def _load(path: Path, weights: WeightFormat = FORMAT, **kwargs: Any) -> Loaded:
    source = open_model(path)
    return load_model(source, model_config(source.config), weights, **kwargs)


def _leaves(loaded: Loaded) -> dict[str, jax.Array]:
    paths = jax.tree_util.tree_leaves_with_path(nnx.state(loaded.model))
    return {jax.tree_util.keystr(path): leaf for path, leaf in paths}


def _assert_equal(found: Loaded, expected: Loaded, mesh: Mesh) -> None:
    assert found.fingerprint == expected.fingerprint
    ours, theirs = _leaves(found), _leaves(expected)
    assert ours.keys() == theirs.keys()
    for name, leaf in ours.items():
        assert set(leaf.sharding.device_set) == set(mesh.devices.flat), name
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(theirs[name]), strict=True, err_msg=name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("dense"), CONFIG, WEIGHTS)


@pytest.fixture(scope="module")
def on_one(folder: Path) -> Loaded:
    return _load(folder)


@pytest.mark.parametrize("sizes", MESHES)
def test_each_device_gets_its_part_of_the_base_to_the_bit(folder: Path, on_one: Loaded, sizes: tuple[int, int]) -> None:
    mesh = make_mesh(*sizes)
    found = _load(folder, mesh=mesh)
    _assert_equal(found, on_one, mesh)
    parts = partition(found.model)
    specs = jax.tree.leaves(parts_specs(parts, mesh).base)
    for leaf, spec in zip(jax.tree.leaves(parts.base), specs, strict=True):
        cut = cut_axis(spec) is not None
        shares = {shard.data.nbytes for shard in leaf.addressable_shards}
        assert shares == {leaf.nbytes // sizes[1] if cut else leaf.nbytes}
    codes = [
        leaf.codes
        for leaf in jax.tree.leaves(parts.base, is_leaf=lambda leaf: isinstance(leaf, QTensor))
        if isinstance(leaf, QTensor)
    ]
    assert codes and all(each.addressable_shards[0].data.nbytes == each.nbytes // sizes[1] for each in codes)


OTHERS = {
    "layout of gpus": (WeightFormat(dtype="bfloat16", platform="gpu"), {}),
    "rows of halves that do not divide, and blocks that cross rows": (
        FORMAT,
        dict(num_attention_heads=1, num_key_value_heads=1, head_dim=20),
    ),
    "single constants": (WeightFormat(dtype="float32", quant_type="fp4", block_size=32, double_quant=False), {}),
    "dense": (WeightFormat(dtype="bfloat16", quant_type=None), {}),
    "tables that do not divide": (FORMAT, dict(vocab_size=33)),
}


@pytest.mark.parametrize(
    "case", [*list(OTHERS)[:2], *(pytest.param(case, marks=EXHAUSTIVE) for case in list(OTHERS)[2:])]
)
def test_other_formats(tmp_path: Path, case: str) -> None:
    weights, changes = OTHERS[case]
    config, mesh = CONFIG | changes, make_mesh(1, 8)
    folder = write_folder(tmp_path, config, random_weights(config))
    _assert_equal(_load(folder, weights, mesh=mesh), _load(folder, weights), mesh)


def test_a_checkpoint_in_4_bits(folder: Path, on_one: Loaded, tmp_path: Path) -> None:
    write_quantized_folder(tmp_path, open_model(folder), FORMAT, lambda *_: None)
    mesh = make_mesh(2, 4)
    _assert_equal(_load(tmp_path, mesh=mesh), on_one, mesh)


@pytest.mark.parametrize(
    "kind", [gguf.GGMLQuantizationType.F32, pytest.param(gguf.GGMLQuantizationType.Q8_0, marks=EXHAUSTIVE)]
)
def test_a_gguf_file(tmp_path: Path, kind: gguf.GGMLQuantizationType) -> None:
    path, mesh = write_gguf(tmp_path / "tiny.gguf", CONFIG, random_weights(CONFIG), kind), make_mesh(1, 8)
    _assert_equal(_load(path, mesh=mesh), _load(path), mesh)


@pytest.mark.parametrize("sizes", some_in_ci([((2, 4),), ((1, 8),)], lambda index: index == 0))
def test_a_mixture_of_experts(tmp_path: Path, sizes: tuple[int, int]) -> None:
    """Four experts over four devices, each of which has one, and over eight, which cut each of them."""
    config = MIXTURES["glm4moe"][1]
    folder, mesh = write_folder(tmp_path, config, random_tensors(config)), make_mesh(*sizes)
    _assert_equal(_load(folder, mesh=mesh), _load(folder), mesh)


def test_each_byte_of_the_file_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mapped, warmed = [], []
    map_bytes, warm = hf_reader.map_bytes, model_source._read_into_page_cache
    monkeypatch.setattr(hf_reader, "map_bytes", lambda *stored: mapped.append(stored[1:]) or map_bytes(*stored))
    monkeypatch.setattr(
        model_source,
        "_read_into_page_cache",
        lambda entry, rows: (
            warmed.extend(each[1:] for pair in rows for each in entry.ranges_of(*pair)) or warm(entry, rows)
        ),
    )
    _load(folder, mesh=make_mesh(2, 4))
    for reads in (mapped, warmed):
        assert sum(nbytes for _, nbytes in reads) == sum(weight.nbytes for weight in WEIGHTS.values())
        assert len({first for first, _ in reads}) == len(reads)


def test_the_form_of_earlier_fingerprints_is_kept(folder: Path, on_one: Loaded) -> None:
    """Runs of earlier versions without double quantization resume: this is the digest that they stored."""
    assert on_one.fingerprint.endswith(SUFFIX)
    earlier = "35e6a55fe802e56e34b8c80e2f9e23f1b81b6ce53e81b78f077c76ae3629ee6c"
    single = dataclasses.replace(FORMAT, double_quant=False)
    for mesh in (None, make_mesh(2, 4)):
        assert _load(folder, single, mesh=mesh, fingerprint=earlier).fingerprint == earlier
        assert _load(folder, mesh=mesh, fingerprint=on_one.fingerprint).fingerprint == on_one.fingerprint


def norms_of(parts: ModelParts) -> list[jax.Array]:
    """The frozen norms of DoRA."""
    flat = nnx.to_flat_state(parts.base)
    return [variable.get_value() for path, variable in flat if path[-1] == "weight_norms2"]


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_adapters_and_new_rows_are_those_of_one_device_to_the_bit(folder: Path, method: str) -> None:
    source, mesh = open_model(folder), make_mesh(1, 8)
    lora = LoraArgs(rank=16, method=method, target_modules=["down_proj"])
    features, new = model_config(source.config), (32, 33)
    found = []
    for each in (None, mesh):
        loaded, _ = load_for_training(source, features, FORMAT, lora, jax.random.key(3), mesh=each, new_ids=new)
        attach_method(loaded.model, lora, jax.random.key(3), mesh=each)
        add_tables(loaded.model, new, lora)
        found.append(partition(loaded.model))
    for ours, theirs in zip(jax.tree.leaves(found[1].lora), jax.tree.leaves(found[0].lora), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs), strict=True)
    up = found[1].lora["model.layers.mlp.down_proj"]["lora_a"]
    assert up.addressable_shards[0].data.shape == (2, 128 // 8, 16)
    assert found[1].lora["model.embed_tokens"]["rows"].sharding.is_fully_replicated
    for ours, theirs in zip(*(norms_of(parts) for parts in found), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs), strict=True)
    assert len(norms_of(found[1])) == (method == "dora")
    specs = parts_specs(found[1], mesh)
    placed = jax.device_put(found[1].base, jax.tree.map(lambda spec: jax.NamedSharding(mesh, spec), specs.base))
    for ours, theirs in zip(jax.tree.leaves(found[1].base), jax.tree.leaves(placed), strict=True):
        assert ours.sharding.is_equivalent_to(theirs.sharding, ours.ndim)
