"""gpt-oss against transformers, in f32: logits, loss, gradients of every adapter, and decoding.

Files of MXFP4 are used as they are, so forward and backward passes read their codes.
"""

import re
from pathlib import Path

import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from pallas_kernels.formats.ggml_tensor import GgmlTensor
from qlora_jax.config import LoraArgs
from qlora_jax.export import main
from qlora_jax.io.export.gguf_metadata import export_spec
from qlora_jax.io.gguf import writer
from qlora_jax.io.loading.loader import load_model
from qlora_jax.io.open_model import open_model
from qlora_jax.io.pretrained import open_pretrained
from qlora_jax.models.config import WeightFormat
from qlora_jax.models.families import model_config
from qlora_jax.models.tensor_names import layer_name
from tests.io.gguf_families import FAMILIES, random_tensors
from tests.io.tiny_models import write_folder
from tests.io.tiny_tokenizers import byte_level
from tests.marks import some_in_ci
from tests.parity.test_families_transformers import (
    CUT,
    LENGTH,
    PADDING,
    SCALING,
    SIZES,
    VOCAB,
    adapted,
    errors_of_adapter,
    loss_and_gradients,
)
from tests.parity.test_families_transformers import _decoded as decoded
from tests.parity.test_families_transformers import _error as error
from tests.parity.test_families_transformers import _logits as logits
from tests.parity.test_families_transformers import _rows as rows
from tests.parity.test_llama_cpp import NAMED, TOKENS, VOCABULARY
from tests.parity.test_llama_cpp import SCRIPT as LLAMA_CPP
from tests.parity.test_llama_cpp import _case as case
from tests.parity.test_peft import _logits as row_logits
from tests.parity.test_peft import _write_run as write_run

ORACLE = Path(__file__).parent.parent / "oracle/gpt_oss_logits.py"
TOLERANCE = 1e-4
CONFIG = SIZES | dict(
    model_type="gpt_oss",
    num_hidden_layers=2,
    num_key_value_heads=2,
    head_dim=24,
    intermediate_size=96,
    num_local_experts=5,
    num_experts_per_tok=3,
    sliding_window=9,
    swiglu_alpha=1.3,
    swiglu_limit=0.2,
)
YARN = dict(factor=4.0, beta_fast=8.0, beta_slow=1.0, truncate=False, original_max_position_embeddings=16)
CONFIGS = {
    "mxfp4": CONFIG | dict(rope_parameters=YARN | dict(rope_type="yarn", rope_theta=5000.0)),
    "f32": CONFIG | dict(attention_bias=False, layer_types=["full_attention", "sliding_attention"]),
}
EXPERTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
ADAPTERS = LoraArgs(
    rank=4, alpha=4 * SCALING, target_parameters=[*(f"mlp.experts.{name}" for name in EXPERTS), "mlp.router"]
)


def _loaded(path: Path, quant_type: str | None):
    """Returns the model; with `stored`, experts are in the codes of the file."""
    source = open_model(path)
    model = load_model(source, model_config(source.config), WeightFormat(quant_type=quant_type, dtype="float32")).model
    experts = model.model.layers.mlp.experts
    weights = [linear.weight.get_value() for linear in (experts.gate_proj, experts.up_proj, experts.down_proj)]
    assert all(isinstance(weight, GgmlTensor) == (quant_type == "stored") for weight in weights)
    return model


def _by_weight(name: str, layer: int, expected: dict[str, np.ndarray], config) -> np.ndarray:
    """Returns the oracle's gradient by W^T [K, N], or [E, K, N] of all experts, with gate before up."""
    theirs = config.hugging_face_name(layer_name(name, layer))
    if ".experts." not in name:
        return expected.pop(f"{theirs}.weight").T
    gradient = expected.pop(theirs)
    return gradient if name.endswith("down_proj") else np.concatenate([gradient[..., ::2], gradient[..., 1::2]], axis=2)


def _gradient_errors(config, lora, gradients, expected: dict[str, np.ndarray]) -> list[float]:
    errors = []
    for name, leaves in lora.items():
        for layer in range(config.num_layers):
            one, found = (jax.tree.map(lambda leaf, at=layer: leaf[at], each) for each in (leaves, gradients[name]))
            errors += errors_of_adapter(one, found, _by_weight(name, layer, expected, config))
    assert not [name for name in expected if "bias" not in name], f"weights without an adapter: {sorted(expected)}"
    return errors


def _check_codes(folder: Path, dequantized: dict[str, np.ndarray]) -> None:
    """The codes of each expert are those of the file: they dequantize to transformers' weights to the bit."""
    tensors = open_model(folder).tensors
    for name, of_experts in dequantized.items():
        module, part = name.rsplit(".", 1)
        for expert, weight_KN in enumerate(of_experts):
            for place, own in enumerate(EXPERTS[part]):
                entry = tensors[f"{module}.{expert}.{own}.weight"]
                wanted = weight_KN.T[place :: len(EXPERTS[part])]
                np.testing.assert_array_equal(entry.read(), wanted, err_msg=entry.name)
                assert entry.read_stored is not None
                codes = entry.read_stored(3, 9).codes
                np.testing.assert_array_equal(codes, entry.read_stored(0, entry.rows).codes[3:9])


@pytest.mark.slow
@pytest.mark.parametrize("name", some_in_ci([("mxfp4",), ("f32",)], lambda i: i == 0))
def test_gpt_oss(oracle, tmp_path, name):
    tokens = np.random.default_rng(0).integers(3, VOCAB, (2, LENGTH)).astype(np.int32)
    settings = {
        "configs": {name: CONFIGS[name]},
        "mxfp4": ["mxfp4"],
        "folder": str(tmp_path),
        "padding": PADDING,
        "cut": CUT,
    }
    expected, errors = oracle(ORACLE, **settings, tokens=tokens), {}
    wanted = {key.removeprefix(f"{name}/"): values for key, values in expected.items()}
    _check_codes(tmp_path / name, {k.removeprefix("dequantized/"): v for k, v in wanted.items() if "dequant" in k})
    model = _loaded(tmp_path / name, "stored" if name == "mxfp4" else None)
    right, left, packed = logits(model, *rows(tokens))
    errors["right"] = error(right, wanted["right"])
    errors["left"] = error(left[PADDING:], wanted["left"])
    errors["packed"] = error(packed, wanted["packed"])
    errors["decoded"] = error(decoded(model, tokens[:1])[0], wanted["right"])
    parts = adapted(model, ADAPTERS)
    assert parts.lora["model.layers.mlp.experts.down_proj"]["lora_b"].any() == (name == "f32")
    nll, gradients = loss_and_gradients(parts, tokens)
    errors["loss"] = error(nll, wanted["nll"])
    of_weights = {k.removeprefix("gradient/"): v for k, v in wanted.items() if k.startswith("gradient/")}
    errors["gradients"] = max(_gradient_errors(model.config, parts.lora, gradients, of_weights))
    assert max(errors.values()) < TOLERANCE, {name: error for name, error in errors.items() if error >= TOLERANCE}


def _gguf_in_mxfp4(folder: Path, path: Path, monkeypatch) -> Path:
    """Writes a random model as a GGUF file whose experts have MXFP4, as in published files."""
    config = FAMILIES["gptoss"][1] | {"vocab_size": VOCABULARY}
    tensors = random_tensors(config)
    files = {"tokenizer.json": byte_level(), "tokenizer_config.json": NAMED}
    opened = open_pretrained(model=str(write_folder(folder, config, tensors, **files)))

    def kind(tensor, wanted):
        return Kind.MXFP4 if re.search(r"_exps\.\d+\.weight", tensor.name) else Kind.F32

    monkeypatch.setattr(writer, "_kind", kind)
    writer.write_gguf(path, export_spec(opened).spec, list(tensors), iter(tensors.values()), "float32")
    monkeypatch.undo()
    return path


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_gguf_file_in_mxfp4_and_a_lora_on_it(tmp_path, llama_cpp, monkeypatch):
    """llama.cpp computes our logits from the same file, within its rounding of activations to 8 bits."""
    path = _gguf_in_mxfp4(tmp_path / "model", tmp_path / "base.gguf", monkeypatch)
    parameters = [f"mlp.experts.{name}" for name in EXPERTS]
    args = LoraArgs(rank=4, alpha=8.0, target_modules=["q_proj"], target_parameters=parameters)
    adapted, base = write_run(tmp_path / "run", path, args, quant_type="stored")
    assert isinstance(base.model.layers.mlp.experts.up_proj.weight.get_value(), GgmlTensor)
    main(["--run", str(tmp_path / "run"), "--format", "gguf-lora"])
    cases = {
        "adapted": case(path, tmp_path / "run/gguf-lora/adapter.gguf", rows=TOKENS.tolist()),
        "base": case(path, rows=TOKENS.tolist()),
    }
    found = llama_cpp(LLAMA_CPP, cases=cases, new_tokens=0)
    ours = {"adapted": row_logits(adapted, TOKENS), "base": row_logits(base, TOKENS)}
    for name, expected in ours.items():
        assert error(found[f"{name}/logits"], expected) < 2e-2, name
    assert error(ours["adapted"], ours["base"]) > 0.1
