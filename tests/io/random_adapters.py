"""PEFT adapters with random matrices on disk, and the changes of weights that they make."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from qlora_jax.config import LoraArgs
from qlora_jax.config.adapter_merges import AdapterMergeArgs
from qlora_jax.io.export.merged_adapter import MergedAdapter, merge
from qlora_jax.io.export.peft import export_peft
from qlora_jax.io.open_model import open_model
from qlora_jax.io.peft.reader import read_adapter
from qlora_jax.io.peft.writer import in_peft_format, write_adapter
from qlora_jax.io.pretrained import open_finetuned
from qlora_jax.methods.expert_lora import parameter_shapes
from qlora_jax.methods.targets import adapter_layers, parameter_ranks_and_scalings, ranks_and_scalings
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families import model_config

Changes = dict[str, np.ndarray]  # {"model.layers.self_attn.q_proj": [layers of the model, K, N]}


def features_of(base: Path) -> ModelConfig:
    source = open_model(base)
    return model_config(source.config, source.config_name)


def write_random_adapter(folder: Path, base: Path, args: LoraArgs, seed: int) -> Path:
    """Writes an adapter with normal A and B into a new folder."""
    features, rng = features_of(base), np.random.default_rng(seed)
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, int]]] = {
        features.hugging_face_name(f"model.layers.{name}"): ((), shape)
        for name, (shape, _) in features.linear_shapes().items()
    }
    for name, (inner, shape) in parameter_shapes(features).items():
        assert features.experts is not None
        count = 1 if args.share_experts else features.experts.count
        shapes[name] = (count,) if inner.startswith("mlp.experts") else (), shape
    layers, lora = adapter_layers(features, args), {}
    ranked = ranks_and_scalings(features, args) | parameter_ranks_and_scalings(features, args)
    for name, (rank, _) in ranked.items():
        lead, (n, k) = (len(layers[name]), *shapes[name][0]), shapes[name][1]
        a, b = (rng.normal(0, 0.05, (*lead, *shape)).astype("f4") for shape in ((k, rank), (rank, n)))
        lora[name] = {"lora_a": a, "lora_b": b}
    config, tensors = in_peft_format(lora, args, features, str(base))
    folder.mkdir(parents=True)
    write_adapter(folder, tensors, config)
    return folder


def write_merge(folder: Path, adapters: list[Path], weights: list[float], **settings: Any) -> MergedAdapter:
    """Merges adapters and writes the result, without its logits."""
    opened = [open_finetuned(each) for each in adapters]
    merged = merge(opened, weights, AdapterMergeArgs(run=["unused"], output="unused", **settings), lambda *done: None)
    export_peft(dataclasses.replace(opened[0], run=merged.run), folder)
    return merged


def changes_in(folder: Path, base: Path) -> Changes:
    """Returns scaling * A B of each module that an adapter has, zero in layers that it lacks, by our names."""
    features = features_of(base)
    adapter = read_adapter(folder, features)
    layers = adapter_layers(features, adapter.args)
    ranked = ranks_and_scalings(features, adapter.args) | parameter_ranks_and_scalings(features, adapter.args)
    found = {}
    for name, leaves in adapter.lora.items():
        named = features.hugging_face_name(name)
        product = leaves["lora_a"].astype("f8") @ leaves["lora_b"].astype("f8") * ranked[named][1]
        found[name] = np.zeros((features.num_layers, *product.shape[1:]))
        found[name][list(layers[named])] = product
    return found


def weighted(changes: list[Changes], weights: list[float]) -> Changes:
    """Returns the weighted sum; a module that an adapter lacks counts as zero."""
    found: Changes = {}
    for name in {name for one in changes for name in one}:
        terms = [weight * one[name] for one, weight in zip(changes, weights, strict=True) if name in one]
        found[name] = np.asarray(np.sum(terms, axis=0))
    return found


def assert_close(found: Changes, expected: Changes, atol: float) -> None:
    assert found.keys() == expected.keys()
    for name, change in expected.items():
        np.testing.assert_allclose(found[name], change, rtol=0, atol=atol, err_msg=name)
