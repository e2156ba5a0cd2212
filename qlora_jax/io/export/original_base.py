"""The 16-bit model that a run's base was quantized from: whether it is that, to the bit of what training saw."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from pallas_kernels.formats.layouts import repack
from qlora_jax.io.config_diff import differing
from qlora_jax.io.hf.model_writer import dense_tensors
from qlora_jax.io.loader import quantized
from qlora_jax.io.model_source import ModelSource
from qlora_jax.io.open_model import open_model
from qlora_jax.io.pretrained import OpenedModel
from qlora_jax.io.tensor_map import Slot, check_inventory, grouped, shapes_of
from qlora_jax.models.families import model_config
from qlora_jax.quant import dequantize


def open_original(path: str, opened: OpenedModel) -> ModelSource:
    """The model at `path`, which has the features of the run's base, and its tensors.

    Raises:
      ValueError: it has others, all of them at once, or its weights are quantized.
    """
    source = open_model(path)
    if other := differing(opened.features, model_config(source.config)):
        lines = "\n  ".join(f"{name} = {its}, the run's base has {ours}" for name, ours, its in other)
        raise ValueError(f"{source.path} is another model than the run's base:\n  {lines}")
    check_inventory(source, shapes_of(opened.features), opened.features)
    if held := [name for name, entry in source.tensors.items() if entry.held]:
        raise ValueError(
            f"{source.path}: {len(held)} tensors are quantized, such as {held[0]}: --base takes the model in 16 bits"
        )
    return source


def check_original(source: ModelSource, slots: Sequence[Slot], computed: np.dtype) -> None:
    """Passes a model whose tensors, quantized as the run's base is, give the weights that the run was trained on.

    Args:
      slots: of the run's base.
      computed: the dtype that training computed in.

    Raises:
      ValueError: names the tensors that do not.
    """
    trained = dense_tensors(slots, computed, {})
    pairs = zip(_as_trained(source, slots, computed), trained, strict=True)
    wrong = [name for (name, its), ours in pairs if not np.array_equal(its, np.asarray(ours))]
    if wrong:
        lines = "\n  ".join(grouped("other values", wrong))
        raise ValueError(
            f"{source.path} is not what the run's base was quantized from: {len(wrong)} tensors, quantized as that is, "
            "are not those of training. Give the very model that the run, or the quantized base of the run, was made "
            f"from:\n  {lines}"
        )


def _as_trained(source: ModelSource, slots: Sequence[Slot], computed: np.dtype) -> Iterator[tuple[str, np.ndarray]]:
    for slot in slots:
        for index, name in enumerate(slot.names):
            entry = source.tensors[name]
            if spec := slot.quantized_as(index):
                layer = dataclasses.replace(quantized(source, entry, spec), dtype=spec.dtype)
                yield name, np.asarray(dequantize(repack(layer, spec.layout), computed))
            else:
                yield name, entry.read().astype(slot.dtype)
