"""`measure_quantization`: measures the cost of 4 bits for each layer of a model, and chooses layers for 16 bits."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

from qlora_jax.config import ModelArgs
from qlora_jax.config.sizes import parse_bytes
from qlora_jax.data.readers.files import stream_rows
from qlora_jax.evaluation.quantization_cost.choose import choose_layers, spare_bytes
from qlora_jax.evaluation.quantization_cost.files import Measured
from qlora_jax.evaluation.quantization_cost.measure import Progress, measure_layers
from qlora_jax.evaluation.tasks.rows import rows_task
from qlora_jax.inference.result_cache import NO_CACHE
from qlora_jax.io.pretrained import OpenedModel, load_base, open_base
from qlora_jax.measures.metrics import RowScores
from qlora_jax.models.config import WeightFormat
from qlora_jax.models.decoder import CausalLM, bytes_of
from qlora_jax.models.partition import ModelParts, partition
from qlora_jax.models.precision import full_names, names_of
from qlora_jax.progress_reporter import ProgressReporter

Dtype = Literal["bfloat16", "float16", "float32"]


def measure_quantization(
    path: str,
    rows: str,
    *,
    quant_type: Literal["nf4", "fp4"] = "nf4",
    double_quant: bool = True,
    dtype: Dtype = "bfloat16",
    budget: str | None = None,
    max_rows: int | None = None,
    compute_dtype: Literal["auto", "bfloat16", "float32"] = "float32",
    reporter: ProgressReporter | None = None,
    progress: Progress = lambda done, total, name: None,
) -> Measured:
    """Measures what 4 bits cost each layer of each projection: the increase of the loss on rows.

    Each takes one evaluation of the rows, with that layer in 4 bits and all else in 16. Memory holds the model in 16
    bits.

    Args:
      path: a Hugging Face folder, a GGUF file, or org/name on the Hub.
      rows: file in a format of training data; the tokens that training would learn are scored.
      quant_type: 4-bit data type.
      double_quant: quantize the scales too.
      dtype: dtype of layers in 16 bits, for their bytes.
      budget: bytes of the base, such as 6GiB: also chooses the layers that stay in 16 bits, and measures the choice.
      max_rows: use only the first rows; None: all.
      compute_dtype: dtype of the matmuls.
      reporter: receives messages; None: nobody does.
      progress: called after each evaluation.

    Raises:
      ValueError: files are missing, damaged or not supported, the model is in 4 bits already, or the budget is too
        small.
    """
    reporter = reporter or ProgressReporter()
    args = ModelArgs(path=path, quant_type=quant_type, double_quant=double_quant, compute_dtype=compute_dtype)
    next(stream_rows(rows), None)  # before the model is fetched: does the file exist
    opened = open_base(args)
    if any(entry.read_quantized for entry in opened.source.tensors.values()):
        raise ValueError(
            f"{opened.source.path}: already in 4 bits, so the loss in 16 bits cannot be measured. Give the 16-bit model"
        )
    weights = WeightFormat(quant_type=quant_type, double_quant=double_quant, dtype=dtype)
    base_bytes = bytes_of(opened.features, weights)
    spare = None if budget is None else spare_bytes(parse_bytes(budget), base_bytes)
    task = rows_task(rows, opened.tokenizer, max_rows=max_rows, max_positions=opened.features.max_positions)
    layers = len(full_names(opened.features))
    reporter.message(f"{task.title}: {layers + 2 + (spare is not None)} evaluations, {layers} of them of one layer")
    score = functools.partial(task.score, progress=lambda done: None, cache=NO_CACHE)
    dense, costs = measure_layers(partition(_loaded(opened, reporter, "none")), score, weights, progress)
    quantized = score(partition(_loaded(opened, reporter, quant_type)))
    found = Measured(title=task.title, costs=costs, dense=dense, quantized=quantized, base_bytes=base_bytes)
    return found if spare is None else _with_choice(found, spare, opened, score, reporter)


def _with_choice(
    measured: Measured,
    spare: int,
    opened: OpenedModel,
    score: Callable[[ModelParts], RowScores],
    reporter: ProgressReporter,
) -> Measured:
    """Adds the layers to keep, and the loss of the base that training would load with them."""
    choice = choose_layers(measured.costs, spare)
    names = names_of(choice.kept, opened.features)
    model = _loaded(opened, reporter, opened.args.quant_type, names)
    return dataclasses.replace(measured, choice=choice, names=names, kept=score(partition(model)))


def _loaded(
    opened: OpenedModel, reporter: ProgressReporter, quant_type: str, keep: list[str] | None = None
) -> CausalLM:
    args = dataclasses.replace(opened.args, quant_type=quant_type, keep_16bit=keep or [])
    with reporter.loading() as progress:
        return load_base(opened, args, progress)
