"""Folders in codes of GPTQ, AWQ, compressed-tensors and others: logits and gradients, and a whole run."""

import io
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from rich.console import Console

from pallas_kernels.formats.ggml_tensor import GgmlTensor
from qlora_jax import evaluate, export, generate
from qlora_jax.config import Config, LoraArgs
from qlora_jax.io.loading.loader import load_model
from qlora_jax.io.open_model import open_model
from qlora_jax.io.pretrained import apply_adapter, load_base, open_pretrained
from qlora_jax.methods.attach import attach_method
from qlora_jax.models.config import STORED, WeightFormat
from qlora_jax.models.families import model_config
from qlora_jax.models.partition import combine, partition
from qlora_jax.models.tensor_names import layer_name
from qlora_jax.training.run import train
from tests.e2e.project import TEMPLATE, project, stop_after
from tests.io.float_folders import FLOAT_FORMS
from tests.io.integer_folders import FORMS, write_integer_folder
from tests.io.tiny_models import random_weights, tiny_config, write_folder
from tests.io.tiny_tokenizers import byte_level
from tests.marks import some_in_ci
from tests.parity.test_llama_cpp import NAMED, VOCABULARY
from tests.parity.test_peft import SCRIPT as PEFT
from tests.parity.test_peft import _logits as row_logits

ORACLES = Path(__file__).parent.parent / "oracle"
TOLERANCE = 1e-5  # relative to the largest value
CONFIG = tiny_config(attention_bias=True)
ALL = FORMS | FLOAT_FORMS
TOKENS = np.random.default_rng(0).integers(3, 32, (2, 19)).astype(np.int32)
COTANGENT = np.random.default_rng(1).normal(size=(2, 19, 32)).astype(np.float32)


def _stored(folder: Path) -> Any:
    """Returns the model on the codes of a folder."""
    model = _loaded(folder, STORED)
    assert isinstance(model.model.layers.self_attn.v_proj.weight.get_value(), GgmlTensor)
    return model


def _loaded(folder: Path, quant_type: str | None) -> Any:
    source = open_model(folder)
    return load_model(source, model_config(source.config), WeightFormat(quant_type=quant_type, dtype="float32")).model


def _logits_and_gradients(model: Any) -> tuple[Any, np.ndarray, Any]:
    """Returns the adapters, the logits of TOKENS, and the gradient of sum(logits * COTANGENT) by the adapters."""
    attach_method(model, LoraArgs(rank=4, alpha=8.0), jax.random.key(0))
    parts = partition(model)

    @jax.jit
    def loss(lora):
        model = combine(parts.with_lora(lora))
        logits = model.head.logits(model.hidden(jnp.asarray(TOKENS))).reshape(COTANGENT.shape)
        return (logits * COTANGENT).sum(), logits

    (_, logits), gradients = jax.value_and_grad(loss, has_aux=True)(parts.lora)
    return parts.lora, np.asarray(logits), gradients


def _error(found: Any, expected: np.ndarray) -> float:
    return float(np.abs(np.asarray(found) - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("form", some_in_ci([(form,) for form in ALL], lambda index: index in (0, len(FORMS))))
def test_logits_and_gradients_are_those_of_the_dequantized_model(form: str, tmp_path: Path, oracle) -> None:
    """For y = x (W^T + s A B), the gradient by B is s A^T G^T, with G transformers' gradient by W.

    Codes may round like products of the dequantized weights in f32, whose own errors depend on the processor.
    """
    dense = write_integer_folder(tmp_path / "codes", ALL[form], CONFIG, random_weights(CONFIG))
    cases = {"dense": str(write_folder(tmp_path / "dense", CONFIG, dense))}
    expected = oracle(ORACLES / "whole_gradients.py", cases=cases, tokens=TOKENS, cotangent=COTANGENT)
    found, in_f32 = (
        _errors(_logits_and_gradients(model), expected)
        for model in (_stored(tmp_path / "codes"), _loaded(tmp_path / "dense", None))
    )
    assert found["logits"] < TOLERANCE
    wrong = {name: error for name, error in found.items() if error >= max(TOLERANCE, 2 * in_f32[name])}
    assert not wrong


def _errors(result: tuple[Any, np.ndarray, Any], expected: dict[str, np.ndarray]) -> dict[str, float]:
    """Returns the error of the logits, and of the gradient of each layer's B."""
    lora, logits, gradients = result
    errors = {"logits": _error(logits, expected["dense/logits"])}
    for name, leaves in lora.items():
        for layer in range(CONFIG["num_hidden_layers"]):
            by_weight = expected[f"dense/grad/{layer_name(name, layer)}.weight"]
            wanted = 2.0 * np.asarray(leaves["lora_a"][layer]).T @ by_weight.T
            errors[layer_name(name, layer)] = _error(gradients[name]["lora_b"][layer], wanted)
    return errors


@pytest.mark.slow
def test_transformers_reads_the_same_weights_of_compressed_tensors(tmp_path: Path, oracle) -> None:
    """Its own reader unpacks each of these folders to the weights that the tests packed, and that ours reads.

    It rounds NVFP4, and products with scales in bfloat16, to bfloat16.
    """
    rounded = ("compressed, 8 bits", "compressed, nvfp4", "compressed, fp8 of rows")
    forms = [form for form in ALL if form.startswith(("compressed", "deepseek")) and "partial" not in form]
    weights, dense = random_weights(CONFIG), {}
    for form in forms:
        dense |= {
            f"{form}/{name}": values
            for name, values in write_integer_folder(tmp_path / form, ALL[form], CONFIG, weights).items()
        }
    found = oracle(ORACLES / "compressed_tensors_weights.py", cases={form: str(tmp_path / form) for form in forms})
    assert found.keys() == dense.keys()
    for form in forms:
        for name, entry in open_model(tmp_path / form).tensors.items():
            expected = dense[f"{form}/{name}"]
            if form in rounded and name.endswith("_proj.weight"):
                expected = expected.astype(ml_dtypes.bfloat16).astype(np.float32)
            np.testing.assert_array_equal(found[f"{form}/{name}"], expected, err_msg=f"{form}, {name}")
            np.testing.assert_array_equal(entry.read(), dense[f"{form}/{name}"], err_msg=f"{form}, {name}")


def _project(folder: Path, form: str, **model: Any) -> tuple[Config, dict[str, np.ndarray]]:
    """Writes a model in integers; returns (settings of a run of 2 steps on its codes, the dense weights)."""
    config = project(
        folder,
        model=dict(quant_type="stored") | model,
        lora=dict(dropout=0.0),
        train=dict(steps=2, save_every=1, eval_every=0),
        data=dict(eval_fraction=0.0, buckets=1),
    )
    path, sizes = Path(config.model.path), tiny_config(vocab_size=VOCABULARY, max_position_embeddings=256)
    template = TEMPLATE.replace("<s>", "<|im_start|>").replace("</s>", "<|im_end|>")
    tokenizer_config = json.dumps(json.loads(NAMED) | {"chat_template": template})
    files = {"tokenizer.json": byte_level(), "tokenizer_config.json": tokenizer_config}
    return config, write_integer_folder(path, FORMS[form], sizes, random_weights(sizes), **files)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_run_on_the_codes_is_resumed_evaluated_and_exported(tmp_path: Path, oracle) -> None:
    config, dense = _project(tmp_path, "gptq")
    run, printed = Path(config.output), io.StringIO()
    settings: dict[str, Any] = dict(oversized=False, console=Console(file=printed, width=400))
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, config, 1)
        assert not train(config, run, resume=False, **settings).finished
    assert "the codes of the file: GPTQ, 14 layers in INT4_32; " in printed.getvalue()
    assert train(config, run, resume=True, **settings).finished

    generate.main(["--run", str(run), "--prompt", "say sun", "--max_new_tokens", "4"])
    rows = ["--rows", config.data.train, "--max_rows", "4", "--columns", "[checkpoint,quantized]"]
    evaluate.main(["--run", str(run), *rows, "--json", str(tmp_path / "scores.json")])

    with pytest.raises(ValueError, match=r"has the codes of GPTQ, .* no GGUF file holds. Add --with_base"):
        export.main(["--run", str(run), "--format", "gguf-lora"])
    export.main(["--run", str(run), "--format", "gguf-lora", "--with_base"])
    export.main(["--run", str(run), "--format", "peft", "--with_base"])
    export.main(["--run", str(run), "--format", "hf", "--dtype", "bfloat16"])
    written = open_model(run / "peft/base").tensors
    for name, values in dense.items():
        np.testing.assert_array_equal(written[name].read(), values, err_msg=name)

    opened = open_pretrained(run=str(run))
    assert opened.run is not None
    model = combine(apply_adapter(load_base(opened, opened.args), opened.run))
    logits = row_logits(model, TOKENS)
    found = oracle(PEFT, cases={"run": [str(run / "peft/base"), str(run / "peft")]}, tokens=TOKENS)
    assert _error(logits, found["run/adapted"]) < 1e-5 < _error(found["run/base"], found["run/adapted"])
    merged = open_model(run / "hf")
    assert "quantization_config" not in merged.config and merged.coded_by == ""
    assert {entry.file_type for entry in merged.tensors.values()} == {"BF16"}


@pytest.mark.slow
@pytest.mark.exhaustive
def test_other_types_quantize_again_and_say_so(tmp_path: Path, capsys) -> None:
    config, _ = _project(tmp_path, "awq", quant_type="nf4")
    printed = io.StringIO()
    settings: dict[str, Any] = dict(oversized=False, console=Console(file=printed, width=400))
    assert train(config, Path(config.output), resume=False, **settings).finished
    again = "quantized again, from AWQ, 14 layers in INT4_32; "
    assert f"{again}model.quant_type=stored keeps these codes" in printed.getvalue()
    for quant_type, noted in (("nf4", True), ("stored", False)):
        base = ["--model", config.model.path, "--prompt", "say sun", "--max_new_tokens", "1"]
        generate.main([*base, "--quant_type", quant_type])
        assert (f"note: {again}--quant_type stored" in " ".join(capsys.readouterr().err.split())) == noted
