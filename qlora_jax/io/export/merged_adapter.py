"""Merges low-rank adapters of one base into a new one.

Dimension key: L layers, E experts, K in, N out, R rank.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from qlora_jax.config import LoraArgs
from qlora_jax.config.adapter_merges import AdapterMergeArgs
from qlora_jax.config.methods import METHODS
from qlora_jax.io.export.adapter_arithmetic import Product, Truncated, add, merge_sparse, truncate, truncate_matrices
from qlora_jax.io.loading.base_fingerprint import same_form
from qlora_jax.io.loading.progress import MERGING, StageProgress
from qlora_jax.io.pretrained import OpenedModel
from qlora_jax.io.run_folder.checkpoint import Run
from qlora_jax.methods.peft_experts import entries_of
from qlora_jax.methods.peft_names import linears_of, target_settings
from qlora_jax.methods.targets import (
    Layers,
    adapter_layers,
    parameter_ranks_and_scalings,
    ranks_and_scalings,
    some_layers,
)
from qlora_jax.models.partition import is_table


class MergedAdapter(NamedTuple):
    """A merged adapter, the same before its rank was reduced, and the share of the Frobenius norm that it keeps."""

    run: Run
    whole: Run
    kept: float


def merge_problems(adapters: Sequence[OpenedModel]) -> list[str]:
    """Lists why adapters cannot be merged: parts that are not products of two matrices, and different bases."""
    return [problem for one in adapters for problem in (*_own_problems(one), *_base_problems(one, adapters[0]))]


def run_of(opened: OpenedModel) -> Run:
    """Returns the run of a finetuned model."""
    assert opened.run is not None, "`open_finetuned` opened it"
    return opened.run


def _own_problems(opened: OpenedModel) -> list[str]:
    run = run_of(opened)
    method, init, merge_into = run.lora_args.method, run.lora_args.init, run.lora_args.merge_into
    tables = sorted({*filter(is_table, run.lora), *run.tables})
    fix = f"Merge it into a model: qlora-jax export --run {run.path} --format hf"
    problems = {
        f"lora.method={method} is not only a product of two matrices per weight ({METHODS[method].summary}), so that "
        f"changes cannot be added. {fix}": (METHODS[method].stored_as or method) != "lora",
        f"lora.init={init} moved a part of the base's weights into the adapter. Export it with --format peft, and "
        "merge that": run.initial is not None,
        f"lora.merge_into={merge_into} trained the base and the adapter merged and rounded, so the adapter alone is "
        f"not the model. Export it: qlora-jax export --run {run.path}": merge_into,
        f"rows or whole tables of tokens cannot be merged (found {', '.join(tables)}). {fix}": tables,
        "a sequence head cannot be merged (found head.json). Use the run itself": run.head is not None,
    }
    return [f"{run.path}: {problem}" for problem, found in problems.items() if found]


def _base_problems(opened: OpenedModel, first: OpenedModel) -> list[str]:
    run, other = run_of(opened), run_of(first)
    found, expected = run.fingerprint, other.fingerprint
    if not (found and expected and same_form(found, expected)):
        found, expected = (str(one.source.path.resolve()) for one in (opened, first))
    if found == expected:
        return []
    return [
        f"{run.path}: its base, as it was quantized, is not that of {other.path} (found {found}, expected {expected}). "
        "Merge adapters of one base; if only its place or quantization differs, merge their exports of --format peft, "
        "with --model"
    ]


def merge(
    adapters: Sequence[OpenedModel], weights: Sequence[float], settings: AdapterMergeArgs, progress: StageProgress
) -> MergedAdapter:
    """Merges adapters; modules and layers that some of them lack are zero there.

    Args:
      adapters: without `merge_problems`.
    """
    rng = np.random.default_rng(settings.seed)
    terms = [_terms(opened) for opened in adapters]
    layers_of: dict[str, Layers] = {}
    whole: dict[str, Product] = {}
    found: dict[str, Truncated] = {}
    names = list(dict.fromkeys(name for one in terms for name in one))
    for done, name in enumerate(names):
        progress(done, len(names), name, MERGING)
        layered = [one[name] for one in terms if name in one]
        layers_of[name] = tuple(sorted({layer for layers, _ in layered for layer in layers}))
        products = _aligned(layered, layers_of[name])
        present = [weight for one, weight in zip(terms, weights, strict=True) if name in one]
        rank = settings.rank or sum(product.rank for product in products)
        if settings.density is None:
            whole[name] = add(products, present)
            found[name] = truncate(whole[name], rank)
        else:
            change = merge_sparse(products, present, settings.method, settings.density, rng)
            whole[name], found[name] = _as_product(change), truncate_matrices(change, rank)
    kept, norm = (sum(getattr(each, part) for each in found.values()) for part in ("kept", "whole"))
    result = {name: each.product for name, each in found.items()}
    run, of_full_rank = (_as_run(adapters[0], products, layers_of) for products in (result, whole))
    return MergedAdapter(run, of_full_rank, math.sqrt(kept / norm) if norm else 1.0)


type Layered = tuple[Layers, Product]  # a product, and the layers of its first axis


def _terms(opened: OpenedModel) -> dict[str, Layered]:
    """Returns the scaled changes of one adapter by our names."""
    run, features = run_of(opened), opened.features
    layers_of = adapter_layers(features, run.lora_args)
    ranked = ranks_and_scalings(features, run.lora_args) | parameter_ranks_and_scalings(features, run.lora_args)
    terms = {}
    for name, leaves in run.lora.items():
        named = features.hugging_face_name(name)
        a, b = (np.asarray(leaves[leaf], np.float32) for leaf in ("lora_a", "lora_b"))
        terms[name] = layers_of[named], Product(a, np.float32(ranked[named][1]) * b)
    return terms


def _aligned(layered: Sequence[Layered], layers: Layers) -> list[Product]:
    """Returns products on the same layers, zero where one has none, and the same experts, also where they share one."""
    experts = np.broadcast_shapes(*(product.a.shape[1:-2] for _, product in layered))

    def align(own: Layers, factor: np.ndarray) -> np.ndarray:
        wide = np.zeros((len(layers), *experts, *factor.shape[-2:]), np.float32)
        wide[[layers.index(layer) for layer in own]] = factor
        return wide

    return [Product(*(align(own, factor) for factor in product)) for own, product in layered]


def _as_product(change: np.ndarray) -> Product:
    """Returns a change as a product with the identity on its shorter side."""
    size = min(change.shape[-2:])
    identity = np.broadcast_to(np.eye(size, dtype=np.float32), (*change.shape[:-2], size, size))
    return Product(identity, change) if change.shape[-2] == size else Product(change, identity)


def _as_run(first: OpenedModel, products: Mapping[str, Product], layers_of: Mapping[str, Layers]) -> Run:
    """Returns a run with these products as its adapter, with one alpha, because not every program reads several.

    A module of a smaller rank is scaled by more than 1, which its B makes up for.
    """
    features = first.features
    names, linears = {name: features.hugging_face_name(name) for name in products}, linears_of(features)
    every = {names[name]: layers for name, layers in layers_of.items()}
    modules = [name for name in every if name in linears]
    top = max(product.rank for product in products.values())
    ranks = {names[name].partition(".layers.")[2]: product.rank for name, product in products.items()}
    args = LoraArgs(
        rank=top,
        alpha=float(top),
        **target_settings(modules, linears, some_layers(every, features.num_layers)),
        target_parameters=entries_of([name for name in every if name not in modules], every, features),
        rank_pattern={re.escape(name): rank for name, rank in ranks.items() if rank != top},
    )
    lora = {name: {"lora_a": a, "lora_b": b * np.float32(a.shape[-1] / top)} for name, (a, b) in products.items()}
    return dataclasses.replace(run_of(first), lora=lora, lora_args=args)
