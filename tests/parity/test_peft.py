"""An exported run, loaded by peft over the exported base, computes what our model computes."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from qlora_jax.config import Config, DataArgs, LoraArgs, ModelArgs, write_config
from qlora_jax.data.tokenizer.tokenizer import load_tokenizer, with_new_tokens
from qlora_jax.export import main
from qlora_jax.io.loading.loader import load_model
from qlora_jax.io.open_model import open_model
from qlora_jax.io.pretrained import apply_adapter, load_base, open_pretrained, open_tokenizer, weight_settings
from qlora_jax.io.run_folder.checkpoint import CONFIG_FILE, Checkpoints
from qlora_jax.methods.attach import attach_method
from qlora_jax.models.families import model_config
from qlora_jax.models.partition import combine, partition
from qlora_jax.models.precision import weight_format
from qlora_jax.models.trainable_embeddings import add_tables, add_token_rows
from tests.io.gguf_families import FAMILIES, random_tensors
from tests.io.tiny_models import random_weights, tiny_config, tokenizer_json, write_folder

SCRIPT = Path(__file__).parent.parent / "oracle/peft_logits.py"
LORAS = {
    "all": LoraArgs(rank=4, alpha=8.0),
    "patterns": LoraArgs(
        rank=4,
        alpha=8.0,
        target_modules=["q_proj", "v_proj", "down_proj"],
        rank_pattern={"down_proj": 2, "self_attn.v_proj": 6},
        alpha_pattern={r".*\.q_proj": 12.5},
    ),
    "rslora": LoraArgs(rank=4, alpha=8.0, use_rslora=True, rank_pattern={"up_proj": 9}),
}


def _write_run(
    run: Path, model: Path, lora_args: LoraArgs, scale: float = 0.1, new: Sequence[str] = (), quant_type: str = "nf4"
) -> tuple[Any, Any]:
    """A run with random adapters of some scale and new tokens, as training would have left it; its model and its base
    model."""
    config = Config(
        model=ModelArgs(path=str(model), compute_dtype="float32", new_tokens=list(new), quant_type=quant_type),
        lora=lora_args,
        data=DataArgs(train="x"),
        output=str(run),
    )
    source = open_model(model)
    features = model_config(source.config)
    loaded = load_model(source, features, weight_format(config.model, features))
    base = loaded.model
    attach_method(base, lora_args, jax.random.key(0))
    ids = open_tokenizer(source, config.model, base.config.vocab_size).new_ids if new else ()
    add_tables(base, ids, lora_args)
    parts = partition(base)
    key = jax.random.key(1)
    random = jax.tree.map(lambda leaf: jax.random.normal(key, leaf.shape) * scale, parts.lora)
    lora = jax.tree.map(lambda leaf, noise: leaf + noise if leaf.ndim == 2 else noise, parts.lora, random)
    run.mkdir()
    write_config(config, run / CONFIG_FILE)
    with Checkpoints(run, keep=1) as checkpoints:
        checkpoints.save(7, lora, {"count": np.zeros(1)}, {"fingerprint": loaded.fingerprint})
    without = load_model(source, features, weight_format(config.model, features)).model
    add_token_rows(without, ids, "float32")
    return combine(parts.with_lora(lora)), without


def _logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    hidden = jax.jit(type(model).hidden)(model, tokens)
    return np.asarray(model.head.logits(hidden)).reshape(*tokens.shape, -1)


def test_peft_over_the_dequantized_base(tmp_path: Path, oracle) -> None:
    tokens = np.random.default_rng(0).integers(0, 32, (2, 19)).astype(np.int32)
    ours = {}
    for name, lora_args in LORAS.items():
        config = tiny_config(attention_bias=True, tie_word_embeddings=name == "all")
        files = {"tokenizer.json": tokenizer_json()}
        model = write_folder(tmp_path / f"{name}-model", config, random_weights(config), **files)
        with_adapter, base = _write_run(tmp_path / name, model, lora_args)
        main(["--run", str(tmp_path / name), "--format", "peft", "--with_base"])
        ours |= {f"{name}/base": _logits(base, tokens), f"{name}/adapted": _logits(with_adapter, tokens)}
    cases = {name: [str(tmp_path / name / "peft/base"), str(tmp_path / name / "peft")] for name in LORAS}
    found = oracle(SCRIPT, cases=cases, tokens=tokens)
    assert found.keys() == ours.keys()
    for name, logits in ours.items():
        np.testing.assert_allclose(found[name], logits, atol=1e-4, err_msg=name)
    assert all(np.abs(found[f"{name}/adapted"] - found[f"{name}/base"]).max() > 0.1 for name in LORAS)


NEW = ["<|tool|>", "<|answer|>"]


@pytest.mark.slow
def test_new_tokens(tmp_path: Path, oracle) -> None:
    """Rows of a separate head and of a tied one, of a longer table, and in families with other names."""
    untied, padded = tiny_config(), tiny_config(vocab_size=40)
    configs = {"untied": untied, "padded": padded, "tied": tiny_config(tie_word_embeddings=True)}
    configs |= {name: FAMILIES[name][1] for name in ("gptneox", "gemma2", "qwen2")}
    tokens = np.random.default_rng(0).integers(0, 32 + len(NEW), (2, 19)).astype(np.int32)
    tokens[:, ::4] = 33
    ours = {}
    for name, config in configs.items():
        files = {"tokenizer.json": tokenizer_json()}
        model = write_folder(tmp_path / f"{name}-model", config, random_tensors(config), **files)
        with_adapter, base = _write_run(tmp_path / name, model, LORAS["all"], new=NEW)
        main(["--run", str(tmp_path / name), "--format", "peft", "--with_base"])
        ours |= {f"{name}/base": _logits(base, tokens), f"{name}/adapted": _logits(with_adapter, tokens)}
        saved = json.loads((tmp_path / name / "peft/adapter_config.json").read_text())["trainable_token_indices"]
        assert all(ids == [32, 33] for ids in saved.values()) and len(saved) == 2 - with_adapter.config.tie_embeddings
    cases = {name: [str(tmp_path / name / "peft/base"), str(tmp_path / name / "peft")] for name in configs}
    found = oracle(SCRIPT, cases=cases, tokens=tokens)
    for name, logits in ours.items():
        np.testing.assert_allclose(found[name], logits, atol=1e-4, err_msg=name)


WHOLE = {
    "both": ("untied", ["embed_tokens", "lm_head"], NEW),
    "a whole embedding": ("untied", ["embed_tokens"], NEW),
    "a whole head": ("untied", ["lm_head"], []),
    "tied": ("tied", ["embed_tokens"], NEW),
    "by the family's name": ("gptneox", ["embed_in", "embed_out"], []),
    "soft caps": ("gemma2", ["embed_tokens"], []),
}


@pytest.mark.exhaustive
@pytest.mark.slow
def test_whole_tables(tmp_path: Path, oracle) -> None:
    """Tables that trained whole, with or without rows for new tokens, and rows of the other table."""
    configs = {"untied": tiny_config(), "tied": tiny_config(tie_word_embeddings=True)}
    configs |= {name: FAMILIES[name][1] for name in ("gptneox", "gemma2")}
    tokens, ours = np.random.default_rng(0).integers(0, 32, (2, 19)).astype(np.int32), {}
    for name, (base, modules, new) in WHOLE.items():
        files = {"tokenizer.json": tokenizer_json()}
        model = write_folder(tmp_path / f"{name}-model", configs[base], random_tensors(configs[base]), **files)
        args = dataclasses.replace(LORAS["all"], modules_to_save=modules)
        with_adapter, _ = _write_run(tmp_path / name, model, args, new=new)
        main(["--run", str(tmp_path / name), "--format", "peft", "--with_base"])
        main(["--run", str(tmp_path / name), "--format", "hf", "--dtype", "float32"])
        ours[f"{name}/adapted"] = _logits(with_adapter, tokens)
    cases = {name: [str(tmp_path / name / "peft/base"), str(tmp_path / name / "peft")] for name in WHOLE}
    found = oracle(SCRIPT, cases=cases, tokens=tokens)
    for name, logits in ours.items():
        np.testing.assert_allclose(found[name], logits, atol=1e-4 * np.abs(logits).max(), err_msg=name)


@pytest.mark.parametrize(
    ("changes", "new", "told"),
    [
        (dict(modules_to_save=["embed_tokens"]), [], "does not keep a head tied to the embedding with"),
        (dict(), NEW, "PEFT cannot combine trained rows of tokens with"),
    ],
)
def test_what_peft_has_not_beside_ia3_is_refused(tmp_path: Path, changes: dict, new: list[str], told: str) -> None:
    config = tiny_config(tie_word_embeddings=True)
    files = {"tokenizer.json": tokenizer_json()}
    model = write_folder(tmp_path / "model", config, random_weights(config), **files)
    _write_run(tmp_path / "run", model, LoraArgs(method="ia3", **changes), new=new)
    with pytest.raises(ValueError, match=told):
        main(["--run", str(tmp_path / "run")])


TABLES_MADE_BY_PEFT = {
    "rows": ("untied", dict(resize_to=34, trainable_token_indices={"embed_tokens": [32, 33], "lm_head": [32, 33]})),
    "rows, tied": ("tied", dict(resize_to=34, trainable_token_indices=[32, 33])),
    "rows of the vocabulary": ("gptneox", dict(trainable_token_indices={"embed_in": [7, 3], "lm_head": [7, 3]})),
    "whole": ("untied", dict(resize_to=34, modules_to_save=["embed_tokens", "lm_head"])),
    "a whole embedding": ("untied", dict(modules_to_save=["embed_tokens"])),
    "longer, tied": ("tied", dict(resize_to=34)),
}


@pytest.mark.slow
@pytest.mark.exhaustive
def test_tables_that_peft_made(tmp_path: Path, oracle) -> None:
    """Rows of new tokens and of others, and tables that were trained whole: as adapters, and merged."""
    configs = {"untied": tiny_config(), "tied": tiny_config(tie_word_embeddings=True)}
    configs["gptneox"] = FAMILIES["gptneox"][1]
    grown = with_new_tokens(load_tokenizer({"tokenizer_json": tokenizer_json()}), NEW, [])
    tokens, cases = np.random.default_rng(0).integers(0, 32, (2, 19)).astype(np.int32), {}
    tokens[:, ::5] = 7
    for name, config in configs.items():
        files = {"tokenizer.json": tokenizer_json()}
        write_folder(tmp_path / name, config, random_tensors(config), **files)
    for name, (base, arguments) in TABLES_MADE_BY_PEFT.items():
        common = dict(r=3, lora_alpha=6, target_modules="all-linear")
        cases[name] = [str(tmp_path / base), str(tmp_path / name), common | arguments]
    expected = oracle(SCRIPT.with_name("peft_save_adapters.py"), cases=cases, tokens=tokens)
    for name, (_, folder, arguments) in cases.items():
        if "resize_to" in arguments:
            (Path(folder) / "tokenizer.json").write_text(grown.to_json())
        opened = open_pretrained(run=folder)
        args = weight_settings(opened, "none", "float32")
        assert opened.run is not None
        logits = _logits(combine(apply_adapter(load_base(opened, args), opened.run)), tokens)
        close = dict(atol=1e-4 * np.abs(expected[name]).max(), err_msg=name)
        np.testing.assert_allclose(logits, expected[name], **close)
        main(["--run", folder, "--format", "hf", "--output", f"{folder}-hf", "--dtype", "float32"])
        merged = open_pretrained(model=f"{folder}-hf")
        assert _logits(load_base(merged, args), tokens).shape == logits.shape
        assert merged.tokenizer.vocab_size == (34 if "resize_to" in arguments else 32)


def test_new_tokens_beside_a_head_with_a_bias_are_refused(tmp_path: Path) -> None:
    config = FAMILIES["phi2"][1]
    files = {"tokenizer.json": tokenizer_json()}
    model = write_folder(tmp_path / "model", config, random_tensors(config), **files)
    _write_run(tmp_path / "run", model, LORAS["all"], new=NEW)
    with pytest.raises(ValueError, match="adds a bias, which PEFT omits if rows of the head train"):
        main(["--run", str(tmp_path / "run")])


MADE_BY_PEFT = {
    "llama": dict(r=4, lora_alpha=6, target_modules="all-linear"),
    "patterns": dict(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], rank_pattern={"up_proj": 2})
    | dict(alpha_pattern={"self_attn.q_proj": 3}),
    "rslora": dict(r=9, lora_alpha=6, target_modules=["v_proj", "down_proj"], use_rslora=True),
    "gptneox": dict(r=3, lora_alpha=6, target_modules=["query_key_value", "dense_4h_to_h"]),
    "phi3": dict(r=3, lora_alpha=6, target_modules=["gate_up_proj", "o_proj"]),
}


@pytest.mark.slow
def test_adapters_that_peft_made(tmp_path: Path, oracle) -> None:
    """OpenedModel as a run is, over a base that is not quantized, as peft had it."""
    tokens, cases = np.random.default_rng(0).integers(0, 32, (2, 19)).astype(np.int32), {}
    for name, arguments in MADE_BY_PEFT.items():
        config = FAMILIES[name][1] if name in FAMILIES else tiny_config()
        files = {"tokenizer.json": tokenizer_json()}
        model = write_folder(tmp_path / f"{name}-model", config, random_tensors(config), **files)
        cases[name] = [str(model), str(tmp_path / name), arguments]
    expected = oracle(SCRIPT.with_name("peft_save_adapters.py"), cases=cases, tokens=tokens)
    for name, (_, folder, _) in cases.items():
        opened = open_pretrained(run=folder)
        base = load_base(opened, weight_settings(opened, "none", "float32"))
        assert opened.run is not None
        logits = _logits(combine(apply_adapter(base, opened.run)), tokens)
        np.testing.assert_allclose(logits, expected[name], atol=1e-4 * np.abs(expected[name]).max(), err_msg=name)
    with pytest.raises(ValueError, match=r"a PEFT adapter has no steps \(found step 3\)"):
        open_pretrained(run=str(tmp_path / "llama"), step=3)


@pytest.mark.slow
def test_families_under_their_own_names(tmp_path: Path, oracle) -> None:
    """Adapter and dequantized base of families whose modules are fused or have other names than Llama's."""
    tokens = np.random.default_rng(0).integers(0, 32, (2, 19)).astype(np.int32)
    ours, names = {}, ("gptneox", "phi2", "phi3", "gemma2")
    for name in names:
        config = FAMILIES[name][1]
        model = write_folder(
            tmp_path / f"{name}-model", config, random_tensors(config), **{"tokenizer.json": tokenizer_json()}
        )
        with_adapter, base = _write_run(tmp_path / name, model, LORAS["all"])
        main(["--run", str(tmp_path / name), "--format", "peft", "--with_base"])
        ours |= {f"{name}/base": _logits(base, tokens), f"{name}/adapted": _logits(with_adapter, tokens)}
    cases = {name: [str(tmp_path / name / "peft/base"), str(tmp_path / name / "peft")] for name in names}
    found = oracle(SCRIPT, cases=cases, tokens=tokens)
    for name, logits in ours.items():
        np.testing.assert_allclose(found[name], logits, atol=1e-4, err_msg=name)
    assert all(np.abs(found[f"{name}/adapted"] - found[f"{name}/base"]).max() > 0.01 for name in names)


def test_another_base_and_another_step_are_refused(tmp_path: Path) -> None:
    config = tiny_config()
    files = {"tokenizer.json": tokenizer_json()}
    model = write_folder(tmp_path / "model", config, random_weights(config), **files)
    run, output = tmp_path / "run", tmp_path / "out"
    _write_run(run, model, LORAS["all"])
    with pytest.raises(ValueError, match=r"a checkpoint of step 3 \(found steps: \[7\]\)"):
        main(["--run", str(run), "--step", "3"])
    write_folder(model, config, random_weights(config, seed=5))
    with pytest.raises(ValueError, match=r"is not the base that .*run was trained on: its fingerprint is"):
        main(["--run", str(run), "--output", str(output), "--with_base"])
    assert not output.exists()
    main(["--run", str(run), "--output", str(output)])  # the adapter alone needs no weights
    with pytest.raises(ValueError, match="exists and is not empty"):
        main(["--run", str(run), "--output", str(output)])


@pytest.mark.slow
def test_smollm2_with_its_tokenizer(tmp_path: Path, oracle, smollm2_gguf: Path) -> None:
    """Exports a run from a GGUF file to a folder that transformers and peft load with nothing else."""
    with_adapter, _ = _write_run(tmp_path / "run", smollm2_gguf, LORAS["all"])
    main(["--run", str(tmp_path / "run"), "--with_base", "--output", str(tmp_path / "out")])
    tokenizer = load_tokenizer(open_model(smollm2_gguf).tokenizer)
    texts = ["The sea, 12345 times\n    5", "naïve ☃ <|im_end|>", "def f(x):\n\treturn x"]
    messages = [{"role": "user", "content": "Hello"}]
    found = oracle(
        SCRIPT.with_name("peft_tokenizer.py"), folder=str(tmp_path / "out/base"), texts=texts, messages=messages
    )
    assert json.loads(str(found["json"])) == {
        "ids": [tokenizer.encode(text) for text in texts],
        "chat": tokenizer.render(messages, add_generation_prompt=True),
        "special": [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id],
    }
    tokens = np.array(
        [tokenizer.encode("The capital of France is the city of Paris, which lies on the Seine.")], np.int32
    )
    cases = {"out": [str(tmp_path / "out/base"), str(tmp_path / "out")]}
    logits = oracle(SCRIPT, cases=cases, tokens=tokens)["out/adapted"]
    np.testing.assert_allclose(_logits(with_adapter, tokens), logits, atol=1e-4 * np.abs(logits).max())
