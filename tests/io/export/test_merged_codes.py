"""Exports of runs with `lora.merge_into`: the file has the codes that training computed with."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from pallas_kernels.formats.ggml_tensor import GgmlTensor
from qlora_jax.config import LoraArgs, ModelArgs
from qlora_jax.export import main
from qlora_jax.io.gguf.reader import RowTransform
from qlora_jax.io.hf.quantized_folder import FORMS
from qlora_jax.io.open_model import open_model
from qlora_jax.io.pretrained import load_base, open_pretrained, weight_settings
from qlora_jax.models.decoder import CausalLM
from tests.marks import first_always
from tests.parity.test_llama_cpp import _folder
from tests.parity.test_peft import _write_run

SIZES = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
TOKENS = np.random.default_rng(0).integers(0, 300, (2, 19)).astype(np.int32)
CASES = {
    "q4_0": dict(merge_into="q4_0"),
    "q8_0": dict(merge_into="q8_0", use_rslora=True),
    "some projections": dict(merge_into="q4_0", target_modules=["q_proj", "down_proj"]),
    "dora": dict(merge_into="q4_0", method="dora"),
    "ia3": dict(merge_into="q4_0", method="ia3"),
    "vera": dict(merge_into="q8_0", method="vera"),
    "nf4": dict(merge_into="nf4"),
    "oft": dict(merge_into="q4_0", method="oft"),
    "nvfp4": dict(merge_into="nvfp4"),
    "int4": dict(merge_into="int4"),
    "mxfp4": dict(merge_into="mxfp4"),
}


def logits(model: CausalLM) -> np.ndarray:
    return np.asarray(jax.jit(lambda model, tokens: model.head.logits(model.hidden(tokens)))(model, TOKENS))


@pytest.fixture(scope="module", params=first_always([*CASES]))
def run(request, tmp_path_factory) -> tuple[Path, CausalLM, LoraArgs]:
    """(the folder of a run, the model that it trained, its settings)."""
    folder, lora = tmp_path_factory.mktemp("run"), LoraArgs(**CASES[request.param])
    return folder / "run", _write_run(folder / "run", _folder(folder, "llama", **SIZES), lora)[0], lora


def export(run: Path, output: Path, *arguments: str) -> None:
    main(["--run", str(run), "--output", str(output), *arguments])


def test_the_exported_file_is_what_was_trained(run, tmp_path, capsys):
    folder, model, lora = run
    in_folder = lora.merge_into in FORMS
    export(folder, tmp_path / "out", "--format", "hf" if in_folder else "gguf")
    source = open_model(tmp_path / ("out" if in_folder else f"out/model-{lora.merge_into}.gguf"))
    linears = [entry.shape for name, entry in source.tensors.items() if name.endswith("_proj.weight")]
    table = [] if in_folder else [source.tensors["model.embed_tokens.weight"].shape]
    printed, weights = capsys.readouterr().out, sum(map(np.prod, linears + table))
    assert f"all codes of {weights:,} weights are those that training computed with" in printed
    opened = open_pretrained(model=str(source.path))
    quant_type = "nf4" if lora.merge_into == "nf4" else "stored"
    found = logits(load_base(opened, weight_settings(opened, quant_type, "float32")))
    np.testing.assert_allclose(found, logits(model), atol=1e-5 * np.abs(found).max())


def test_a_wrong_code_is_an_error(run, tmp_path, monkeypatch):
    """One code of each tensor is changed before it is written; the export names tensors and leaves nothing."""

    def one_changed(self, values):
        rows = np.array(values)
        if rows.dtype == np.uint8:
            rows[-1, 5] ^= 16
        return rows

    def parts(code, dtype):
        at = -1 if isinstance(code, GgmlTensor) else 5
        return form.values(dataclasses.replace(code, codes=code.codes.at[-1, at].add(16)), dtype)

    form = FORMS.get(run[2].merge_into)
    if in_folder := form is not None:  # the codes that are written have changes, those that they are compared with none
        monkeypatch.setitem(FORMS, run[2].merge_into, form._replace(values=parts))
    monkeypatch.setattr(RowTransform, "reordered", one_changed)
    with pytest.raises(ValueError, match=r"its codes are not those .*model.layers.1.*: codes that differ: 1"):
        export(run[0], tmp_path / "out", "--format", "hf" if in_folder else "gguf")
    assert not (tmp_path / "out").exists()


def test_a_folder_has_the_values_of_the_codes(run, tmp_path):
    folder, model, _ = run
    export(folder, tmp_path / "hf", "--format", "hf", "--dtype", "float32")
    opened = open_pretrained(model=str(tmp_path / "hf"))
    found = logits(load_base(opened, ModelArgs(path=opened.args.path, quant_type="none", compute_dtype="float32")))
    np.testing.assert_allclose(found, logits(model), atol=1e-5 * np.abs(found).max())


def test_exports_that_are_not_the_trained_model_are_refused(run, tmp_path):
    folder, _, lora = run
    problems = {
        "--format peft: the adapter alone is not the model": ["--format", "peft"],
        "--format gguf-lora: the adapter alone": ["--format", "gguf-lora"],
        f"for a run with lora.merge_into={lora.merge_into}|cannot hold": ["--format", "gguf", "--dtype", "bfloat16"],
        "--base: found 'x' for a run": ["--format", "hf", "--base", "x"],
    }
    other = "nf4" if lora.merge_into == "mxfp4" else "mxfp4"
    problems[rf"Train with lora\.merge_into={other}($|, or export in bfloat16 with --base)"] = [
        *("--format", "hf", "--dtype", other)
    ]
    for message, arguments in problems.items():
        with pytest.raises(ValueError, match=message):
            export(folder, tmp_path / "out", *arguments)
    export(folder, tmp_path / "out", "--format", "peft", "--adapter_alone")
    assert (tmp_path / "out/adapter_config.json").exists()


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "qwen2moe"])
def test_experts_are_rounded_as_in_the_file(name, tmp_path, capsys):
    """Experts have no adapters, and train as the file has them; routers stay in f32."""
    model = _folder(tmp_path, name)
    trained = _write_run(tmp_path / "run", model, LoraArgs(merge_into="q4_0"))[0]
    export(tmp_path / "run", tmp_path / "out", "--format", "gguf")
    assert "weights are those that training computed with" in capsys.readouterr().out
    source = open_model(tmp_path / "out/model-q4_0.gguf")
    assert {entry.file_type for each, entry in source.tensors.items() if ".experts." in each} == {"Q4_0"}
    opened = open_pretrained(model=str(source.path))
    found = logits(load_base(opened, weight_settings(opened, "stored", "float32")))
    np.testing.assert_allclose(found, logits(trained), atol=1e-5 * np.abs(found).max())
