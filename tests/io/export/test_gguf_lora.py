"""A LoRA for llama.cpp: alpha / rank * B A of the file is what the adapter adds to the weight in the base's file."""

from pathlib import Path

import jax
import numpy as np
import pytest

from qlora_jax.config import LoraArgs, ModelArgs
from qlora_jax.io.export.gguf_lora import by_layer, check_plain, lora_spec, lora_tensors, shared_alpha
from qlora_jax.io.export.gguf_metadata import spec_from_folder
from qlora_jax.io.gguf.header import parse_header
from qlora_jax.io.gguf.writer import write_gguf
from qlora_jax.io.pretrained import open_pretrained
from qlora_jax.io.run_folder.checkpoint import Run
from qlora_jax.methods.lora import effective_alphas
from qlora_jax.models.tensor_names import layer_name
from tests.io.gguf_families import FAMILIES, converted, random_tensors
from tests.io.tiny_models import tokenizer_json, write_folder

MODULES = {
    "llama": ["self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"],
    "gptneox": ["attention.query_key_value", "mlp.dense_4h_to_h"],
    "phi3": ["self_attn.qkv_proj", "mlp.gate_up_proj"],
}
SETTINGS = {
    "one alpha": LoraArgs(rank=4, alpha=6.0, rank_pattern={"mlp.*": 3}),
    "alphas": LoraArgs(rank=4, alpha=6.0, alpha_pattern={"down_proj": 9.0, ".*qkv.*": 2.5}),
    "rslora": LoraArgs(rank=4, alpha=6.0, use_rslora=True, rank_pattern={"mlp.*": 9}),
}


def _lora(config: dict, layers: str, modules: list[str], args: LoraArgs, shapes: dict) -> dict[str, dict]:
    rng, lora = np.random.default_rng(0), {}
    for module in modules:
        name, rank = f"{layers}.{module}", next(iter(args.rank_pattern.values()), 4) if "mlp" in module else 4
        n, k = shapes[layer_name(f"{name}.weight", 0)]
        depth = config["num_hidden_layers"]
        lora[name] = {"lora_a": rng.normal(size=(depth, k, rank)), "lora_b": rng.normal(size=(depth, rank, n))}
    return lora


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", MODULES)
def test_it_adds_what_the_adapter_adds(tmp_path: Path, name: str, settings: str) -> None:
    architecture, config = FAMILIES[name]
    args, tensors = SETTINGS[settings], random_tensors(config)
    shapes = {tensor: values.shape for tensor, values in tensors.items()}
    model = write_folder(tmp_path / "model", config, tensors, **{"tokenizer.json": tokenizer_json()})
    opened = open_pretrained(model=str(model))
    layers = "gpt_neox.layers" if name == "gptneox" else "model.layers"
    lora = _lora(config, layers, MODULES[name], args, shapes)
    scaled = shared_alpha(effective_alphas(lora, args))
    layers_of = dict.fromkeys(lora, range(opened.features.num_layers))
    layers = list(by_layer(lora, scaled.factors, layers_of, opened.features))
    spec = lora_spec(spec_from_folder(opened.source, opened.features, shapes), layers, scaled.alpha)
    path = tmp_path / "adapter.gguf"
    write_gguf(path, spec, list(spec.tensors), lora_tensors(layers), "float32")
    header = parse_header(path)
    keys = header.metadata
    assert (keys["general.type"], keys["adapter.type"], keys["general.architecture"]) == (
        "adapter",
        "lora",
        architecture,
    )
    stored = {i.name: (np.fromfile(path, np.float32, i.nbytes // 4, offset=i.offset), i.shape) for i in header.tensors}
    found = {tensor: values.reshape(shape) for tensor, (values, shape) in stored.items()}
    assert len(found) == 2 * config["num_hidden_layers"] * len(lora)
    for module, matrices in lora.items():
        for layer in range(config["num_hidden_layers"]):
            weight = layer_name(f"{module}.weight", layer)
            there = opened_name(name, weight)
            a, b = found[f"{there}.lora_a"], found[f"{there}.lora_b"]
            rank = a.shape[0]
            alpha = next((v for k, v in args.alpha_pattern.items() if k.strip(".*") in module), args.alpha)
            scaling = alpha / (rank**0.5 if args.use_rslora else rank)
            delta = scaling * (matrices["lora_a"][layer] @ matrices["lora_b"][layer]).T
            expected = converted(architecture, config, weight, delta)
            np.testing.assert_allclose(keys["adapter.lora.alpha"] / rank * b @ a, expected, rtol=1e-4, atol=1e-5)


def opened_name(name: str, weight: str) -> str:
    parts = {
        "q_proj": "attn_q", "k_proj": "attn_k", "down_proj": "ffn_down", "query_key_value": "attn_qkv",
        "dense_4h_to_h": "ffn_down", "qkv_proj": "attn_qkv", "gate_up_proj": "ffn_up",
    }  # fmt: skip
    *_, layer, _, part, leaf = weight.split(".")
    return f"blk.{layer}.{parts[part]}.{leaf}"


def test_alphas_that_all_modules_share_leave_b_as_it_is() -> None:
    assert shared_alpha({"a": 6.0, "b": 6.0, "c": 9.0}) == (6.0, {"a": 1.0, "b": 1.0, "c": 1.5})


def test_another_adapter_is_refused(tmp_path: Path) -> None:
    leaf = np.zeros((2, 4, 4))
    lora = {"model.layers.q": {"lora_a": leaf, "lora_b": leaf, "magnitude": leaf}, "model.layers.v": {"vector": leaf}}
    run = Run(
        path=tmp_path / "run",
        model=ModelArgs(path="x"),
        lora_args=LoraArgs(),
        chat_template=None,
        step=3,
        lora=jax.tree.map(np.asarray, lora),
        fingerprint=None,
    )
    with pytest.raises(
        ValueError, match=r"run, step 3 is not a plain LoRA.*layers.q: \[.*'magnitude'\]; .*v: \['vector'\]"
    ):
        check_plain(run, lora)
