"""The loader: the model's values are those on disk, quantized; memory; errors; the fingerprint."""

import dataclasses
import json
import math
import operator
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from pallas_kernels.formats.layouts import repack
from pallas_kernels.formats.qtensor import QTensor
from qlora_jax.io.loading import loader
from qlora_jax.io.loading.stored_codes import with_dense_layers
from qlora_jax.io.open_model import open_model
from qlora_jax.io.tensor_map import Slot, slots_of
from qlora_jax.model_source import ModelSource, TensorEntry
from qlora_jax.models.config import STORED, WeightFormat
from qlora_jax.models.families import model_config
from qlora_jax.models.partition import host_paths, partition
from qlora_jax.models.precision import keep_in_16_bits
from qlora_jax.models.tensor_names import layer_name
from qlora_jax.quant import quantize_numpy
from tests.io.gguf_families import FAMILIES, random_tensors, stacked_experts, write_family
from tests.io.tiny_models import random_weights, tiny_config, write_folder, write_gguf

CONFIG = tiny_config(attention_bias=True)
WEIGHTS = random_weights(CONFIG)
WEIGHTS["model.layers.0.mlp.up_proj.weight"][:2] = [[1e-40], [0.0]]  # a subnormal block, and one of zeros
FORMAT = WeightFormat(dtype="float32")


def _load(path: Path, weights: WeightFormat = FORMAT, **kwargs: Any) -> loader.Loaded:
    source = open_model(path)
    return loader.load_model(source, model_config(source.config), weights, **kwargs)


def _leaf(model: Any, name: str) -> Any:
    for part in name.split("."):
        model = getattr(model, part)
    return model.get_value()


def _assert_same(found: QTensor, expected: QTensor) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), theirs, strict=True)


@pytest.mark.parametrize(
    "weights",
    [
        FORMAT,
        WeightFormat(dtype="bfloat16", platform="gpu"),
        WeightFormat(dtype="float32", quant_type="fp4", block_size=32, double_quant=False),
        WeightFormat(dtype="float32", block_size=128),  # 64 columns are less than a block: layout flat
    ],
    ids=lambda weights: f"{weights.quant_type}-{weights.dtype}-{weights.block_size}",
)
def test_every_leaf_is_what_was_on_disk(tmp_path: Path, weights: WeightFormat) -> None:
    model = _load(write_folder(tmp_path, CONFIG, WEIGHTS), weights).model
    settings = {field: getattr(weights, field) for field in ("quant_type", "block_size", "double_quant")}
    for name in _linears():
        for layer in range(CONFIG["num_hidden_layers"]):
            found = jax.tree.map(lambda leaf, layer=layer: leaf[layer], _leaf(model, name))
            expected = quantize_numpy(WEIGHTS[layer_name(name, layer)], **settings)
            expected = dataclasses.replace(repack(expected, found.layout), dtype=weights.dtype)
            _assert_same(found, expected)
    _assert_dense_leaves(model, weights.dtype)


def _linears() -> list[str]:
    marker = "model.layers.0."
    names = [name for name in WEIGHTS if name.startswith(marker) and WEIGHTS[name].ndim == 2]
    return [name.replace(marker, "model.layers.") for name in names]


def _assert_dense_leaves(model: Any, dtype: str) -> None:
    for name, weight in WEIGHTS.items():
        if name.startswith("model.layers.0.") and weight.ndim == 1:
            stacked = name.replace("model.layers.0.", "model.layers.")
            expected = np.stack([WEIGHTS[layer_name(stacked, layer)] for layer in range(2)])
            found = _leaf(model, stacked)
        elif not name.startswith("model.layers."):
            found, expected = _leaf(model, name), weight
        else:
            continue
        np.testing.assert_array_equal(np.asarray(found), expected.astype(dtype), strict=True)


def test_no_quantization(tmp_path: Path) -> None:
    model = _load(write_folder(tmp_path, CONFIG, WEIGHTS), WeightFormat(dtype="bfloat16", quant_type=None)).model
    for name in _linears():
        expected = np.stack([WEIGHTS[layer_name(name, layer)] for layer in range(2)]).astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(np.asarray(_leaf(model, name)), expected, strict=True)


def test_bf16_files(tmp_path: Path) -> None:
    halves = {name: weight.astype(ml_dtypes.bfloat16) for name, weight in WEIGHTS.items()}
    model = _load(write_folder(tmp_path, CONFIG, halves)).model
    name = "model.layers.mlp.up_proj.weight"
    found = jax.tree.map(lambda leaf: leaf[0], _leaf(model, name))
    expected = repack(quantize_numpy(halves[layer_name(name, 0)]), found.layout)
    _assert_same(found, dataclasses.replace(expected, dtype="float32"))
    embedding = np.asarray(_leaf(model, "model.embed_tokens.weight"))
    np.testing.assert_array_equal(embedding, halves["model.embed_tokens.weight"].astype(np.float32), strict=True)


def test_leaves_share_no_memory_with_the_file(tmp_path: Path) -> None:
    """A folder may be replaced while a model that came from it is in use."""
    path = write_folder(tmp_path, CONFIG, WEIGHTS)
    model = _load(path).model
    before = np.array(_leaf(model, "model.embed_tokens.weight"))
    with (path / "model.safetensors").open("r+b") as file:
        size = file.seek(0, 2)
        file.seek(0)
        file.write(bytes(size))
    np.testing.assert_array_equal(_leaf(model, "model.embed_tokens.weight"), before)


MIXTURE = FAMILIES["glm4moe"][1]  # a dense layer, then two with a shared expert and a bias of the router


@pytest.fixture(scope="module")
def mixture() -> dict[str, np.ndarray]:
    return random_tensors(MIXTURE)


def test_experts_are_quantized_one_by_one(tmp_path: Path, mixture: dict[str, np.ndarray]) -> None:
    model = _load(write_folder(tmp_path, MIXTURE, mixture)).model
    assert len(mixture) == sum(_check_mixture_leaf(model, slot, mixture) for slot in slots_of(model))


@pytest.mark.slow
def test_offloaded_experts_are_the_same_in_host_memory(tmp_path: Path, mixture: dict[str, np.ndarray]) -> None:
    folder = write_folder(tmp_path, MIXTURE, mixture)
    here, away = _load(folder), _load(folder, dataclasses.replace(FORMAT, experts_on_host=True))
    assert here.fingerprint == away.fingerprint
    paths = host_paths(partition(away.model))
    assert [".".join(path[3:-1]) for path in paths] == [f"experts.{name}_proj" for name in ("down", "gate", "up")]
    for found, expected in zip(*(jax.tree.leaves(nnx.state(each.model)) for each in (away, here)), strict=True):
        np.testing.assert_array_equal(found, expected, strict=True)
    tokens_BT = np.arange(12, dtype=np.int32).reshape(2, 6)
    np.testing.assert_array_equal(
        *(each.model.hidden(jax.numpy.asarray(tokens_BT)) for each in (here, away)), strict=True
    )


def _check_mixture_leaf(model: Any, slot: Slot, tensors: dict[str, np.ndarray]) -> int:
    """Compares a leaf with the tensors that fill it; returns their number."""
    leaf = _leaf(model, ".".join(map(str, slot.path)))
    assert len(slot.names) == math.prod(slot.stack)
    for index, name in enumerate(slot.names):
        found = jax.tree.map(operator.itemgetter(slot.place(index)) if slot.stacked else np.asarray, leaf)
        if isinstance(leaf, QTensor):
            expected = repack(quantize_numpy(tensors[name]), found.layout)
            _assert_same(found, dataclasses.replace(expected, dtype="float32"))
        else:
            np.testing.assert_array_equal(found, tensors[name], strict=True)
        assert (slot.stack == (2, 4)) == (".experts." in name)
    return len(slot.names)


def test_the_form_of_a_file_does_not_change_a_mixture(tmp_path: Path, mixture: dict[str, np.ndarray]) -> None:
    stacked = stacked_experts(mixture)
    fused = {name: values for name, values in stacked.items() if ".experts." not in name}
    for layer in (1, 2):
        gate, up, down = (stacked[f"model.layers.{layer}.mlp.experts.{part}_proj.weight"] for part in PARTS)
        fused[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = np.concatenate([gate, up], axis=1)
        fused[f"model.layers.{layer}.mlp.experts.down_proj"] = down
    paths = [
        write_folder(tmp_path / "one by one", MIXTURE, mixture),
        write_folder(tmp_path / "fused", MIXTURE, fused),
        write_family(tmp_path / "glm4moe.gguf", "glm4moe", MIXTURE, mixture),
    ]
    assert len({_load(path).fingerprint for path in paths}) == 1


PARTS = ("gate", "up", "down")


def test_missing_experts_are_named_by_layer(tmp_path: Path, mixture: dict[str, np.ndarray]) -> None:
    some = {name: values for name, values in mixture.items() if not re.search(r"\.2\.mlp\.experts\.[013]\.up", name)}
    folder = write_folder(tmp_path, MIXTURE, some | {"model.layers.1.mlp.gate_proj.weight": np.ones((96, 64), "f4")})
    with pytest.raises(ValueError, match="the tensors do not fit the model") as error:
        _load(folder)
    assert str(error.value).splitlines()[1:] == [
        "  missing: model.layers.*.mlp.experts.*.up_proj.weight in layers 2, experts 0, 1, 3",
        "  unexpected: model.layers.*.mlp.gate_proj.weight in layers 1",
    ]


def test_more_experts_than_tensors_are_refused_before_anything_loops_over_them(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, MIXTURE | {"n_routed_experts": 4096}, {"model.norm.weight": np.ones(64, "f4")})
    with pytest.raises(ValueError, match="found 1 tensors, expected 24,576 of experts, 2 layers of 4096 experts"):
        _load(folder)


def _with_codes(folder: Path, marker: str) -> ModelSource:
    """A source whose matrices with `marker` in their names are in 4 bits, as files of bitsandbytes have them."""
    source = open_model(folder)

    def in_codes(entry: TensorEntry) -> TensorEntry:
        return dataclasses.replace(entry, file_type="NF4", read_quantized=lambda: quantize_numpy(entry.read()))

    tensors = {name: in_codes(entry) if marker in name else entry for name, entry in source.tensors.items()}
    return dataclasses.replace(source, tensors=tensors)


def test_experts_in_4_bits_cannot_be_kept_in_16(tmp_path: Path, mixture: dict[str, np.ndarray]) -> None:
    """transformers 4 stores the codes of each expert."""
    source, features = _with_codes(write_folder(tmp_path, MIXTURE, mixture), "_proj.weight"), model_config(MIXTURE)
    kept = keep_in_16_bits(FORMAT, ["layers.2.mlp.experts.down_proj"], features)
    with pytest.raises(ValueError, match=r"stores mlp.experts.down_proj of layers 2 in 4 bits, so their 16-bit"):
        with_dense_layers(kept, source, features)
    assert with_dense_layers(FORMAT, source, features) == FORMAT


def test_stored_codes_leave_experts_as_the_files_have_them(tmp_path: Path, mixture: dict[str, np.ndarray]) -> None:
    folder, features = write_folder(tmp_path, MIXTURE, mixture), model_config(MIXTURE)
    source = _with_codes(folder, "self_attn.q_proj.weight")
    stored = with_dense_layers(dataclasses.replace(FORMAT, quant_type=STORED), source, features)
    experts = {name: (0, 1) for name in features.expert_shapes()}
    assert stored.quant_type == "nf4" and experts.items() <= dict(stored.dense).items()
    assert "self_attn.q_proj" not in dict(stored.dense)
    assert not experts.keys() & dict(with_dense_layers(FORMAT, source, features).dense).keys()
    some = _with_codes(folder, "layers.1.mlp.experts.3.")
    with pytest.raises(ValueError, match=r"the experts of a layer must have one type.*found NF4, dense"):
        with_dense_layers(dataclasses.replace(FORMAT, quant_type=STORED), some, features)


def test_progress_counts_the_bytes_of_the_file(tmp_path: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    _load(write_folder(tmp_path, CONFIG, WEIGHTS), progress=lambda *call: calls.append(call))
    total = sum(weight.nbytes for weight in WEIGHTS.values())
    assert [done for done, _, _ in calls] == np.cumsum([WEIGHTS[name].nbytes for _, _, name in calls]).tolist()
    assert {name for _, _, name in calls} == WEIGHTS.keys()
    assert calls[-1][:2] == (total, total)


def test_fingerprint_tells_bases_apart(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hf", CONFIG, WEIGHTS)
    print_ = _load(folder).fingerprint
    assert _load(write_gguf(tmp_path / "same.gguf", CONFIG, WEIGHTS)).fingerprint == print_
    assert _load(folder, WeightFormat(dtype="bfloat16", platform="gpu")).fingerprint == print_
    nudged = {name: weight.copy() for name, weight in WEIGHTS.items()}
    nudged["model.layers.1.mlp.up_proj.weight"][3, 5] *= -1
    others = [
        _load(write_folder(tmp_path / "nudged", CONFIG, nudged)),
        _load(write_folder(tmp_path / "theta", CONFIG | {"rope_theta": 5e5}, WEIGHTS)),
        _load(folder, dataclasses.replace(FORMAT, quant_type="fp4")),
        _load(folder, dataclasses.replace(FORMAT, double_quant=False)),
    ]
    assert len({print_, *(other.fingerprint for other in others)}) == 5


def test_all_that_does_not_fit_in_one_error(tmp_path: Path) -> None:
    weights = {name: weight for name, weight in WEIGHTS.items() if ".up_proj." not in name and "1.mlp.gate" not in name}
    weights["model.layers.0.self_attn.q_norm.weight"] = np.ones(16, np.float32)
    weights["model.norm.weight"] = np.ones(63, np.float32)
    with pytest.raises(ValueError, match="the tensors do not fit the model") as error:
        _load(write_folder(tmp_path, CONFIG, weights))
    assert str(error.value).splitlines()[1:] == [
        "  missing: model.layers.*.mlp.gate_proj.weight in layers 1",
        "  missing: model.layers.*.mlp.up_proj.weight in layers 0, 1",
        "  unexpected: model.layers.*.self_attn.q_norm.weight in layers 0",
        "  shape [63] of model.norm.weight, expected [64]",
    ]


def test_derived_tables_may_be_there(tmp_path: Path) -> None:
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}
    plain = _load(write_folder(tmp_path / "a", CONFIG, WEIGHTS))
    assert _load(write_folder(tmp_path / "b", CONFIG, WEIGHTS | extra)).fingerprint == plain.fingerprint


def test_a_head_tied_to_the_embedding_may_be_there_if_equal(tmp_path: Path) -> None:
    config = tiny_config(tie_word_embeddings=True)
    weights = random_weights(config)
    head = {"lm_head.weight": weights["model.embed_tokens.weight"]}
    assert not hasattr(_load(write_folder(tmp_path / "a", config, weights | head)).model, "lm_head")
    with pytest.raises(ValueError, match=r"unexpected: lm_head.weight"):
        _load(write_folder(tmp_path / "b", config, weights | {"lm_head.weight": head["lm_head.weight"] + 1}))


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight"])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_not_finite(tmp_path: Path, name: str, value: float) -> None:
    weights = {key: weight.copy() for key, weight in WEIGHTS.items()}
    weights[name].reshape(-1)[[7, 9]] = value
    with pytest.raises(
        ValueError, match=rf"2 of \d+ elements of {name} are not finite, the first is {value} at"
    ) as error:
        _load(write_folder(tmp_path, CONFIG, weights))
    assert "7]" in str(error.value)


MEASURE = """
import json, sys
from pathlib import Path
import jax
jax.config.update("jax_num_cpu_devices", int(sys.argv[3]))
from qlora_jax.io.loading.loader import load_model
from qlora_jax.model_source import ModelSource, TensorEntry
from qlora_jax.io.open_model import open_model
from qlora_jax.models.config import STORED, WeightFormat
from qlora_jax.models.families import model_config
from qlora_jax.models.precision import keep_in_16_bits
from qlora_jax.sharding import make_mesh

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024

def load(path):
    source = open_model(path)
    model = load_model(source, model_config(source.config), FORMAT, mesh=MESH).model
    return jax.block_until_ready(jax.tree.leaves(model))

FORMAT = WeightFormat(dtype="bfloat16")
MESH = make_mesh(1, int(sys.argv[3])) if sys.argv[3] != "1" else None
load(sys.argv[1])  # compiles what depends on the tensors' shapes
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
leaves = load(sys.argv[2])
print(json.dumps({"peak": status("VmHWM") - before, "model": sum(leaf.nbytes for leaf in leaves)}))
"""


@pytest.mark.parametrize("devices", [1, 8])
def test_host_peak(tmp_path: Path, devices: int) -> None:
    """Memory is bounded by the 4-bit model, the largest tensor in f32 and a constant, on a mesh too."""
    config = tiny_config(hidden_size=256, intermediate_size=1024, head_dim=64, num_hidden_layers=32, vocab_size=4096)
    few = config | {"num_hidden_layers": 1}
    for name, each in (("many", config), ("few", few)):
        weights = random_weights(each)
        write_folder(tmp_path / name, each, weights)
    command = [sys.executable, "-c", MEASURE, tmp_path / "few", tmp_path / "many", str(devices)]
    measured = json.loads(subprocess.run(command, check=True, capture_output=True, cwd=Path.cwd()).stdout)
    linear_weights = sum(weight.size for weight in random_weights(config).values() if weight.ndim == 2)
    largest, constant = 4096 * 256 * 4, 16 * 2**20
    assert measured["peak"] < measured["model"] + largest + constant
    assert measured["model"] + largest + constant < linear_weights * 2  # so that a 16-bit copy would be seen
