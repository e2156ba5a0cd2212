"""Opens the 16-bit model that a run's base was quantized from, and checks that it gives exactly the trained weights."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from pallas_kernels.formats.ggml_tensor import GgmlTensor
from pallas_kernels.formats.layouts import repack
from pallas_kernels.formats.qtensor import QTensor
from qlora_jax.io.hf.model_writer import dense_tensors
from qlora_jax.io.loading.loader import read_quantized
from qlora_jax.io.open_model import open_model
from qlora_jax.io.pretrained import OpenedModel
from qlora_jax.io.tensor_map import Slot, check_tensors, tensor_shapes
from qlora_jax.model_source import ModelSource
from qlora_jax.models.config_differences import config_differences
from qlora_jax.models.families import model_config
from qlora_jax.models.tensor_names import lines_by_layer
from qlora_jax.quant import dequantize


def open_original(path: str, opened: OpenedModel) -> ModelSource:
    """Opens the model at `path`, and checks its features and tensors against those of the run's base.

    Raises:
      ValueError: its features differ (all are named), its tensors do not fit, or its weights are quantized.
    """
    source = open_model(path)
    if differences := config_differences(opened.features, model_config(source.config, source.config_name)):
        lines = "\n  ".join(f"{name} = {theirs}, the run's base has {ours}" for name, ours, theirs in differences)
        raise ValueError(f"{source.path} is another model than the run's base:\n  {lines}")
    check_tensors(source, tensor_shapes(opened.features), opened.features)
    if quantized := [name for name, entry in source.tensors.items() if entry.read_quantized]:
        raise ValueError(
            f"{source.path}: {len(quantized)} tensors are quantized, such as {quantized[0]}, but --base requires the "
            "model in 16 bits. Give the model that the quantized one was made from"
        )
    return source


def check_original(source: ModelSource, slots: Sequence[Slot], compute_dtype: np.dtype) -> None:
    """Checks that a model, quantized like the run's base, gives the weights that the run was trained on.

    Args:
      slots: the slots of the run's base.
      compute_dtype: the dtype that training computed in.

    Raises:
      ValueError: names the tensors that differ, or the run's base has codes that this program did not make.
    """
    if any(isinstance(slot.quantization_of(index), GgmlTensor) for slot in slots for index in range(len(slot.names))):
        raise ValueError(
            f"{source.path}: --base cannot be compared with the run's base, which keeps the codes of a file "
            "(model.quant_type=stored). Export without --base; for a GGUF file, --format gguf-lora needs none"
        )
    trained = dense_tensors(slots, compute_dtype, {})
    pairs = zip(_as_trained(source, slots, compute_dtype), trained, strict=True)
    wrong = [name for (name, theirs), ours in pairs if not np.array_equal(theirs, np.asarray(ours))]
    if wrong:
        lines = "\n  ".join(lines_by_layer("other values", wrong))
        raise ValueError(
            f"{source.path} is not what the run's base was quantized from: {len(wrong)} tensors differ from those of "
            "training after they are quantized. Give the exact model that the run, or the quantized base of the run, "
            f"was made from:\n  {lines}"
        )


def _as_trained(
    source: ModelSource, slots: Sequence[Slot], compute_dtype: np.dtype
) -> Iterator[tuple[str, np.ndarray]]:
    for slot in slots:
        for index, name in enumerate(slot.names):
            entry = source.tensors[name]
            if isinstance(spec := slot.quantization_of(index), QTensor):
                layer = dataclasses.replace(read_quantized(source, entry, spec), dtype=spec.dtype)
                yield name, np.asarray(dequantize(repack(layer, spec.layout), compute_dtype))
            else:
                yield name, entry.read().astype(slot.dtype)
