"""Exports a run as one model: the adapter merged into the dequantized weights that it was trained on, or into the
original ones.

Merged weights are rounded once, to 16 bits, and an adapter's share of a weight may be smaller than that rounding. So
the merged model is read back, and its logits are compared with those of base and adapter.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich.console import Console

from qlora_jax.config import ModelArgs
from qlora_jax.io.atomic import staged_folder
from qlora_jax.io.checkpoint import Run
from qlora_jax.io.export.gguf_metadata import framed
from qlora_jax.io.export.original_base import check_original, open_original
from qlora_jax.io.export.verify import PROMPTS, Prompts, difference, logits_of, tokens_of
from qlora_jax.io.gguf.writer import Frame, write_gguf
from qlora_jax.io.hf.model_writer import Merging, dense_tensors, write_dense_folder, write_tokenizer
from qlora_jax.io.loader import load_model
from qlora_jax.io.model_source import ModelSource
from qlora_jax.io.open_model import open_model
from qlora_jax.io.pretrained import Opened, adapted, load_base, open_base_or_run
from qlora_jax.io.progress import loading
from qlora_jax.io.tensor_map import Slot, layer_name, slots_of, with_tables
from qlora_jax.models.add_adapters import linears, norms
from qlora_jax.models.decoder import CausalLM
from qlora_jax.models.families import model_config
from qlora_jax.models.partition import ModelParts, combine, partition
from qlora_jax.models.precision import weight_format
from qlora_jax.models.trainable_embeddings import whole_tables

QUANTIZED = ("q8_0", "q4_0")  # what their rounding costs is told, not refused


def export_merged(
    path: Path,
    output: Path,
    form: str,
    *,
    step: int | None,
    model: str | None,
    base: str | None,
    dtype: str,
    console: Console,
) -> None:
    """Writes the run at `path` to the new folder `output` as one model, its weights in `dtype`.

    Args:
      form: "hf", a folder for transformers; or "gguf", a file for llama.cpp.
      model: where the run's base lies now, if elsewhere than in training.
      base: the model, not quantized, whose weights take the adapter; None: the dequantized ones of training.

    Raises:
      ValueError: no run or no such step, an output that is there already, another base than the run's, a `base` that
        was not quantized to it, a model that a GGUF file can't hold, or a merge in 16 bits or more whose logits are not
        those of base and adapter.
    """
    opened = open_base_or_run(model, str(path), step=step)
    run = opened.run
    assert run is not None
    original = None if base is None else _original(base, opened, run)
    file = framed(opened) if form == "gguf" else None
    prompts = _prompts(opened)
    with staged_folder(output) as folder:
        written, computed, trained = _write(folder, opened, file and file.frame, original, prompts, dtype, console)
        merged = logits_of(_read_back(written, computed), prompts)
        expected = trained if original is None else _with_and_without(_dense(original, computed), run, prompts)[0]
        found = difference(merged, *expected)
        if not found.is_small and dtype not in QUANTIZED:
            raise ValueError(f"the merge of {run.label} is not what was trained: {found}. Try --dtype float32")
    if original is None:
        lines = [f"{run.label}, merged: {output}", str(found)]
    else:
        lines = [f"{run.label}, merged into {original.path}: {output}", f"as a merge with these weights, {found}"]
        lines.append(f"what it costs that the adapter was trained on others: {difference(merged, *trained)}")
    lines += file.notes if file else []
    if not found.is_small:
        lines.append(f"{dtype} rounds away more than the adapter adds: --dtype q8_0 or float16 keeps what was learned")
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def _original(base: str, opened: Opened, run: Run) -> ModelSource:
    if run.initial is not None:
        raise ValueError(
            f"--base: the adapter of {run.label} holds a part of the weights (lora.init={run.lora_args.init}), which "
            "the original ones have too. Leave --base out, or export --format peft: a LoRA over the original weights"
        )
    return open_original(base, opened)


def _prompts(opened: Opened) -> Prompts:
    """Some text, and the new tokens."""
    new = [*opened.args.new_tokens, *opened.args.new_special_tokens]
    return tokens_of(opened.tokenizer, (*PROMPTS, *([" ".join(new)] if new else [])))


Pair = tuple[np.ndarray, np.ndarray]  # logits with the adapter, and without


def _write(
    folder: Path,
    opened: Opened,
    frame: Frame | None,
    original: ModelSource | None,
    prompts: Prompts,
    dtype: str,
    console: Console,
) -> tuple[Path, str, Pair]:
    """(what was written, the dtype of training, the logits of what was trained). The base is gone when it returns:
    what is read back may have no room beside it."""
    assert opened.run is not None
    with loading(console) as progress:
        base = load_base(opened, opened.args, progress)
    slots, computed = slots_of(base), base.model.embed_tokens.weight[...].dtype
    if original is not None:
        check_original(original, slots, computed)
    trained, whole = _with_and_without(base, opened.run, prompts)
    tables = whole_tables(whole, opened.run.tables)
    slots, config = with_tables(slots, opened.source.config, tables)
    held = {} if original is None else original.tensors
    names = opened.features.hugging_face_name
    rest = {name: entry for name, entry in held.items() if name not in map(names, tables)}
    tensors = {"computed": computed, "adapters": _adapters(whole), "original": rest}
    if frame is None:
        written = _write_folder(folder, opened, slots, config, dtype, **tensors)
    else:
        written = _write_file(folder, frame, slots, dtype, **tensors)
    return written, computed.name, trained


def _with_and_without(model: CausalLM, run: Run, prompts: Prompts) -> tuple[Pair, CausalLM]:
    """(logits, the model with the run's adapter)."""
    parts = adapted(model, run)
    # `model` has fresh adapters now, which change nothing.
    with_adapter, without = (logits_of(each, prompts) for each in (parts, partition(model)))
    return (with_adapter, without), combine(parts)


def _write_folder(
    folder: Path, opened: Opened, slots: Sequence[Slot], config: dict[str, Any], dtype: str, **tensors: Any
) -> Path:
    write_dense_folder(folder, slots, config, dtype=jnp.dtype(dtype), **tensors)
    write_tokenizer(folder, opened.tokenizer, opened.source.tokenizer["stop_token_ids"])
    return folder


def _write_file(folder: Path, frame: Frame, slots: Sequence[Slot], dtype: str, **tensors: Any) -> Path:
    path = folder / f"model-{dtype}.gguf"
    names = [name for slot in slots for name in slot.names]
    write_gguf(path, frame, names, (np.asarray(tensor) for tensor in dense_tensors(slots, **tensors)), dtype)
    return path


def _adapters(model: CausalLM) -> dict[str, Merging]:
    """By the name of the first layer's module."""
    modules = (*linears(model), *norms(model))
    return {layer_name(name, 0): module.adapter for name, module in modules if module.adapter}


def _read_back(path: Path, computed: str) -> ModelParts:
    return partition(_dense(open_model(path), computed))


def _dense(source: ModelSource, computed: str) -> CausalLM:
    args: dict[str, Any] = {"path": str(source.path), "quant_type": "none", "compute_dtype": computed}
    return load_model(source, model_config(source.config), weight_format(ModelArgs(**args))).model
