"""DoRA, (IA)^3, OFT, VeRA and LayerNorm tuning: logits, gradients, merges of exported adapters in peft equal ours."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qlora_jax.config import LoraArgs
from qlora_jax.export import main
from qlora_jax.io.peft.writer import in_peft_format
from qlora_jax.io.pretrained import apply_adapter, load_base, open_pretrained, weight_settings
from qlora_jax.io.run_folder.checkpoint import Run
from qlora_jax.methods.ia3 import ia3_targets
from qlora_jax.models.families import model_config
from qlora_jax.models.partition import combine
from tests.io.gguf_families import FAMILIES, random_tensors
from tests.io.tiny_models import random_weights, tiny_config, tokenizer_json, write_folder
from tests.marks import some_in_ci
from tests.parity.test_peft import _write_run

SCRIPT = Path(__file__).parent.parent / "oracle/peft_methods.py"
EVERY, RATE = 3, 0.25
METHODS = {
    "lora": LoraArgs(rank=4, alpha=8.0, dropout=RATE),
    "dora": LoraArgs(method="dora", rank=4, alpha=8.0),
    "dora, some, dropout": LoraArgs(
        method="dora",
        rank=4,
        alpha=8.0,
        dropout=RATE,
        use_rslora=True,
        target_modules=["q_proj", "v_proj", "down_proj"],
        rank_pattern={"down_proj": 2},
    ),
    "ia3": LoraArgs(method="ia3"),
    "ln_tuning": LoraArgs(method="ln_tuning"),
    "oft": LoraArgs(method="oft", oft_block_size=8),
    "oft, exact, shared": LoraArgs(method="oft", oft_blocks=4, block_share=True, use_cayley_neumann=False),
    "oft, some, three terms": LoraArgs(
        method="oft", oft_block_size=16, target_modules=["q_proj", "v_proj", "down_proj"], num_cayley_neumann_terms=3
    ),
    "vera": LoraArgs(method="vera", rank=4, dropout=RATE),
    "vera, some": LoraArgs(
        method="vera", rank=6, target_modules=["q_proj", "k_proj", "up_proj"], projection_prng_key=3
    ),
    "ia3, all": LoraArgs(method="ia3", target_modules="all-linear", feedforward_modules=["up_proj", "o_proj"]),
}


@pytest.fixture(autouse=True)
def dropout_takes_every_third_column(monkeypatch: pytest.MonkeyPatch) -> None:
    def dropped(x, rate, keys_B):
        if rate == 0.0 or keys_B is None:
            return x
        keep = jnp.arange(x.shape[-1]) % EVERY != 0
        return jnp.where(keep[None], x / jnp.asarray(1 - rate, x.dtype), 0.0)

    for module in ("nn.dropout", "nn.lora", "methods.vera"):
        monkeypatch.setattr(f"qlora_jax.{module}.apply_dropout", dropped)


def _ours(run: Path, tokens: np.ndarray, cotangent: np.ndarray) -> tuple[np.ndarray, np.ndarray, Any]:
    """(logits, those in training, gradients by PEFT's names)."""
    opened = open_pretrained(run=str(run))
    assert opened.run is not None
    parts = apply_adapter(load_base(opened, opened.args), opened.run)

    @functools.partial(jax.jit, static_argnames="training")
    def logits(lora, training):
        model = combine(parts.with_lora(lora))
        how = {"remat": "names", "keys_B": jax.random.split(jax.random.key(0), len(tokens))} if training else {}
        hidden = model.hidden(jnp.asarray(tokens), **how)
        return model.head.logits(hidden).reshape(cotangent.shape)

    value, vjp = jax.vjp(lambda lora: logits(lora, True), parts.lora)
    (grads,) = vjp(jnp.asarray(cotangent))
    named = {opened.features.hugging_face_name(name): leaves for name, leaves in grads.items()}
    _, written = in_peft_format(named, opened.run.lora_args, opened.features, "base")
    tensors = {
        name: tensor for name, tensor in written.items() if name not in ("base_model.vera_A", "base_model.vera_B")
    }
    return np.asarray(logits(parts.lora, False)), np.asarray(value), tensors


def _close(found: np.ndarray, ours: np.ndarray, what: str, tolerance: float = 1e-5) -> None:
    scale = np.abs(found).max()
    assert scale > 0, what
    np.testing.assert_allclose(ours / scale, found / scale, atol=tolerance, err_msg=what)


def _compare(tmp_path: Path, oracle, cases: dict[str, tuple[dict, dict, LoraArgs]]) -> None:
    tokens = np.random.default_rng(0).integers(0, 32, (2, 19)).astype(np.int32)
    cotangent, ours = np.random.default_rng(1).standard_normal((2, 19, 32)).astype(np.float32), {}
    for name, (config, weights, lora_args) in cases.items():
        model = write_folder(tmp_path / f"{name}-model", config, weights, **{"tokenizer.json": tokenizer_json()})
        _write_run(tmp_path / name, model, lora_args)
        main(["--run", str(tmp_path / name), "--format", "peft", "--with_base"])
        main(["--run", str(tmp_path / name), "--format", "hf", "--dtype", "float32"])
        ours[name] = _ours(tmp_path / name, tokens, cotangent)
    folders = {name: [str(tmp_path / name / "peft/base"), str(tmp_path / name / "peft")] for name in cases}
    found = oracle(SCRIPT, cases=folders, tokens=tokens, cotangent=cotangent, every=EVERY)
    for name, (logits, train, grads) in ours.items():
        _close(found[f"{name}/logits"], logits, name)
        _close(found[f"{name}/train"], train, f"{name} in training")
        prefix = f"{name}/grad/"
        assert {key.removeprefix(prefix) for key in found if key.startswith(prefix)} == grads.keys()
        for key, grad in grads.items():
            _close(found[prefix + key], grad, f"{name} {key}", 2e-5)
        written = load_file(tmp_path / name / "hf/model.safetensors")
        for key, merged in written.items():
            if ".layers." not in key and f"{name}/merged/{key}" not in found:
                continue  # a head that transformers calls otherwise in memory
            _close(found[f"{name}/merged/{key}"], merged, f"{name} {key}")


GROUPS = [
    (["lora", "dora", "dora, some, dropout", "ia3", "ln_tuning", "ia3, all", "oft", "vera"],),
    (["oft, exact, shared", "oft, some, three terms", "vera, some"],),
]


@pytest.mark.parametrize("names", some_in_ci(GROUPS, lambda i: i < 1))
def test_forward_gradients_and_merge(tmp_path: Path, oracle, names: list[str]) -> None:
    config = tiny_config(attention_bias=True, mlp_bias=True)
    weights = random_weights(config)
    _compare(tmp_path, oracle, {name: (config, weights, METHODS[name]) for name in names})


SOME_LAYERS = {
    "the same layers": LoraArgs(rank=4, alpha=8.0, dropout=RATE, layers_to_transform="1,3-4"),
    "one layer": LoraArgs(rank=4, alpha=8.0, target_modules=["v_proj", "up_proj"], layers_to_transform=2),
    "a layer's index in names": LoraArgs(
        rank=4,
        alpha=8.0,
        use_rslora=True,
        target_modules=r"model\.layers\.(0|2)\.self_attn\.(q|v)_proj|model\.layers\.[24]\.mlp\.down_proj|.*\.o_proj",
        rank_pattern={"down_proj": 2},
    ),
}


@pytest.mark.slow
def test_some_layers(tmp_path: Path, oracle) -> None:
    config = tiny_config(num_hidden_layers=5)
    weights = random_weights(config)
    _compare(tmp_path, oracle, {name: (config, weights, args) for name, args in SOME_LAYERS.items()})
    saved = {name: json.loads((tmp_path / name / "peft/adapter_config.json").read_text()) for name in SOME_LAYERS}
    assert saved["the same layers"]["layers_to_transform"] == [1, 3, 4]
    assert saved["one layer"]["layers_to_transform"] == [2]
    assert "layers_to_transform" not in saved["a layer's index in names"]


KINDS = ["gptneox", "phi2", "phi3", "gemma2"]
CASES = [(family, names) for names in (["dora", "ia3", "ln_tuning"], ["oft", "vera"]) for family in KINDS]


@pytest.mark.parametrize(("family", "names"), some_in_ci(CASES, lambda i: i in (0, 3)))
def test_families_under_their_own_names(tmp_path: Path, oracle, family: str, names: list[str]) -> None:
    """Fused projections, and projections called otherwise: the usual targets of (IA)^3 are found, and its biases."""
    config = FAMILIES[family][1]
    args = {name: METHODS[name] for name in names}
    _compare(tmp_path, oracle, {name: (config, random_tensors(config), each) for name, each in args.items()})
    assert len(ia3_targets(model_config(config), METHODS["ia3"])[1]) == 1


# By method; ln_tuning where norms have other names or no bias.
DENSE = [("ln_tuning", ["glm4", "cohere2"])]
DENSE += [("lora", ["olmo3", "exaone4", "seed_oss", "glm4", "granite", "cohere2", "ministral3"])]


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize(("method", "families"), DENSE)
def test_dense_families(tmp_path: Path, oracle, method: str, families: list[str]) -> None:
    args = dataclasses.replace(METHODS[method], dropout=0.0)
    configs = {family: FAMILIES[family][1] for family in families}
    _compare(tmp_path, oracle, {name: (config, random_tensors(config), args) for name, config in configs.items()})


MADE_BY_PEFT = {
    "oft": ("OFTConfig", dict(oft_block_size=8, target_modules="all-linear")),
    "oft, exact": (
        "OFTConfig",
        dict(r=4, oft_block_size=0, target_modules=["q_proj", "down_proj"], use_cayley_neumann=False),
    ),
    "vera": ("VeraConfig", dict(r=4, target_modules="all-linear", projection_prng_key=7)),
    "vera without projections": ("VeraConfig", dict(r=4, target_modules=["k_proj", "o_proj"], save_projection=False)),
}


@pytest.mark.slow
@pytest.mark.exhaustive
def test_adapters_that_peft_made(tmp_path: Path, oracle) -> None:
    """Ours compute what PEFT computes; VeRA's matrices are those that we draw, unless the file has others."""
    config = tiny_config(attention_bias=True)
    model = write_folder(tmp_path / "model", config, random_weights(config), **{"tokenizer.json": tokenizer_json()})
    tokens = np.random.default_rng(0).integers(0, 32, (2, 19)).astype(np.int32)
    cases = {name: [str(model), str(tmp_path / name), *made] for name, made in MADE_BY_PEFT.items()}
    expected = oracle(SCRIPT.with_name("peft_save_methods.py"), cases=cases, tokens=tokens)
    for name in MADE_BY_PEFT:
        run, logits = _opened_logits(tmp_path / name, tokens)
        assert not run.frozen
        _close(expected[name], logits, name, 2e-5)
    weights = tmp_path / "vera/adapter_model.safetensors"
    tensors = load_file(weights)
    save_file(tensors | {"base_model.vera_A": 2 * tensors["base_model.vera_A"]}, weights)
    run, logits = _opened_logits(tmp_path / "vera", tokens)
    assert run.frozen and not np.allclose(logits, expected["vera"], atol=1e-3)
    again = oracle(
        SCRIPT.with_name("peft_logits.py"), cases={"vera": [str(model), str(tmp_path / "vera")]}, tokens=tokens
    )
    _close(again["vera/adapted"], logits, "other projections", 2e-5)


def _opened_logits(adapter: Path, tokens: np.ndarray) -> tuple[Run, np.ndarray]:
    """Returns an adapter over its base without quantization, and its logits."""
    opened = open_pretrained(run=str(adapter))
    assert opened.run is not None
    model = combine(apply_adapter(load_base(opened, weight_settings(opened, "none", "float32")), opened.run))
    hidden = jax.jit(type(model).hidden)(model, jnp.asarray(tokens))
    return opened.run, np.asarray(model.head.logits(hidden)).reshape(*tokens.shape, -1)
