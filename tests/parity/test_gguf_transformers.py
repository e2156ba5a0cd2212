"""GGUF files read here equal the same files read by transformers."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from qlora_jax.data.tokenizer.gguf_tokenizer import SPACE
from qlora_jax.data.tokenizer.tokenizer import load_tokenizer
from qlora_jax.io.export.gguf_metadata import export_spec
from qlora_jax.io.gguf.header import parse_header
from qlora_jax.io.gguf.writer import write_gguf as write_exported
from qlora_jax.io.open_model import open_model
from qlora_jax.io.pretrained import load_base, open_pretrained, weight_settings
from tests.data.tokenizer.hard_texts import hard_texts
from tests.io.gguf_families import FAMILIES, random_tensors, write_family
from tests.io.tiny_models import random_weights, tiny_config, write_folder, write_gguf
from tests.io.tiny_tokenizers import gemma

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


CODE = """def mean(values):
    total = 0
    for value in values:
        if value is not None:
            total += value
    return total / len(values)

def variance(values):
    average = mean(values)
    return mean([(value - average) ** 2 for value in values])
"""


@pytest.mark.slow
def test_gemmas_form_of_vocabulary(tmp_path: Path, oracle) -> None:
    """User-defined runs of spaces are spelt with spaces in the file, and are one token each."""
    texts = [text for _, text in hard_texts(600) if SPACE not in text and "<" not in text]
    size = load_tokenizer({"tokenizer_json": gemma()}).vocab_size
    # transformers takes its defaults for what a file does not say: the head's size, and the bases of rotation.
    given = {"head_dim": 256, "query_pre_attn_scalar": 256, "rope_theta": 1e6, "rope_scaling": None}
    config = FAMILIES["gemma3"][1] | {"vocab_size": size, **given}
    named = json.dumps({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})
    files = {"tokenizer.json": gemma(), "tokenizer_config.json": named}
    tensors = random_tensors(config)
    opened = open_pretrained(model=str(write_folder(tmp_path / "model", config, tensors, **files)))
    path = tmp_path / "tiny.gguf"
    write_exported(path, export_spec(opened).spec, list(tensors), iter(tensors.values()), "float32")
    assert {" " * count for count in range(2, 32)} < set(parse_header(path).metadata["tokenizer.ggml.tokens"])
    _assert_same_ids_and_logits(path, texts, oracle)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_gemma3(gemma3_gguf: Path, oracle) -> None:
    texts = [text for _, text in hard_texts(2000) if SPACE not in text]
    row, logits = _assert_same_ids_and_logits(gemma3_gguf, texts, oracle)
    log_p = np.array(jax.nn.log_softmax(logits))[np.arange(len(row) - 1), row[1:]]
    assert np.exp(-log_p.mean()) == pytest.approx(3.2505, abs=1e-3)  # 60.5 with ids of two tokens per run of spaces


def _assert_same_ids_and_logits(path: Path, texts: list[str], oracle) -> tuple[list[int], np.ndarray]:
    """Asserts that texts have transformers' ids, and that the logits of CODE differ by 1e-5 of the largest at most.

    Returns:
      (ids of CODE after bos, their logits).
    """
    opened = open_pretrained(model=str(path))
    bos = opened.tokenizer.bos_id
    assert bos is not None
    row = [bos, *opened.tokenizer.encode(CODE)]
    found = oracle(SCRIPT.with_name("gguf_texts.py"), path=str(path), texts=texts, row=row)
    assert opened.tokenizer.encode_batch(texts) == json.loads(str(found["ids"]))
    model = load_base(opened, weight_settings(opened, "none", "float32"))
    logits = np.asarray(model.head.logits(model.hidden(jnp.array([row]))))
    assert np.abs(logits - found["logits"]).max() < 1e-5 * np.abs(found["logits"]).max()
    return row, logits
