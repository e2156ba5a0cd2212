"""GGUF files read here equal the same files read by transformers."""

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from qlora_jax.io.open_model import open_model
from tests.io.gguf_families import FAMILIES, random_tensors, write_family
from tests.io.tiny_models import random_weights, tiny_config, write_gguf

SCRIPT = Path(__file__).parent.parent / "oracle/gguf_import.py"
IMPORTED = ("llama", "qwen2", "qwen3", "phi3", "gemma2", "gemma3")
CONFIG_KEYS = [
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "max_position_embeddings", "rms_norm_eps", "vocab_size", "tie_word_embeddings",
]  # fmt: skip


def _assert_equal(path: Path, oracle) -> int:
    source = open_model(path)
    expected = oracle(SCRIPT, folder=str(path.parent), file=path.name, config_keys=CONFIG_KEYS)
    config = {key: expected.pop(f"config/{key}") for key in CONFIG_KEYS}
    assert source.config["rms_norm_eps"] == pytest.approx(config.pop("rms_norm_eps"), rel=1e-6)
    assert {key: source.config[key] for key in config} == config
    assert source.tensors.keys() == expected.keys()
    for name, entry in source.tensors.items():
        np.testing.assert_array_equal(entry.read(), expected[name], err_msg=name)
    return len(expected)


@pytest.mark.parametrize("tied", [False, True])
def test_tiny_model(tmp_path: Path, oracle, tied: bool) -> None:
    config = tiny_config(tie_word_embeddings=tied)
    _assert_equal(write_gguf(tmp_path / "tiny.gguf", config, random_weights(config), Kind.Q5_1), oracle)


@pytest.mark.slow
def test_families_that_transformers_imports(tmp_path: Path, oracle) -> None:
    """Each file as it is written for tests/io/gguf/test_families.py."""
    for name in IMPORTED:
        architecture, config = FAMILIES[name]
        write_family(tmp_path / f"{name}.gguf", architecture, config, random_tensors(config))
    files = {name: f"{name}.gguf" for name in IMPORTED}
    expected = oracle(SCRIPT.with_name("gguf_import_several.py"), folder=str(tmp_path), files=files)
    for name in IMPORTED:
        tensors = open_model(tmp_path / f"{name}.gguf").tensors
        assert {key for key in expected if key.startswith(f"{name}/")} == {f"{name}/{tensor}" for tensor in tensors}
        for tensor, entry in tensors.items():
            np.testing.assert_array_equal(entry.read(), expected[f"{name}/{tensor}"], err_msg=f"{name}, {tensor}")


@pytest.mark.slow
def test_smollm2(smollm2_gguf: Path, oracle) -> None:
    assert _assert_equal(smollm2_gguf, oracle) == 272
