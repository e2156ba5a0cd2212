"""The 16-bit model that a run's base was quantized from: checked to give the trained weights; and adapters for it.

Dimension key: L layers, K in, R rank, N out.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from pallas_kernels.formats.ggml_blocks import nvfp4_type
from pallas_kernels.formats.ggml_tensor import GgmlTensor
from pallas_kernels.formats.layouts import repack
from qlora_jax.config import LoraArgs
from qlora_jax.io.hf.model_writer import dense_tensors
from qlora_jax.io.initial_file import InitialAdapter
from qlora_jax.io.loading.loader import read_quantized
from qlora_jax.io.open_model import open_model
from qlora_jax.io.pretrained import OpenedModel
from qlora_jax.io.run_folder.checkpoint import Run
from qlora_jax.io.tensor_map import Slot, check_tensors, tensor_shapes
from qlora_jax.methods.method import Factors
from qlora_jax.model_source import ModelSource
from qlora_jax.models.config import config_differences
from qlora_jax.models.families import model_config
from qlora_jax.models.tensor_names import lines_by_layer
from qlora_jax.nn.frozen_weight import dense_weight
from qlora_jax.quant import dequantize
from qlora_jax.quant.nvfp4 import nvfp4_blocks_of


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
    specs = [slot.quantization_of(index) for slot in slots for index in range(len(slot.names))]
    if any(isinstance(spec, GgmlTensor) and spec.ggml_type != nvfp4_type(spec.shape[1], True) for spec in specs):
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
            spec = slot.quantization_of(index)
            if isinstance(spec, GgmlTensor):
                blocks = nvfp4_blocks_of(entry.read(), spec.ggml_type)
                yield name, np.asarray(dense_weight(dataclasses.replace(spec, codes=blocks), compute_dtype))
            elif spec is not None:
                layer = dataclasses.replace(read_quantized(source, entry, spec), dtype=spec.dtype)
                yield name, np.asarray(dequantize(repack(layer, spec.layout), compute_dtype))
            else:
                yield name, entry.read().astype(slot.dtype)


NOTE = (
    "lora.init={}: this is a LoRA of twice the rank over the original 16-bit model. It does not contain the "
    "quantization error of training, so logits differ from the run's by that error; --with_base writes the base that "
    "was trained on, over which the adapter with its original rank computes exactly what the run did"
)


class ExportedAdapter(NamedTuple):
    """An adapter to export.

    Attributes:
      lora: LoRA parameters by our names.
      args: settings with which PEFT and `attach_method` give these parameters the scalings of training.
      notes: lines for users of the adapter.
    """

    lora: Factors
    args: LoraArgs
    notes: list[str]


def adapter_for_export(run: Run, with_base: bool) -> ExportedAdapter:
    """The run's adapter for the base that users will have: the one of training, or the original model."""
    if run.initial is None or with_base:
        return ExportedAdapter(run.lora, run.lora_args, [])
    return ExportedAdapter(
        *relative_to_original(run.lora, run.lora_args, run.initial), [NOTE.format(run.lora_args.init)]
    )


def relative_to_original(lora: Factors, args: LoraArgs, initial: InitialAdapter) -> tuple[Factors, LoraArgs]:
    """The adapter over the original model, of twice the rank: A next to the initial A, B next to minus the initial B.

    It computes W + s (A B - A0 B0), where training computed Q(W - subtracted) + s A B. The difference is the
    quantization error of the rest (PiSSA), or the part of it that A0 and B0 did not compensate (LoftQ). The method is
    PEFT's subtract_mutated_init.

    Returns:
      (LoRA parameters, settings).
    """
    doubled = {
        name: {
            **leaves,
            "lora_a": np.concatenate([leaves["lora_a"], initial.factors[name]["lora_a"]], axis=2),
            "lora_b": np.concatenate([leaves["lora_b"], -initial.factors[name]["lora_b"]], axis=1),
        }
        if name in initial.factors
        else leaves  # rows of new tokens
        for name, leaves in lora.items()
    }
    larger = 2**0.5 if args.use_rslora else 2  # times alpha, so that the scalings stay the same
    plain = LoraArgs()
    changed = dataclasses.replace(
        args,
        init="default",
        svd_niter=plain.svd_niter,
        loftq_iterations=plain.loftq_iterations,
        rank=2 * args.rank,
        alpha=larger * args.alpha,
        rank_pattern={name: 2 * rank for name, rank in args.rank_pattern.items()},
        alpha_pattern={name: larger * alpha for name, alpha in args.alpha_pattern.items()},
    )
    return doubled, changed
