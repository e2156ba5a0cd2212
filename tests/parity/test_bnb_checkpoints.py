"""Folders that transformers + bitsandbytes saved in 4 bits: codes and constants are read unchanged."""

import hashlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.formats.layouts import repack
from qlora_jax import quantize
from qlora_jax.config import LoraArgs
from qlora_jax.io.loading.loader import load_model
from qlora_jax.io.open_model import open_model
from qlora_jax.methods.attach import attach_method
from qlora_jax.methods.method import linears
from qlora_jax.models.config import WeightFormat
from qlora_jax.models.families import model_config
from qlora_jax.models.partition import combine, partition
from qlora_jax.models.precision import keep_in_16_bits
from qlora_jax.nn.frozen_weight import MixedStack
from qlora_jax.quant import dequantize
from tests.io.gguf_families import FAMILIES, random_tensors
from tests.io.tiny_models import random_weights, tiny_config, tokenizer_json, write_folder

pytestmark = pytest.mark.slow
ORACLE = Path(__file__).parent.parent / "oracle/bnb_checkpoints.py"
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nf4": (dict(bnb_4bit_quant_type="nf4"), dict(double_quant=False)),
    "nf4, nested": (dict(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True), {}),
    "fp4, nested, in bf16": (
        dict(bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True, bnb_4bit_quant_storage="bfloat16"),
        dict(quant_type="fp4"),
    ),
    "nf4, in f32": (
        dict(bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage="float32"),
        dict(double_quant=False),
    ),
}


def _loaded(folder: Path, **settings: Any):
    source = open_model(folder)
    return load_model(source, model_config(source.config), WeightFormat(dtype="float32", **settings))


TOKENS = np.random.default_rng(1).integers(0, tiny_config()["vocab_size"], (2, 9)).astype(np.int32)


def assert_close_logits(model: Any, expected: np.ndarray) -> None:
    """Asserts that the logits of TOKENS agree to 1e-4 of the largest."""
    logits = jax.jit(lambda: model.head.logits(model.hidden(jnp.asarray(TOKENS))))()
    np.testing.assert_allclose(np.asarray(logits).reshape(expected.shape), expected, atol=1e-4 * np.abs(expected).max())


def _digest(codes: Any) -> str:
    return hashlib.sha256(np.ascontiguousarray(codes).tobytes()).hexdigest()


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return tiny_config()


def test_folders_that_transformers_saved(tmp_path: Path, oracle, config) -> None:
    dense = write_folder(tmp_path / "dense", config, random_weights(config))
    wanted = {name: [str(dense), str(tmp_path / name), settings] for name, (settings, _) in CASES.items()}
    expected = oracle(ORACLE, quantize=wanted)
    for name, (_, ours) in CASES.items():
        loaded = _loaded(tmp_path / name, **ours)
        for linear_name, linear in linears(loaded.model):
            stack = linear.weight.get_value()
            for layer in range(config["num_hidden_layers"]):
                one = repack(jax.tree.map(lambda leaf, layer=layer: leaf[layer], stack), "bnb")
                module = linear_name.replace(".layers.", f".layers.{layer}.")
                assert _digest(one.codes) == _digest(expected[f"{name}/codes/{module}"]), (name, module)
                weights = np.asarray(dequantize(one, np.float32))
                np.testing.assert_allclose(weights, expected[f"{name}/weights/{module}"], rtol=2e-6, atol=1e-7)
        # Quantizing the 16-bit weights ourselves gives the same model, to the bit.
        if name == "nf4":
            assert loaded.fingerprint == _loaded(dense, **ours).fingerprint


def test_what_the_files_hold_has_to_be_asked_for(tmp_path: Path, oracle, config) -> None:
    dense = write_folder(tmp_path / "dense", config, random_weights(config))
    settings = dict(bnb_4bit_quant_type="fp4", llm_int8_skip_modules=["lm_head", "up_proj"])
    skipped = {"whole": settings | dict(llm_int8_skip_modules=["lm_head"]), "skipped": settings}
    oracle(ORACLE, quantize={name: [str(dense), str(tmp_path / name), s] for name, s in skipped.items()})
    with pytest.raises(ValueError, match=r"quant_type=fp4, expected nf4; double_quant=False, expected True"):
        _loaded(tmp_path / "whole")
    assert _loaded(tmp_path / "skipped", quant_type=None).model.config == model_config(config)


def test_layers_that_were_left_in_16_bit_stay_so(tmp_path: Path, oracle) -> None:
    """One layer's module, a module of all layers: weights, logits and gradients are transformers'; and written back."""
    config = tiny_config(num_hidden_layers=3)
    dense = write_folder(tmp_path / "dense", config, random_weights(config))
    skip = ["lm_head", "model.layers.1.mlp.down_proj", "model.layers.2.mlp.down_proj", "v_proj"]
    settings = dict(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, llm_int8_skip_modules=skip)
    plain = settings | dict(bnb_4bit_use_double_quant=False)
    kinds = {"mixed": settings, "plain": plain}
    found = oracle(ORACLE, quantize={name: [str(dense), str(tmp_path / name), one] for name, one in kinds.items()})
    (tmp_path / "mixed/tokenizer.json").write_text(tokenizer_json())
    loaded = _loaded(tmp_path / "mixed")
    layers = loaded.model.model.layers
    assert isinstance(layers.self_attn.v_proj.weight.get_value(), jax.Array)
    down = layers.mlp.down_proj.weight.get_value()
    assert isinstance(down, MixedStack) and down.layers[-1] == (1, 2)
    # `model.keep_16bit` makes the same base from the 16-bit model, to the bit.
    source, features = open_model(dense), loaded.model.config
    kept = keep_in_16_bits(WeightFormat(dtype="float32", double_quant=False), skip[1:], features)
    stored = _loaded(tmp_path / "plain", double_quant=False)
    assert load_model(source, features, kept).fingerprint == stored.fingerprint
    assert _loaded(dense, double_quant=False).fingerprint != stored.fingerprint
    tensors = open_model(tmp_path / "mixed").tensors
    assert _digest(repack(down.parts[0].layer(0), "bnb").codes) == _digest(
        found["mixed/codes/model.layers.0.mlp.down_proj"]
    )
    for place, layer in enumerate(down.layers[-1]):
        expected = tensors[f"model.layers.{layer}.mlp.down_proj.weight"].read()
        np.testing.assert_array_equal(down.parts[1][place], expected)

    _check_against_dense(tmp_path)
    again = ["--output", str(tmp_path / "again"), "--quant_type", "nf4", "--dtype", "float32"]
    quantize.main(["--model", str(tmp_path / "mixed"), *again])
    assert _loaded(tmp_path / "again").fingerprint == loaded.fingerprint
    (dense / "tokenizer.json").write_text(tokenizer_json())
    keep = ["--double_quant", "false", "--dtype", "float32", "--keep_16bit", f"[{', '.join(skip[1:])}]"]
    quantize.main(["--model", str(dense), "--output", str(tmp_path / "kept"), *keep])
    assert _loaded(tmp_path / "kept", double_quant=False).fingerprint == stored.fingerprint
    theirs = oracle(ORACLE, load={name: str(tmp_path / name) for name in ("mixed", "again")}, tokens=TOKENS)
    assert_close_logits(_loaded(tmp_path / "mixed").model, theirs["mixed/logits"])
    names = {key.partition("/")[2] for key in theirs}
    assert len(names) == 1 + 2 * (7 * 3 - 5)
    for name in names:
        np.testing.assert_array_equal(theirs[f"again/{name}"], theirs[f"mixed/{name}"], err_msg=name)


def _check_against_dense(tmp_path: Path) -> None:
    """The mixed model computes what the same model with every weight dense does."""
    dense = ["--output", str(tmp_path / "16 bit"), "--quant_type", "none", "--dtype", "float32"]
    quantize.main(["--model", str(tmp_path / "mixed"), *dense])
    for remat in ("none", "full"):
        mixed, plain = (
            _loss_and_gradients(_loaded(tmp_path / name, **how).model, remat)
            for name, how in (("mixed", {}), ("16 bit", dict(quant_type=None)))
        )
        for a, b in zip(jax.tree.leaves(mixed), jax.tree.leaves(plain), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6)


@pytest.mark.exhaustive
def test_mixtures_of_experts(tmp_path: Path, oracle) -> None:
    """bitsandbytes leaves experts in 16 bits without a word; here they are quantized, as from the 16-bit files."""
    dense = {}
    for name in ("glm4moe", "qwen2moe"):
        config = FAMILIES[name][1]
        files = {"tokenizer.json": tokenizer_json()}
        dense[name] = write_folder(tmp_path / f"{name}-model", config, random_tensors(config), **files)
        command = ["--quant_type", "nf4", "--dtype", "float32", "--output", str(tmp_path / name)]
        quantize.main(["--model", str(dense[name]), *command])
        assert _loaded(tmp_path / name).fingerprint == _loaded(dense[name]).fingerprint
    theirs = [str(dense["glm4moe"]), str(tmp_path / "theirs"), dict(bnb_4bit_quant_type="nf4")]
    oracle(ORACLE, quantize={"theirs": theirs})
    ours = _loaded(dense["glm4moe"], double_quant=False)
    assert _loaded(tmp_path / "theirs", double_quant=False).fingerprint == ours.fingerprint
    found = oracle(ORACLE, load={name: str(tmp_path / name) for name in dense}, tokens=TOKENS)
    quantized = {name.rpartition(".mlp.")[2] for name in found if name.startswith("qwen2moe/codes")}
    assert {"shared_expert.up_proj", "shared_expert.down_proj", "shared_expert.gate_proj"} < quantized
    assert not any(name.endswith(("shared_expert_gate", "gate_up_proj")) for name in quantized)


def _loss_and_gradients(model, remat: str):
    attach_method(model, LoraArgs(rank=2), jax.random.key(0))
    parts = partition(model)
    lora = jax.tree.map(lambda leaf: leaf + 0.05, parts.lora)
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, model.config.vocab_size)

    @jax.jit
    @jax.value_and_grad
    def loss(lora):
        model = combine(parts.with_lora(lora))
        hidden = model.hidden(tokens, remat=remat)
        return jnp.sum(jnp.sin(model.head.logits(hidden)))

    return loss(lora)


MADE_BY_US = {
    f"{quant_type}, {nested}": dict(quant_type=quant_type, double_quant=nested == "nested")
    for quant_type in ("nf4", "fp4")
    for nested in ("nested", "f32 constants")
}


def test_folders_that_we_quantize(tmp_path: Path, oracle, config) -> None:
    """transformers and we read back the same model; written back in 16 bits, it is bit-identical."""
    files = {"tokenizer.json": tokenizer_json()}
    dense = write_folder(tmp_path / "dense", config, random_weights(config), **files)
    for name, settings in MADE_BY_US.items():
        kind = [
            "--quant_type",
            settings["quant_type"],
            *([] if settings["double_quant"] else ["--double_quant", "false"]),
        ]
        quantize.main(["--model", str(dense), "--output", str(tmp_path / name), "--dtype", "float32", *kind])
        assert _loaded(tmp_path / name, **settings).fingerprint == _loaded(dense, **settings).fingerprint
    found = oracle(ORACLE, load={name: str(tmp_path / name) for name in MADE_BY_US}, tokens=TOKENS)
    assert len(found) == len(MADE_BY_US) * (1 + 2 * 7 * config["num_hidden_layers"])
    for name, settings in MADE_BY_US.items():
        assert_close_logits(_loaded(tmp_path / name, **settings).model, found[f"{name}/logits"])
        tensors = open_model(tmp_path / name).tensors
        marker = f"{name}/weights/"
        for key in (key for key in found if key.startswith(marker)):
            expected = tensors[f"{key.removeprefix(marker)}.weight"].read()
            np.testing.assert_allclose(found[key], expected, rtol=2e-6, atol=1e-7, err_msg=key)
        again = ["--output", str(tmp_path / f"{name}, back"), "--quant_type", "none", "--dtype", "float32"]
        quantize.main(["--model", str(tmp_path / name), *again])
        back = open_model(tmp_path / f"{name}, back")
        assert "quantization_config" not in back.config and back.tensors.keys() == tensors.keys()
        for tensor, entry in back.tensors.items():
            np.testing.assert_array_equal(entry.read(), tensors[tensor].read(), err_msg=tensor)
