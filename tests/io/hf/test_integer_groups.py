"""Tests weights in integers of GPTQ, AWQ and compressed-tensors: values and blocks to the bit, and errors."""

import operator
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from pallas_kernels.formats.ggml_tensor import GgmlTensor
from qlora_jax.io.hf import integer_groups
from qlora_jax.io.hf.coded_weights import check_settings
from qlora_jax.io.hf.reader import CODED_METHODS
from qlora_jax.io.loading.loader import Loaded, load_model
from qlora_jax.io.open_model import open_model
from qlora_jax.model_source import ACT_ORDER, TensorEntry
from qlora_jax.models.config import STORED, WeightFormat
from qlora_jax.models.families import model_config
from qlora_jax.models.partition import host_paths, partition
from tests.ggml_codes import dequantized
from tests.io.gguf_families import FAMILIES, random_tensors
from tests.io.integer_folders import (
    FORMS,
    Form,
    Integers,
    awq,
    awq_config,
    compressed,
    compressed_config,
    gptq,
    gptq_config,
    random_integers,
    write_integer_folder,
)
from tests.io.tiny_models import random_weights, tiny_config, write_folder

CONFIG = tiny_config()
WEIGHTS = random_weights(CONFIG)
NAME = "model.layers.1.mlp.down_proj"
SHAPE = (64, 128)


@pytest.mark.parametrize("form", FORMS)
def test_every_layer_has_the_integers_of_the_file(form: str, tmp_path: Path) -> None:
    dense = write_integer_folder(tmp_path, FORMS[form], CONFIG, WEIGHTS)
    tensors = open_model(tmp_path).tensors
    assert tensors.keys() == dense.keys()
    for name, expected in dense.items():
        entry = tensors[name]
        np.testing.assert_array_equal(entry.read(), expected, err_msg=name)
        if not name.endswith("_proj.weight"):
            continue
        assert entry.read_stored is not None
        blocks = entry.read_stored(3, 21)
        assert blocks.ggml_type == entry.file_type and blocks.shape == (18, expected.shape[1])
        np.testing.assert_array_equal(dequantized(blocks), expected[3:21], err_msg=name)
        np.testing.assert_array_equal(entry.read_rows(3, 21), expected[3:21], err_msg=name)


def _load(folder: Path, **weights: Any) -> Loaded:
    source = open_model(folder)
    return load_model(source, model_config(source.config), WeightFormat(quant_type=STORED, dtype="float32", **weights))


def _one(folder: Path, tensors: dict[str, np.ndarray], quantization: dict[str, Any]) -> TensorEntry:
    """Writes a folder with one layer in integers, and opens it."""
    named = {f"{NAME}.{part}": np.ascontiguousarray(values) for part, values in tensors.items()}
    write_folder(folder, CONFIG | {"quantization_config": quantization}, named)
    return open_model(folder).tensors[f"{NAME}.weight"]


@pytest.mark.parametrize(
    ("size", "dtype", "kind"),
    [(128, np.float16, "INT4_128"), (64, ml_dtypes.bfloat16, "INT4_64_BF16"), (-1, np.float16, "INT4_128")],
)
def test_the_bytes_of_a_group(size: int, dtype: Any, kind: str, tmp_path: Path) -> None:
    """Groups are kept whole in blocks up to 128 weights: scale, zero, and half a byte per weight."""
    weight = random_integers(SHAPE, size, dtype)
    entry = _one(tmp_path, gptq(weight), gptq_config(size))
    assert entry.file_type == kind and entry.read_stored is not None
    block = int(kind.split("_")[1])
    assert entry.read_stored(0, 64).codes.shape == (64, SHAPE[1] // block * (3 + block // 2))


def test_groups_larger_than_a_block_are_several(tmp_path: Path) -> None:
    weight = random_integers((8, 768), 384)
    entry = _one(tmp_path, awq(weight), awq_config(384))
    assert entry.file_type == "INT4_128" and entry.read_stored is not None
    np.testing.assert_array_equal(dequantized(entry.read_stored(0, 8)), weight.dense())


def test_zeros_of_the_first_version_are_added_to_words(tmp_path: Path) -> None:
    """A zero of 0 borrows from the integers after it, as GPTQModel writes it from its second version."""
    weight = random_integers(SHAPE)
    weight = weight._replace(zeros=weight.zeros * (weight.zeros > 3))
    assert (weight.zeros == 0).any()
    tensors = gptq(weight, version=2)
    tensors["qzeros"] = (tensors["qzeros"].view(np.uint32) - np.uint32(0x11111111)).view(np.int32)
    np.testing.assert_array_equal(_one(tmp_path, tensors, gptq_config()).read(), weight.dense())


def test_act_order_is_dequantized_but_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integer_groups, "SLICE_WEIGHTS", 700)  # a few rows at a time
    form = Form({"act_order": True}, gptq, gptq_config(desc_act=True))
    dense = write_integer_folder(tmp_path, form, CONFIG, WEIGHTS)
    entry = open_model(tmp_path).tensors[f"{NAME}.weight"]
    assert entry.file_type == ACT_ORDER and entry.read_stored is None
    np.testing.assert_array_equal(entry.read(), dense[f"{NAME}.weight"])
    with pytest.raises(ValueError, match=r"'stored', but .* has 14 layers .*act-order.*Set model.quant_type=nf4"):
        _load(tmp_path)


def test_biases_of_zeros_are_left_out(tmp_path: Path) -> None:
    """AutoGPTQ gives every layer a bias; others are unexpected tensors."""

    def with_bias(weight: Integers, value: float) -> dict[str, np.ndarray]:
        return gptq(weight) | {"bias": np.full(len(weight.codes), value, np.float16)}

    for value in (0.0, 0.5):
        folder = tmp_path / str(value)
        write_integer_folder(folder, Form({}, lambda w, v=value: with_bias(w, v), gptq_config()), CONFIG, WEIGHTS)
        if value:
            with pytest.raises(ValueError, match=r"unexpected: model.layers.\*.mlp.down_proj.bias in layers 0, 1"):
                _load(folder)
        else:
            _load(folder)


@pytest.mark.slow
def test_integers_of_experts(tmp_path: Path) -> None:
    """Files have each expert's tensors, and Mixtral's names for them; every expert keeps its integers, here or away."""
    sizes = dict(num_local_experts=3, num_experts_per_tok=2, hidden_size=64, intermediate_size=96)
    config = FAMILIES["mixtral"][1] | sizes
    dense = write_integer_folder(tmp_path / "by class", FORMS["awq"], config, random_tensors(config))
    tensors, renamed = load_file(tmp_path / "by class/model.safetensors"), {}
    for name, values in tensors.items():
        for ours, published in {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}.items():
            pattern = rf"mlp\.experts\.(\d+)\.{ours}\."
            name = re.sub(pattern, rf"block_sparse_moe.experts.\1.{published}.", name)
        renamed[name] = values
    renamed = {name.replace("mlp.gate.", "block_sparse_moe.gate."): values for name, values in renamed.items()}
    assert not any(".mlp." in name for name in renamed)
    described = config | {"quantization_config": dict(FORMS["awq"].config)}
    loaded = _load(write_folder(tmp_path / "as published", described, renamed))
    assert loaded.fingerprint == _load(tmp_path / "by class").fingerprint
    up = operator.attrgetter("model.model.layers.mlp.experts.up_proj.weight")(loaded).get_value()
    assert isinstance(up, GgmlTensor) and up.ggml_type == "INT4_32" and up.stack_shape[1] == 3
    for layer in range(up.stack_shape[0]):
        for expert in range(3):
            expected = dense[f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight"]
            np.testing.assert_array_equal(dequantized(up)[layer, expert], expected)
    away, tokens_BT = _load(tmp_path / "as published", experts_on_host=True), jnp.arange(12).reshape(2, 6)
    assert host_paths(partition(away.model))
    np.testing.assert_array_equal(away.model.hidden(tokens_BT), loaded.model.hidden(tokens_BT), strict=True)


SETTINGS = [
    (gptq_config(bits=3), "bits: found 3, expected 2 or 4 or 8"),
    (
        gptq_config(bits=5, group_size=48),
        "bits: found 5, expected 2.*; group_size: found 48, expected -1 or a multiple",
    ),
    (gptq_config(checkpoint_format="marlin"), "checkpoint_format: found marlin, expected gptq or gptq_v2"),
    (gptq_config(is_marlin_format=True), "is_marlin_format: found True"),
    (gptq_config(dynamic={"-:.*gate": {}, "+:.*down": {"bits": 8}}), r"dynamic: found the rule \+:\.\*down"),
    (awq_config(version="GEMV", zero_point=False), "zero_point: found False, expected True; version: found gemv"),
    (awq_config(bits=4, backend="llm-awq"), "backend: found llm-awq"),
    (compressed_config(format="int-quantized"), "format of group_0: found int-quantized, expected pack-quantized"),
    (compressed_config(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme: found"),
    (compressed_config(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config.format: found sparse-24"),
    (compressed_config(config_groups={}), "config_groups: found none"),
    ({"quant_method": "gptq", "bits": "4", "sym": 3}, "(?s)bits: found '4', expected a whole.*group_size: missing"),
    ({"quant_method": "exl2"}, "expected GPTQ, AWQ, compressed-tensors, FP8, ModelOpt, 4 bits of bitsandbytes"),
]


@pytest.mark.parametrize(("quantization", "problem"), SETTINGS)
def test_other_settings_are_refused_together(quantization: dict[str, Any], problem: str, tmp_path: Path) -> None:
    write_folder(tmp_path, CONFIG | {"quantization_config": quantization}, WEIGHTS)
    with pytest.raises(ValueError, match=problem) as error:
        open_model(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)


def test_settings_of_layers_are_refused_together(tmp_path: Path) -> None:
    quantization = compressed_config()
    layers = quantization["config_groups"]["group_0"]
    layers["weights"] |= {"num_bits": 6, "strategy": "tensor"}
    layers["input_activations"] = {"num_bits": 8}
    write_folder(tmp_path, CONFIG | {"quantization_config": quantization}, WEIGHTS)
    with pytest.raises(ValueError, match=r"input_activations: .*num_bits: found 6.*strategy: found 'tensor'"):
        open_model(tmp_path)


# All keys that AutoGPTQ, AutoAWQ and llm-compressor write.
WRITTEN = [
    dict(batch_size=1, bits=4, block_name_to_quantize=None, cache_block_outputs=True, damp_percent=0.01, dataset=None)
    | dict(desc_act=False, exllama_config={"version": 1}, group_size=128, max_input_length=None, model_seqlen=None)
    | dict(module_name_preceding_first_block=None, modules_in_block_to_quantize=None, pad_token_id=None)
    | dict(quant_method="gptq", sym=True, tokenizer=None, true_sequential=True, use_cuda_fp16=False),
    dict(bits=4, group_size=128, modules_to_not_convert=None, quant_method="awq", version="gemm", zero_point=True),
    compressed_config(128, global_compression_ratio=1.24, sparsity_config={}, transform_config={}, version="0.12.2"),
]


@pytest.mark.parametrize("quantization", WRITTEN, ids=lambda each: each["quant_method"])
def test_settings_that_writers_write_are_accepted(quantization: dict[str, Any], tmp_path: Path) -> None:
    method = CODED_METHODS[quantization["quant_method"]]
    settings = check_settings(tmp_path, quantization, method)
    assert settings and all(quantization[key] == value or key == "config_groups" for key, value in settings.items())


GOOD, WIDE = random_integers(SHAPE), random_integers((8, 66 * 32))
BY_GROUP = compressed_config()
BY_GROUP["config_groups"]["group_0"]["weights"]["actorder"] = "group"
GPTQ_TENSORS, AWQ_TENSORS, PACKED = gptq(GOOD), awq(GOOD), compressed(GOOD)
DAMAGED = [
    (gptq_config(), GPTQ_TENSORS | {"qzeros": None}, r"missing qzeros: model.layers.\*.mlp.down_proj in layers 1"),
    (gptq_config(), GPTQ_TENSORS | {"qweight": None}, "missing qweight"),
    (gptq_config(), dict.fromkeys(GPTQ_TENSORS), r"no tensor is named \.qweight"),
    (gptq_config(), GPTQ_TENSORS | {"weight": GOOD.dense()}, "weight in 16 bits next to its codes"),
    (gptq_config(96), GPTQ_TENSORS, "group_size: found 96, expected a divisor of the 128 inputs"),
    (
        gptq_config(),
        GPTQ_TENSORS | {"scales": GOOD.scales, "qzeros": GPTQ_TENSORS["qzeros"][1:]},
        r"qzeros: found I32 \[3, 8\], expected I32 \[4, 8\]; scales: found F16 \[64, 4\], expected F16 or BF16 ",
    ),
    (gptq_config(), GPTQ_TENSORS | {"scales": GOOD.scales.T.astype(np.float32)}, "scales: found F32 .*expected F16 or"),
    (gptq_config(), GPTQ_TENSORS | {"qweight": GOOD.codes}, "qweight: found U8 .* expected a matrix of I32"),
    (gptq_config(), GPTQ_TENSORS | {"g_idx": np.full(128, 4, np.int32)}, "g_idx: found groups 4 to 4, expected 0 to 3"),
    (gptq_config(desc_act=True), gptq(GOOD, with_order=False), "missing g_idx, the group of each column with desc_act"),
    (BY_GROUP, PACKED, "missing weight_g_idx, the group of each column with actorder"),
    (awq_config(64), AWQ_TENSORS, r"qzeros: found I32 \[4, 8\], expected I32 \[2, 8\]; scales"),
    (compressed_config(64), PACKED, "group_size: found 32 by the shape of weight_scale, expected 64"),
    (compressed_config(symmetric=False), PACKED, "missing weight_zero_point"),
    (compressed_config(), PACKED | {"weight_shape": np.array([64, 120])}, r"weight_shape: found \[64, 120\], expected"),
    (
        compressed_config(),
        PACKED | {"weight_scale": GOOD.scales[:, :0]},
        "group_size: found 0, expected a divisor of the 128 inputs",
    ),
    (
        compressed_config(),
        compressed(WIDE) | {"weight_scale": WIDE.scales[:, :65]},
        r"weight_scale: found F16 \[8, 65\], expected F16 or BF16 \[8, 66\]",
    ),
]


@pytest.mark.parametrize(("quantization", "tensors", "problem"), DAMAGED)
def test_damaged_tensors_are_refused_together(
    quantization: dict[str, Any], tensors: dict[str, np.ndarray | None], problem: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=problem) as error:
        _one(tmp_path, {part: values for part, values in tensors.items() if values is not None}, quantization)
    assert str(tmp_path) in str(error.value)


def test_integers_that_belong_to_no_layer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"1 tensors have types .* such as model.layers.1.mlp.down_proj.steps"):
        _one(tmp_path, GPTQ_TENSORS | {"steps": np.zeros(3, np.int32)}, gptq_config())


def test_codes_without_a_quantization_config_are_refused_with_the_setting_that_describes_them(tmp_path: Path) -> None:
    """Old files of AutoGPTQ have it only in quantize_config.json."""
    write_folder(
        tmp_path, CONFIG, {f"{NAME}.{part}": np.ascontiguousarray(GPTQ_TENSORS[part]) for part in GPTQ_TENSORS}
    )
    with pytest.raises(ValueError, match=r"found 'I32'.* add quantization_config to config\.json: quant_method, and"):
        open_model(tmp_path)


def test_scales_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    form = Form(
        {}, lambda w: gptq(w._replace(scales=np.where(w.scales > 0, np.float16("nan"), w.scales))), gptq_config()
    )
    write_integer_folder(tmp_path, form, CONFIG, WEIGHTS)
    with pytest.raises(ValueError, match=r"scales of model.layers.0.mlp.down_proj.weight are not finite \(INT4_32\)"):
        _load(tmp_path)
