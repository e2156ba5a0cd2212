"""Folders that transformers + bitsandbytes saved in 4 bits: codes and constants are taken over as they are."""

import hashlib
import runpy
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from pallas_kernels.formats.layouts import repack
from qlora_jax.io.loader import load_model
from qlora_jax.io.source import open_model
from qlora_jax.models.adapt import linears
from qlora_jax.models.config import WeightFormat
from qlora_jax.models.families import model_config
from qlora_jax.quant import dequantize
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


def _digest(codes: Any) -> str:
    return hashlib.sha256(np.ascontiguousarray(codes).tobytes()).hexdigest()


def quantize_main(argv: list[str]) -> None:
    """The command; not imported, since the package's `quantize` is a function."""
    runpy.run_module("qlora_jax.quantize", run_name="quantize")["main"](argv)


@pytest.fixture(autouse=True)
def no_global_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command sets up its process; a test shares it."""
    monkeypatch.setattr("qlora_jax.runtime.start", lambda: None)


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
    with pytest.raises(ValueError, match=r"quant_type=fp4, asked for is nf4; double_quant=False, asked for is True"):
        _loaded(tmp_path / "whole")
    with pytest.raises(ValueError, match=r"2 of 14 linear layers are not quantized there, .*mlp.up_proj"):
        _loaded(tmp_path / "skipped", quant_type="fp4", double_quant=False)
    assert _loaded(tmp_path / "skipped", quant_type=None).model.config == model_config(config)


MADE_BY_US = {
    f"{quant_type}, {nested}": dict(quant_type=quant_type, double_quant=nested == "nested")
    for quant_type in ("nf4", "fp4")
    for nested in ("nested", "f32 constants")
}


def test_folders_that_we_quantize(tmp_path: Path, oracle, config) -> None:
    """Loaded by transformers: the same weights; read again by us: the same model; and back in 16 bits, to the bit."""
    files = {"tokenizer.json": tokenizer_json()}
    dense = write_folder(tmp_path / "dense", config, random_weights(config), **files)
    for name, settings in MADE_BY_US.items():
        kind = ["--quant-type", settings["quant_type"], *([] if settings["double_quant"] else ["--no-double-quant"])]
        quantize_main([str(dense), "--output", str(tmp_path / name), "--dtype", "float32", *kind])
        assert _loaded(tmp_path / name, **settings).fingerprint == _loaded(dense, **settings).fingerprint
    found = oracle(ORACLE, load={name: str(tmp_path / name) for name in MADE_BY_US})
    assert len(found) == len(MADE_BY_US) * 2 * 7 * config["num_hidden_layers"]
    for name in MADE_BY_US:
        tensors = open_model(tmp_path / name).tensors
        marker = f"{name}/weights/"
        for key in (key for key in found if key.startswith(marker)):
            expected = tensors[f"{key.removeprefix(marker)}.weight"].read()
            np.testing.assert_allclose(found[key], expected, rtol=2e-6, atol=1e-7, err_msg=key)
        again = ["--output", str(tmp_path / f"{name}, back"), "--quant-type", "none", "--dtype", "float32"]
        quantize_main([str(tmp_path / name), *again])
        back = open_model(tmp_path / f"{name}, back")
        assert "quantization_config" not in back.config and back.tensors.keys() == tensors.keys()
        for tensor, entry in back.tensors.items():
            np.testing.assert_array_equal(entry.read(), tensors[tensor].read(), err_msg=tensor)
