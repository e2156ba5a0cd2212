"""Mean squares of linear layers' inputs, against transformers and against the norm of the first layer in NumPy."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qlora_jax.evaluation import batches
from qlora_jax.evaluation.importance_matrix import mean_squares
from qlora_jax.io.gguf.header import parse_header
from qlora_jax.io.gguf.llama_quantizer import quantize_file
from qlora_jax.io.gguf.reader import stored_names
from qlora_jax.io.loading.loader import load_model
from qlora_jax.io.open_model import open_model
from qlora_jax.models.config import WeightFormat
from qlora_jax.models.families import model_config
from qlora_jax.models.partition import ModelParts, partition
from tests.io.export.test_gguf_metadata import CONFIGS
from tests.io.gguf_families import random_tensors
from tests.io.tiny_models import TOKENS, tokenizer_json, write_folder
from tests.parity.test_llama_cpp import _folder, _gguf_of

SCRIPT = Path(__file__).parent.parent / "oracle/linear_inputs.py"
LENGTHS = (3, 40, 17, 100, 100, 38, 1)
NAMES = ["llama", "phi3", "glm4moe"]  # fused layers; one dense layer before layers with shared experts
ROUTER = "mlp.gate.weight"  # not a Linear in transformers


def _parts(folder: Path) -> ModelParts:
    source = open_model(folder)
    weights = WeightFormat(quant_type=None, dtype="float32")
    return partition(load_model(source, model_config(source.config), weights).model)


def _rows() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, len(TOKENS), length).astype(np.int32) for length in LENGTHS]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, made = tmp_path_factory.mktemp("models"), {}
    for name in NAMES:
        config = CONFIGS[name][1]
        files: dict[str, Any] = {"tokenizer.json": tokenizer_json()}
        made[name] = write_folder(root / name, config, random_tensors(config), **files)
    return made


def test_the_first_layers_are_the_normalized_embeddings(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text is in several batches with padding, and the means are over its tokens alone."""
    monkeypatch.setattr(batches, "BATCH_TOKENS", 128)
    assert len(batches.batches_by_length(LENGTHS)) > 2
    tensors, rows, done = random_tensors(CONFIGS["llama"][1]), _rows(), []
    found = mean_squares(_parts(folders["llama"]), rows, done.append)
    x_MD = tensors["model.embed_tokens.weight"].astype(np.float64)[np.concatenate(rows)]
    x_MD /= np.sqrt(np.mean(np.square(x_MD), axis=1, keepdims=True) + 1e-5)
    expected_D = np.mean(np.square(x_MD * tensors["model.layers.0.input_layernorm.weight"]), axis=0)
    for name in ("q", "k", "v"):
        np.testing.assert_allclose(found[f"model.layers.0.self_attn.{name}_proj.weight"], expected_D, rtol=1e-5)
    assert done[-1] == len(rows) and all(values.dtype == np.float32 for values in found.values())


@pytest.mark.slow
def test_they_are_those_of_transformers(folders: dict[str, Path], oracle) -> None:
    rows = _rows()
    texts = {name: str(folder) for name, folder in folders.items()}
    theirs = oracle(SCRIPT, folders=texts, rows=[row.tolist() for row in rows])
    for name, folder in folders.items():
        ours = {key: values for key, values in mean_squares(_parts(folder), rows).items() if not key.endswith(ROUTER)}
        expected = {key.partition("/")[2]: values for key, values in theirs.items() if key.startswith(f"{name}/")}
        head = {"lm_head.weight", "embed_out.weight"}
        assert ours.keys() == expected.keys() - head, name
        for key, values in ours.items():
            np.testing.assert_allclose(values, expected[key], rtol=1e-3, atol=1e-5 * expected[key].max(), err_msg=key)


@pytest.mark.slow
def test_llama_cpp_takes_them_for_every_linear(tmp_path: Path, quantizer: None) -> None:
    """The names are those of matrices in the file, whose rows have as many columns; only tables and experts lack them.

    The text half of a model of images and text has other names in its folder than in its file.
    """
    for name in ("phi3", "glm4moe", "glm4v"):
        path = _gguf_of(_folder(tmp_path, name), tmp_path / f"{name}.gguf")
        names = stored_names(path)
        found = {names[key]: values for key, values in mean_squares(_parts(path), _rows()).items()}
        infos = {info.name: info for info in parse_header(path).tensors if len(info.shape) > 1}
        assert {key: values.shape for key, values in found.items()} == {
            key: info.shape[-1:]
            for key, info in infos.items()
            if key not in ("token_embd.weight", "output.weight") and "_exps" not in key
        }, name
        quantize_file(path, tmp_path / "quantized.gguf", "iq4_nl", lambda *_: None, found)
