"""Stacks the tensors of a PEFT adapter's layers.

Dimension key: L layers, K in, R rank, N out.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from qlora_jax.io.peft.writer import EVERY_LAYER, LEAVES, PREFIX, VECTOR, SomeLayers
from qlora_jax.model_source import TensorEntry
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.tensor_names import EXPERT, LAYER, MAX_LINES, layer_name

WEIGHTS = "adapter_model.safetensors"
MATRICES = ("lora_a", "lora_b")
LEAVES_OF_METHOD = {
    "lora": MATRICES,
    "dora": (*MATRICES, "magnitude"),
    "ia3": ("vector",),
    "oft": ("oft_r",),
    "vera": ("lambda_b", "lambda_d"),
}
LEAF_NAMES = {ours: theirs for ours, (theirs, _) in LEAVES.items()} | {"vector": VECTOR}
OURS = {theirs: ours for ours, theirs in LEAF_NAMES.items()}
KEY = re.compile(rf"{re.escape(PREFIX)}(?P<module>.+)\.(?P<leaf>{'|'.join(map(re.escape, OURS))})")

NOT_LINEAR = "not a linear layer of the model, or unexpected in an adapter of this method"
PER_EXPERT = "an adapter per expert, as of transformers 4. Load it with PEFT under transformers 5 and save it again"


def stack_layers(
    folder: Path,
    entries: list[TensorEntry],
    model: ModelConfig,
    leaves: Sequence[str],
    wrong_tables: list[str],
    some_layers: SomeLayers = EVERY_LAYER,
    *,
    given: bool = False,
) -> dict[str, dict[str, np.ndarray]]:
    """Stacks the layers of each projection into f32 arrays in our orientation.

    Args:
      leaves: our names of the leaves that the adapter's method has.
      wrong_tables: problems of embedding and head, which are reported together with those found here.
      some_layers: by our names, the layers with an adapter, for projections that have one only in some layers.
      given: True if the adapter has parameters beside projections, so that it may have no projections.

    Raises:
      ValueError: tensors do not fit the model; all problems are named.
    """
    matches = {entry.name: KEY.fullmatch(entry.name) for entry in entries}
    by_key = {(match["module"], OURS[match["leaf"]]): e for e in entries if (match := matches[e.name])}
    problems = wrong_tables + [
        f"{name}: unexpected in an adapter of this method" for name, match in matches.items() if not match
    ]
    lora: dict[str, dict[str, np.ndarray]] = {}
    for inner, (shape, _) in model.linear_shapes().items():
        name = f"model.layers.{inner}"
        numbers = model.layers_with(inner)
        modules = [model.hugging_face_name(layer_name(name, layer)) for layer in numbers]
        found = {leaf: [by_key.pop((module, leaf), None) for module in modules] for leaf in leaves}
        if any(entry is not None for entries in found.values() for entry in entries):
            rows = [numbers.index(layer) for layer in some_layers.get(name, numbers)]
            problems += _not_targeted(modules, found, rows)
            modules = [modules[row] for row in rows]
            found = {leaf: [entries[row] for row in rows] for leaf, entries in found.items()}
            problems += (wrong := _problems(modules, found, shape))
            lora[name] = {} if wrong else {leaf: _stack(leaf, found[leaf]) for leaf in leaves}
    problems += _unknown(by_key)
    check_fits(folder, problems or ([] if lora or given else ["it has no tensor of an adapter"]))
    return lora


def _unknown(left: Iterable[tuple[str, str]]) -> list[str]:
    """Describes tensors (module, leaf) that fit no projection, one line for the same one in all layers and experts."""
    places = {(EXPERT.sub(".experts.*.", LAYER.sub(".layers.*.", module)), leaf) for module, leaf in left}
    return [
        f"{module}.{LEAF_NAMES[leaf]}: {PER_EXPERT if '.experts.*.' in module else NOT_LINEAR}"
        for module, leaf in sorted(places)
    ]


def check_fits(folder: Path, problems: Sequence[str]) -> None:
    """Raises ValueError with all problems of an adapter's tensors, if there are any; many lines are counted."""
    if problems:
        more = [f"and {len(problems) - MAX_LINES} more"] if len(problems) > MAX_LINES else []
        lines = "\n  ".join([*problems[:MAX_LINES], *more])
        raise ValueError(f"{folder / WEIGHTS} does not fit the model:\n  {lines}")


Found = Mapping[str, Sequence[TensorEntry | None]]  # the entry of each layer, by our name of the leaf


def _not_targeted(modules: list[str], found: Found, rows: Sequence[int]) -> list[str]:
    """Reports layers that have tensors although PEFT's settings do not target them."""
    return [
        f"{module}: unexpected, because the adapter's settings do not target this layer"
        for row, module in enumerate(modules)
        if row not in rows and any(entries[row] is not None for entries in found.values())
    ]


def _problems(modules: list[str], found: Found, shape: tuple[int, int]) -> list[str]:
    if not modules:
        return ["target_modules, exclude_modules, layers_to_transform: together they target no layer of the model"]
    missing = [
        f"{module}.{LEAF_NAMES[leaf]}: missing, but the adapter's settings target this layer"
        for leaf, entries in found.items()
        for module, entry in zip(modules, entries, strict=True)
        if entry is None
    ]
    if missing:
        return missing
    name = LAYER.sub(".layers.*.", modules[0])
    first = {leaf: entries[0].shape for leaf, entries in found.items() if entries[0] is not None}
    ranks = {entry.shape[0] for entry in found.get("lora_a", ()) if entry is not None}
    if len(ranks) > 1:
        return [f"{name}: its layers have different ranks (found {sorted(ranks)}), which is not supported"]
    expected = _expected(first, shape)
    return [
        f"{entry.name}: shape {list(entry.shape)}, expected {list(expected[leaf])}"
        for leaf, entries in found.items()
        for entry in entries
        if entry is not None and entry.shape != expected[leaf]
    ]


def _expected(first: Mapping[str, tuple[int, ...]], shape: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """The expected shapes, given those of the first layer."""
    n, k = shape
    if "lambda_b" in first or "oft_r" in first:
        return {**first, "lambda_b": (n,)}
    if "vector" in first:
        return {"vector": (1, k) if first["vector"] == (1, k) else (n, 1)}
    rank = first["lora_a"][0]
    return {"lora_a": (rank, k), "lora_b": (n, rank), "magnitude": (n,)}


def _stack(leaf: str, entries: Sequence[TensorEntry | None]) -> np.ndarray:
    arrays = [np.asarray(entry.read(), np.float32) for entry in entries if entry is not None]
    return np.stack([array.T if leaf in MATRICES else array for array in arrays])
