"""A run exported as one model: transformers computes from it what base and adapter compute here."""

import json
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qlora_jax import quantize
from qlora_jax.config import LoraArgs
from qlora_jax.data.tokenizer.tokenizer import load_tokenizer
from qlora_jax.export import main
from qlora_jax.io.export import verify
from qlora_jax.io.hf import model_writer
from qlora_jax.io.hf.fused_experts import name_in_files
from qlora_jax.io.open_model import open_model
from qlora_jax.io.pretrained import load_base, open_pretrained, weight_settings
from qlora_jax.methods.method import linears
from qlora_jax.nn.lora import LoRA
from tests.io.gguf_families import FAMILIES, random_tensors
from tests.io.tiny_models import random_weights, tiny_config, tokenizer_json, write_folder
from tests.io.tiny_tokenizers import byte_level
from tests.marks import some_in_ci
from tests.parity.test_gguf_transformers import IMPORTED
from tests.parity.test_peft import LORAS, _logits, _write_run

SCRIPT = Path(__file__).parent.parent / "oracle/folder_logits.py"
NAMED = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
ON_EXPERTS = ["experts.gate_up_proj", "experts.down_proj", "mlp.gate"]
EXPERTS = {"experts": LoraArgs(rank=4, alpha=8.0, target_parameters=ON_EXPERTS)}
TOKENS = np.random.default_rng(0).integers(0, 32, (2, 19)).astype(np.int32)


def _run(tmp_path: Path, name: str, lora: str, config=None):
    """(folder of a run, its model, its base)."""
    config = config or tiny_config(attention_bias=True, tie_word_embeddings=lora == "all")
    tensors = random_tensors(config) if name in FAMILIES else random_weights(config)
    tensors = {name_in_files(config, tensor): values for tensor, values in tensors.items()}
    model = write_folder(tmp_path / f"{name}-model", config, tensors, **{"tokenizer.json": tokenizer_json()})
    return tmp_path / name, *_write_run(tmp_path / name, model, (LORAS | EXPERTS)[lora])


DENSE = {"all": "all", "patterns": "patterns", "rslora": "rslora", "phi3": "all", "gptneox": "all"}
MIXTURES = {"mixtral": "experts", "glm4moe": "experts"}


@pytest.mark.parametrize("runs", some_in_ci([(DENSE,), (MIXTURES,)], lambda index: index == 0))
def test_transformers_computes_the_same(tmp_path: Path, oracle, runs: dict[str, str]) -> None:
    ours, folders = {}, {}
    for name, lora in runs.items():
        config = FAMILIES[name][1] if name in FAMILIES else None
        run, with_adapter, base = _run(tmp_path, name, lora, config)
        main(["--run", str(run), "--format", "hf", "--dtype", "float32"])
        ours[name], folders[name] = _logits(with_adapter, TOKENS), str(run / "hf")
        assert np.abs(ours[name] - _logits(base, TOKENS)).max() > 0.01
    found = oracle(SCRIPT, folders=folders, tokens=TOKENS)
    for name, logits in ours.items():
        np.testing.assert_allclose(found[name], logits, atol=1e-4 * max(1, np.abs(logits).max()), err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_rounded_once(tmp_path: Path, dtype: str) -> None:
    run, _, _ = _run(tmp_path, "run", "all")
    main(["--run", str(run), "--format", "hf", "--dtype", dtype])
    main(["--run", str(run), "--format", "hf", "--dtype", "float32", "--output", str(tmp_path / "whole")])
    rounded, whole = (open_model(folder).tensors for folder in (run / "hf", tmp_path / "whole"))
    assert rounded.keys() == whole.keys() and "model.layers.1.mlp.down_proj.weight" in rounded
    for name, tensor in rounded.items():
        expected = whole[name].read().astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16)
        np.testing.assert_array_equal(tensor.read(), expected, err_msg=name)
    assert json.loads((run / "hf/config.json").read_text())["torch_dtype"] == dtype


@pytest.mark.slow
def test_large_models_are_cut_into_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _, _ = _run(tmp_path, "run", "all")
    main(["--run", str(run), "--format", "hf"])
    monkeypatch.setattr(model_writer, "SHARD_BYTES", 20_000)
    main(["--run", str(run), "--format", "hf", "--output", str(tmp_path / "cut")])
    files = sorted(path.name for path in (tmp_path / "cut").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "cut/model.safetensors.index.json").read_text())
    one, cut = (open_model(folder).tensors for folder in (run / "hf", tmp_path / "cut"))
    assert index["weight_map"].keys() == one.keys() == cut.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in one.values())
    for name, tensor in one.items():
        np.testing.assert_array_equal(cut[name].read(), tensor.read())


def test_a_merge_that_is_off_is_refused_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _, _ = _run(tmp_path, "run", "all")
    merge = LoRA.merge
    monkeypatch.setattr(LoRA, "merge", lambda self, weight: 0.5 * merge(self, weight) + 0.5 * weight)
    with pytest.raises(ValueError, match=r"the merge of run, step 7 is not what was trained: largest difference"):
        main(["--run", str(run), "--format", "hf"])
    assert not (run / "hf").exists() and not list(run.glob(".hf*"))


def test_what_is_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run, _, _ = _run(tmp_path, "run", "all")
    main(["--run", str(run), "--format", "hf", "--dtype", "float32"])
    told = capsys.readouterr().out
    assert f"run, step 7, merged: {run / 'hf'}" in told and "largest difference of its logits" in told
    refused = {
        "--with_base: requires --format peft": ["--format", "hf", "--with_base"],
        "expected none, since an adapter keeps its dtype": ["--dtype", "float16"],
        "expected bfloat16, float16, float32": ["--format", "hf", "--dtype", "q8_0"],
        "cannot be written to GGUF .found WordLevel, expected BPE": ["--format", "gguf"],
    }
    for problem, wrong in refused.items():
        with pytest.raises(ValueError, match=problem):
            main(["--run", str(run), *wrong, "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("form", "new"), [("hf", ()), ("gguf", ()), ("hf", ("<|new|>",))])
def test_merged_into_the_original_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture, form: str, new: tuple[str, ...]
) -> None:
    """W + scaling (A B)^T of the weights that were quantized; the cost is reported."""
    config = FAMILIES["llama"][1] | {"vocab_size": 371 if new else 460}
    tensors, files = random_tensors(config), {"tokenizer.json": byte_level()}
    model = write_folder(tmp_path / "model", config, tensors, **files)
    with_adapter, _ = _write_run(tmp_path / "run", model, LORAS["all"], new=new)
    main(["--run", str(tmp_path / "run"), "--format", form, "--dtype", "float32", "--base", str(model)])
    told = capsys.readouterr().out
    written = tmp_path / "run" / form
    found = open_model(written / "model-float32.gguf" if form == "gguf" else written).tensors
    adapters = {name: linear.adapter for name, linear in linears(with_adapter)}
    for name, values in tensors.items():
        layer = 1 if ".layers.1." in name else 0
        adapter = adapters.get(name.removesuffix(".weight").replace(f".layers.{layer}.", ".layers."))
        expected = values if adapter is None else np.asarray(adapter.select_layer(layer).merge(jnp.asarray(values)))
        read = found[name].read()[: len(expected)]
        np.testing.assert_allclose(read, expected, rtol=0, atol=1e-6, err_msg=name)
    assert len(found["model.embed_tokens.weight"].read()) == config["vocab_size"] + len(new)
    if new:  # the prompts of the comparison hold them too
        return
    # The cost is the difference from what was trained.
    folder = write_folder(tmp_path / "again", config, {name: found[name].read() for name in found}, **files)
    tokenizer = load_tokenizer(open_model(model).tokenizer)
    prompts = verify.tokenize_prompts(tokenizer, verify.PROMPTS)
    merged, trained = (_logits(each, prompts.tokens_BT)[prompts.real_BT] for each in (_dense(folder), with_adapter))
    cost = np.abs(merged - trained).max()
    assert f"run, step 7, merged into {model}: {written}" in told and cost > 0.01
    (costs,) = (line for line in told.splitlines() if line.startswith("cost of merging into other weights"))
    assert f"3 prompts: {cost:.3g} (rms" in costs


def _dense(folder: Path):
    opened = open_pretrained(model=str(folder))
    return load_base(opened, weight_settings(opened, "none", "float32"))


def test_another_original_is_refused(tmp_path: Path) -> None:
    run, _, _ = _run(tmp_path, "run", "all", tiny_config())
    config, files = tiny_config(), {"tokenizer.json": tokenizer_json()}
    weights = random_weights(config)
    changed = weights | {name: 1.01 * weights[name] for name in list(weights)[2:4]}
    others = {
        "norm_eps = 0.001, the run's base has 1e-05": (config | {"rms_norm_eps": 1e-3}, weights),
        "missing: model.norm.weight": (config, {n: w for n, w in weights.items() if n != "model.norm.weight"}),
        "2 tensors differ from those of training": (config, changed),
    }
    for index, (problem, (its_config, its_weights)) in enumerate(others.items()):
        other = write_folder(tmp_path / f"other{index}", its_config, its_weights, **files)
        with pytest.raises(ValueError, match=problem):
            main(["--run", str(run), "--format", "hf", "--base", str(other)])
    assert not (run / "hf").exists() and not list(run.glob(".hf*"))
    quantize.main(["--model", str(tmp_path / "run-model"), "--output", str(tmp_path / "nf4")])
    with pytest.raises(ValueError, match=r"tensors are quantized, such as .* --base requires the model in 16 bits"):
        main(["--run", str(run), "--format", "hf", "--base", str(tmp_path / "nf4")])
    with pytest.raises(ValueError, match="base: requires --format hf or gguf"):
        main(["--run", str(run), "--base", str(tmp_path / "run-model")])


@pytest.mark.slow
def test_a_gguf_file(tmp_path: Path, oracle, smollm2_gguf: Path, capsys: pytest.CaptureFixture) -> None:
    """Read by transformers; the tensors are those of the merged folder."""
    with_adapter, _ = _write_run(tmp_path / "run", smollm2_gguf, LORAS["all"])
    main(["--run", str(tmp_path / "run"), "--format", "gguf", "--dtype", "float32"])
    main(["--run", str(tmp_path / "run"), "--format", "hf", "--dtype", "float32"])
    path = tmp_path / "run/gguf/model-float32.gguf"
    file, folder = open_model(path).tensors, open_model(tmp_path / "run/hf").tensors
    assert file.keys() == folder.keys()
    for name, tensor in folder.items():
        np.testing.assert_array_equal(file[name].read(), tensor.read(), err_msg=name)
    found = oracle(SCRIPT.with_name("gguf_logits.py"), path=str(path), tokens=TOKENS)["logits"]
    ours = _logits(with_adapter, TOKENS)
    np.testing.assert_allclose(found, ours, atol=1e-4 * np.abs(ours).max())
    capsys.readouterr()
    main(["--run", str(tmp_path / "run"), "--format", "gguf", "--dtype", "q4_0", "--output", str(tmp_path / "q4")])
    assert "largest difference of its logits" in capsys.readouterr().out


@pytest.mark.slow
def test_gguf_files_from_folders(tmp_path: Path, oracle) -> None:
    """Read by transformers, for the architectures that it imports; the tensors are those of the merged folder."""
    files: dict[str, str] = {}
    for name in IMPORTED:
        config = FAMILIES[name][1] | {"vocab_size": 460}
        tokenizer = {"tokenizer.json": byte_level(), "tokenizer_config.json": json.dumps(NAMED)}
        model = write_folder(tmp_path / f"{name}-model", config, random_tensors(config), **tokenizer)
        _write_run(tmp_path / name, model, LORAS["all"])
        for form in ("gguf", "hf"):
            main(["--run", str(tmp_path / name), "--format", form, "--dtype", "float32"])
        files[name] = f"{name}/gguf/model-float32.gguf"
    expected = oracle(SCRIPT.with_name("gguf_import_several.py"), folder=str(tmp_path), files=files)
    for name in IMPORTED:
        tensors = open_model(tmp_path / name / "hf").tensors
        assert {key for key in expected if key.startswith(f"{name}/")} == {f"{name}/{tensor}" for tensor in tensors}
        for tensor, entry in tensors.items():
            atol = 2.5e-7 if name.startswith("gemma") else 0  # 1 is added and taken away
            np.testing.assert_allclose(entry.read(), expected[f"{name}/{tensor}"], rtol=0, atol=atol, err_msg=name)


def test_differences() -> None:
    base, adapter = np.zeros((2, 3)), np.array([[0.0, 3, 0], [0, 0, -4]])
    found = verify.compare_logits(adapter + 0.1, adapter, base)
    assert found.largest == pytest.approx(0.1) and found.rms == pytest.approx(0.1)
    assert found.adapter_largest == 4 and found.adapter_rms == pytest.approx((25 / 6) ** 0.5)
    assert found.is_small and not verify.compare_logits(adapter * 0.5, adapter, base).is_small
