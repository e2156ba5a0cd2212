"""Exports a run, from its checkpoint and its base on disk."""

import dataclasses
from pathlib import Path

from rich.console import Console

from qlora_jax.io.atomic import staged_folder
from qlora_jax.io.checkpoint import Run
from qlora_jax.io.export.original_delta import as_exported
from qlora_jax.io.hf.hub import HubName
from qlora_jax.io.hf.model_writer import write_dense_folder, write_tokenizer
from qlora_jax.io.model_source import ModelSource
from qlora_jax.io.peft.compatibility import notes_for_readers
from qlora_jax.io.peft.embeddings import check_exportable, split, token_config, token_tensors
from qlora_jax.io.peft.writer import adapter_config, adapter_tensors, is_gguf, write_adapter
from qlora_jax.io.pretrained import Opened, load_base, open_base_or_run
from qlora_jax.io.progress import loading
from qlora_jax.io.tensor_map import slots_of, with_tables
from qlora_jax.models.add_adapters import ia3_targets
from qlora_jax.models.trainable_embeddings import add_token_rows, whole_tables

BASE = "base"


def export_peft(
    path: Path, output: Path, *, step: int | None, model: str | None, with_base: bool, console: Console
) -> None:
    """Writes the adapter of the run at `path` to the new folder `output`, and with `with_base` its base to output/base.

    Args:
      model: where the run's base lies now, if elsewhere than in training.

    Raises:
      ValueError: no run or no such step, an output that is there already, or (with_base) another base than the run's.
    """
    opened = open_base_or_run(model, str(path), step=step)
    run = opened.run
    assert run is not None
    base, revision = (str((output / BASE).absolute()), None) if with_base else _base_of(opened.source)
    named = opened.features.hugging_face_name
    linears = [named(f"model.layers.{name}") for name in opened.features.linear_shapes()]
    trained = as_exported(run, with_base)
    adapters, tables = split(trained.lora)
    check_exportable(run, tables, opened.features)
    lora = {named(name): matrices for name, matrices in adapters.items()}
    on_inputs = ia3_targets(opened.features, run.lora_args)[1] if run.lora_args.method == "ia3" else []
    config = adapter_config(lora, trained.args, linears, base, on_inputs) | {"revision": revision}
    config |= token_config(tables, run.new_ids, opened.features)
    whole = opened.whole_features.vocab_size
    rows = whole if whole > opened.features.vocab_size and not with_base else None
    with staged_folder(output) as folder:
        tensors = adapter_tensors(lora, on_inputs) | token_tensors(tables, opened.features)
        write_adapter(folder, tensors, config, rows)
        if tables:
            write_tokenizer(folder, opened.tokenizer, opened.source.tokenizer["stop_token_ids"])
        if with_base:
            _write_base(folder / BASE, opened, console)
    first = [f"PEFT wants its embedding longer first: base.resize_token_embeddings({rows})"] if rows else []
    _tell(output, run, base, [*first, *trained.notes, *notes_for_readers(config)], console)


def _base_of(source: ModelSource) -> tuple[str, str | None]:
    """(where PEFT finds the base, at which revision): what transformers calls a name on the Hub, or a path."""
    on_hub = HubName.of(source.hub_name or "")
    if on_hub is None:
        return str(source.path.absolute()), None
    return str(dataclasses.replace(on_hub, revision=None)), on_hub.revision


def _write_base(folder: Path, opened: Opened, console: Console) -> None:
    """The base as the run saw it: quantized, and dequantized again; its new tokens have the mean row."""
    with loading(console) as progress:
        model = load_base(opened, opened.args, progress)
    folder.mkdir()
    dtype, slots = model.model.embed_tokens.weight[...].dtype, slots_of(model)
    add_token_rows(model, opened.tokenizer.new_ids, dtype)
    slots, config = with_tables(slots, opened.source.config, whole_tables(model, ()))
    write_dense_folder(folder, slots, config, computed=dtype, dtype=dtype, adapters={})
    write_tokenizer(folder, opened.tokenizer, opened.source.tokenizer["stop_token_ids"])


def _tell(output: Path, run: Run, base: str, notes: list[str], console: Console) -> None:
    lines = [f"adapter of {run.label}: {output}", f"its base model: {base}", *notes]
    if is_gguf(base):
        lines.append("peft loads no GGUF file: export again with --with_base to get a base that it loads")
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
