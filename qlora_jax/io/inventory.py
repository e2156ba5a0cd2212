"""Compares the tensors that a model needs with those on disk, and tells every difference at once."""

import re
from collections.abc import Iterable, Mapping

import numpy as np

from qlora_jax.io.entries import ModelSource
from qlora_jax.models.config import ModelConfig

LAYER = re.compile(r"\.layers\.(\d+)\.")


def layer_name(stacked: str, layer: int) -> str:
    """("model.layers.mlp.up_proj.weight", 3) -> "model.layers.3.mlp.up_proj.weight"."""
    return stacked.replace(".layers.", f".layers.{layer}.", 1)


def check_inventory(source: ModelSource, needed: Mapping[str, tuple[int, ...]], config: ModelConfig) -> None:
    """Passes a source that holds exactly the tensors needed, in their shapes.

    A head equal to the embedding it is tied to may be there too.

    Raises:
      ValueError: names all missing, unexpected and mis-shaped tensors.
    """
    held = source.tensors
    extra = set(held.keys() - needed.keys())
    head, embedding = (config.hugging_face_name(f"{name}.weight") for name in ("lm_head", "model.embed_tokens"))
    if config.tie_embeddings and head in extra and _equal_tensors(source, head, embedding):
        extra.remove(head)
    problems = grouped("missing", needed.keys() - held.keys()) + grouped("unexpected", extra)
    problems += [
        f"shape {list(held[name].shape)} of {name}, expected {list(shape)}"
        for name, shape in needed.items()
        if name in held and held[name].shape != shape
    ]
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise ValueError(f"{source.path}: the tensors do not fit the model that its config describes:\n{lines}")


def _equal_tensors(source: ModelSource, first: str, second: str) -> bool:
    held = source.tensors
    if second not in held or held[first].shape != held[second].shape:
        return False
    return np.array_equal(held[first].read(), held[second].read())


def grouped(what: str, names: Iterable[str]) -> list[str]:
    """One line for the same tensor in many layers."""
    layers: dict[str, list[int]] = {}
    for name in names:
        match = LAYER.search(name)
        group = layers.setdefault(LAYER.sub(".layers.*.", name, count=1), [])
        if match:
            group.append(int(match[1]))
    return [
        f"{what}: {name}" + (f" in layers {', '.join(map(str, sorted(found)))}" if found else "")
        for name, found in sorted(layers.items())
    ]
