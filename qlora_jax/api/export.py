"""`save_peft`, `merge` and `save_quantized`: models and adapters for other libraries."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from flax import nnx

from qlora_jax.api.provenance import parts_of, provenance_of
from qlora_jax.api.settings import loading_bar
from qlora_jax.atomic_files import staged_folder
from qlora_jax.config import read_config
from qlora_jax.config.exports import EXPORTS, Dtype, ExportFormat, ExportOptions, dtype_problems, formats
from qlora_jax.config.objectives import OBJECTIVES
from qlora_jax.config.registry import load_implementation
from qlora_jax.data.branch_tree import whole_texts
from qlora_jax.data.dataset import load_held_out
from qlora_jax.data.tokenizer.tokenizer import load_tokenizer
from qlora_jax.evaluation.importance_matrix import mean_squares
from qlora_jax.evaluation.tasks.rows import RowsTask
from qlora_jax.inference.prompts import stop_ids
from qlora_jax.inference.result_cache import NO_CACHE
from qlora_jax.io.export.merged import QUANTIZED
from qlora_jax.io.export.merged_codes import merged_dtype
from qlora_jax.io.export.result import ExportResult
from qlora_jax.io.hf.model_writer import write_tokenizer
from qlora_jax.io.hf.quantized_folder import write_quantized_folder
from qlora_jax.io.loading.progress import SCORING, WEIGHING, StageProgress
from qlora_jax.io.open_model import open_model
from qlora_jax.io.pretrained import OpenedModel
from qlora_jax.io.run_folder.checkpoint import CONFIG_FILE
from qlora_jax.measures.metrics import RowScores
from qlora_jax.models.config import WeightFormat
from qlora_jax.models.families import model_config
from qlora_jax.models.partition import ModelParts
from qlora_jax.models.precision import keep_in_16_bits

MAX_ROWS = 256  # held-out rows that are scored: enough for an interval, and minutes less on a CPU


def save_peft(
    model: nnx.Module,
    folder: str | Path,
    *,
    format: ExportFormat = "peft",
    with_base: bool = False,
    base_dtype: Dtype | None = None,
    progress: bool = False,
) -> ExportResult:
    """Writes the model's adapter for the peft library, or for llama.cpp.

    >>> result = q.save_peft(q.add_adapter(model), "adapter")
    >>> sorted(path.name for path in result.path.iterdir())[:2]
    ['README.md', 'adapter_config.json']

    Args:
      model: a base from `load` with an adapter, trained by `finetune` or in a training loop of one's own.
      folder: a new folder.
      format: "peft", or "gguf-lora" for llama.cpp; or another adapter format, such as a registered one.
      with_base: also write the dequantized base, read again from its files. peft cannot load GGUF files, so an adapter
        for a base from a GGUF file needs it.
      base_dtype: dtype of that base; None: the dtype in which training computed. "gguf-lora" also takes "q8_0" and
        "q4_0".
      progress: show a progress bar while the base is read.

    Returns:
      The path, and notes on what the other library requires; `str(result)` is what the command prints.

    Raises:
      ValueError: the model has no adapter, the folder exists, or the format cannot hold the adapter or dtype.
    """
    _check_format(format, merged=False)
    options = ExportOptions(with_base=with_base, base_dtype=base_dtype)
    return write_export(as_opened(model), Path(folder), format, options, progress=progress)


def merge(
    model: nnx.Module,
    folder: str | Path,
    *,
    format: ExportFormat = "hf",
    dtype: Dtype | None = None,
    base: str | None = None,
    progress: bool = False,
) -> ExportResult:
    """Writes the model with its adapter merged into the dequantized base, and compares the logits of both.

    >>> result = q.merge(q.add_adapter(model), "merged", dtype="float32")
    >>> (result.path / "model.safetensors").exists()
    True

    The base is read again from its files, so memory holds two copies of it.

    Args:
      model: a base from `load` with a trained adapter.
      folder: a new folder.
      format: "hf" for transformers, "gguf" for llama.cpp; or another format of whole models, such as a registered one.
      dtype: dtype of the weights; None: bfloat16 for "hf" and float16 for "gguf", which also takes "q8_0", "q4_0" and,
        by llama.cpp's quantizer, "q6_k", "q5_k_m", "q4_k_m", "q4_k_s" and "iq4_nl".
      base: path of the 16-bit model that the base was quantized from, to merge into its weights instead.
      progress: show a progress bar while the base is read.

    Returns:
      The path, notes, and the difference between the logits of the merged model and those of base and adapter.

    Raises:
      ValueError: the model has no adapter, the folder exists, the format cannot hold the model or dtype, or rounding
        changes the logits too much.
    """
    _check_format(format, merged=True)
    options = ExportOptions(dtype=dtype, base=base)
    return write_export(as_opened(model), Path(folder), format, options, progress=progress)


def save_quantized(
    path: str,
    folder: str | Path,
    *,
    quant_type: Literal["nf4", "fp4", "nvfp4", "none"] = "nf4",
    double_quant: bool = True,
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    keep_16bit: str | Sequence[str] = (),
    progress: bool = False,
) -> Path:
    """Writes the model at `path` for transformers: in 4 bits of bitsandbytes, in NVFP4, or back in 16 bits.

    >>> folder = q.save_quantized("model", "model-4bit", quant_type="nf4")
    >>> q.load(str(folder))[0].config == model.config
    True

    Args:
      path: a Hugging Face folder in 16 or 4 bits, a GGUF file, or org/name on the Hub.
      folder: a new folder.
      quant_type: 4-bit data type, "nvfp4" in the form of compressed-tensors; "none" for 16 bits.
      double_quant: quantize the scales too.
      dtype: dtype of the unquantized tensors.
      keep_16bit: linear layers that stay in `dtype`, by name or as one regular expression, as for `load`.
      progress: show a progress bar.

    Returns:
      The folder.

    Raises:
      ValueError: the model's files are missing, damaged or not supported, or the folder exists.
    """
    kind = None if quant_type == "none" else quant_type
    weights = WeightFormat(quant_type=kind, double_quant=double_quant, dtype=dtype)
    with staged_folder(Path(folder)) as staged:
        source = open_model(path)
        tokenizer = load_tokenizer(source.tokenizer)
        if keep_16bit:
            weights = keep_in_16_bits(weights, keep_16bit, model_config(source.config, source.config_name))
        with loading_bar(progress) as report:
            write_quantized_folder(staged, source, weights, report)
        write_tokenizer(staged, tokenizer, source, source.tokenizer["stop_token_ids"])
    return Path(folder)


def as_opened(model: nnx.Module) -> OpenedModel:
    """The files of a model in memory, and its adapter as a run.

    Raises:
      ValueError: the model is not from `load`, or has no adapter.
    """
    provenance = provenance_of(model)
    return dataclasses.replace(provenance.opened, run=provenance.as_run(parts_of(model)))


def write_export(
    opened: OpenedModel, folder: Path, format: str, options: ExportOptions, *, progress: bool = False
) -> ExportResult:
    """Writes a run or a model in memory; see `save_peft` and `merge`.

    Args:
      options: without `progress`, and with a `dtype` only if it is not the format's default.
    """
    declared = EXPORTS[format]
    if problems := dtype_problems(format, options.dtype, options.base_dtype):
        raise ValueError("; ".join(problems))
    if options.base_dtype is not None and not options.with_base:
        raise ValueError("base_dtype: requires with_base, which writes a base next to the adapter. Add it")
    made = declared.implementation
    run = load_implementation("format", format, made) if isinstance(made, str) else made
    dtype = options.dtype if opened.run is None else merged_dtype(opened.run, format, options)
    dtype = dtype or (declared.dtypes[0] if declared.merged and declared.dtypes else None)
    task, note = _held_out(opened) if dtype in QUANTIZED else (None, [])
    with loading_bar(progress) as report:
        whole = dataclasses.replace(options, dtype=dtype, progress=report)
        if task is not None:
            on_rows = {"score": functools.partial(_score, task, report), "importance": _importance(task, report)}
            whole = dataclasses.replace(whole, **on_rows)
        result = run(_with_stop_ids(opened), folder, whole) if callable(run) else run
    if not isinstance(result, ExportResult):
        raise ValueError(
            f"format: {format!r} is declared with a function that returns {type(result).__name__}, expected an "
            "ExportResult (qlora_jax/io/export/result.py). Repair or uninstall its package"
        )
    result = dataclasses.replace(result, lines=(*result.lines, *note))
    return result.with_other_parts(opened.source, declared.other_parts)


def _score(task: RowsTask, report: StageProgress, parts: ModelParts) -> RowScores:
    return task.score(parts, lambda done: report(done, task.size, "", SCORING), NO_CACHE)


def _importance(task: RowsTask, report: StageProgress) -> Callable[[ModelParts], dict[str, np.ndarray]]:
    texts = [ids for ids, _ in task.rows]
    return lambda parts: mean_squares(parts, texts, lambda done: report(done, len(texts), "", WEIGHING))


def _held_out(opened: OpenedModel) -> tuple[RowsTask | None, list[str]]:
    """Returns the task that scores the run's first MAX_ROWS held-out rows, or a note that says why there is none."""
    note = "the cost in held-out perplexity was not measured: {}. `qlora-jax evaluate --model FILE --rows ROWS` does it"
    assert opened.run is not None
    path = opened.run.path / CONFIG_FILE
    if not path.is_file():
        return None, [note.format("the adapter is not a run, which names held-out rows")]
    config = read_config(path)
    if OBJECTIVES[config.objective].rows != "text":
        return None, [note.format(f"objective={config.objective} has no texts with one answer")]
    try:
        rows = load_held_out(config.data, opened.tokenizer)
    except (OSError, ValueError) as error:
        return None, [note.format(f"the held-out rows cannot be read ({str(error).splitlines()[0]})")]
    if rows is None:
        return None, [note.format("the run has no held-out rows (data.eval, data.eval_fraction)")]
    texts = [whole_texts(*rows.row(row), rows.branches_of(row)) for row in range(min(len(rows), MAX_ROWS))]
    row_of_text = np.repeat(np.arange(len(texts)), [*map(len, texts)])
    return RowsTask(title="held-out rows", rows=[text for one in texts for text in one], row_of_text=row_of_text), []


def _check_format(format: str, *, merged: bool) -> None:
    if format not in EXPORTS or EXPORTS[format].merged != merged:
        raise ValueError(f"format: found {format!r}, expected {' or '.join(formats(merged=merged))}")


def _with_stop_ids(opened: OpenedModel) -> OpenedModel:
    """Returns the model with all ids that end its replies, which exported files then list.

    The files of a base model may lack the end of a turn, which the run learned from a chat template.
    """
    if opened.tokenizer.chat_template is None or (opened.run is not None and opened.run.head is not None):
        return opened
    missing = sorted(stop_ids(opened.tokenizer, opened.stop_ids, chat=True) - {*opened.stop_ids})
    return dataclasses.replace(opened, stop_ids=[*opened.stop_ids[:1], *missing, *opened.stop_ids[1:]])
