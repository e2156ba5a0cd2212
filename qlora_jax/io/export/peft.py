"""Exports a run as a PEFT adapter folder, with notes on what vLLM and llama.cpp read of it."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp

from qlora_jax.atomic_files import staged_folder
from qlora_jax.config.exports import DEFAULT_OPTIONS, ExportOptions
from qlora_jax.config.methods import METHODS, method_with_peft_type
from qlora_jax.io.export.methods import check_head, check_method
from qlora_jax.io.export.original_base import adapter_for_export
from qlora_jax.io.export.result import ExportResult
from qlora_jax.io.head_file import head_padding, padded_tokenizer
from qlora_jax.io.hf.hub import HubName
from qlora_jax.io.hf.model_writer import write_dense_folder, write_tokenizer
from qlora_jax.io.loading.loader import Progress
from qlora_jax.io.peft.embeddings import check_exportable, split_tables, table_config, table_tensors
from qlora_jax.io.peft.head_adapters import split_head, with_head
from qlora_jax.io.peft.writer import in_peft_format, is_gguf, write_adapter
from qlora_jax.io.pretrained import OpenedModel, load_base
from qlora_jax.io.rounding import rounding_note
from qlora_jax.io.run_folder.checkpoint import Run
from qlora_jax.io.tensor_map import slots_of, with_tables
from qlora_jax.model_source import ModelSource
from qlora_jax.models.trainable_embeddings import add_token_rows, merged_tables
from qlora_jax.untrusted_json import JsonObject

# Notes for users of vLLM and llama.cpp, which read PEFT's adapters but not all of their features.
#
# The limits come from the programs' documentation; vLLM was not run. vLLM: docs.vllm.ai, api/vllm/config/lora (ranks)
# and api/vllm/lora/peft_helper (unsupported features; one alpha over one rank scales all modules). llama.cpp:
# convert_lora_to_gguf.py, which reads lora_alpha, a rank per module, and only tensors named lora_A and lora_B.

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # possible values of --max-lora-rank
VLLM_DEFAULT_RANK = 16
MERGED = "merge it into a model for them: --format hf or gguf"
WITHOUT_GGUF = "merge it into a model for vLLM: --format hf"
HEAD_TASKS = ("SEQ_CLS", "FEATURE_EXTRACTION")  # llama.cpp's files cannot hold their heads


def notes_for_readers(config: JsonObject) -> list[str]:
    """Lists how vLLM and llama.cpp would compute something else than the adapter with this adapter_config.json."""
    merged = WITHOUT_GGUF if config.get("task_type") in HEAD_TASKS else MERGED
    name = "dora" if config.get("use_dora") else method_with_peft_type(config["peft_type"])
    if name not in (None, "lora"):
        return [f"vLLM and llama.cpp cannot read {METHODS[name].title}: {merged}"]
    notes = [note for note in (_rank_note(config), _pattern_note(config)) if note]
    if config["alpha_pattern"]:
        notes.append(
            "llama.cpp ignores alpha_pattern, and would scale these modules differently: use --format gguf-lora"
        )
    if config.get("target_parameters"):
        notes.append(
            "the adapter is on parameters of experts (target_parameters): transformers 5 with peft 0.21 loads it, "
            "llama.cpp's converter cannot: use --format gguf-lora"
        )
    more = [*(config["modules_to_save"] or []), *config.get("trainable_token_indices", {})]
    if more:
        notes.append(
            f"vLLM and llama.cpp cannot read an adapter that trains more than LoRA ({', '.join(more)}): {merged}"
        )
    return notes


def _rank_note(config: JsonObject) -> str | None:
    rank = max(config["r"], *config["rank_pattern"].values(), 0)
    if rank <= VLLM_DEFAULT_RANK:
        return None
    enough = next((each for each in VLLM_RANKS if each >= rank), None)
    if enough is None:
        return f"vLLM supports ranks up to {VLLM_RANKS[-1]}, and this adapter has {rank}: merge it, --format hf"
    return f"vLLM requires --max-lora-rank {enough} or more"


def _pattern_note(config: JsonObject) -> str | None:
    patterns = [name for name in ("rank_pattern", "alpha_pattern") if config[name]]
    if not patterns:
        return None
    return f"vLLM ignores {' and '.join(patterns)}, and would scale these modules differently: merge it, --format hf"


BASE_FOLDER = "base"


def export_peft(opened: OpenedModel, output: Path, options: ExportOptions = DEFAULT_OPTIONS) -> ExportResult:
    """Writes a run's adapter to the new folder `output` in PEFT's format; prints nothing.

    Args:
      opened: a run or an adapter, with its base; see `open_finetuned`.
      options: `with_base` writes the base to output/base.

    Raises:
      ValueError: `output` exists, PEFT cannot hold the adapter, or (with
        `with_base`) the base is not the one that the run was trained on.
    """
    run, with_base = opened.run, options.with_base
    if run is None:
        raise ValueError(f"{opened.source.path}: a base model has no adapter to export. Open a run")
    check_method(run.lora_args.method, "peft")
    check_head(run.head, "peft", opened.source.config)
    base, revision = (str((output / BASE_FOLDER).absolute()), None) if with_base else _base_of(opened.source)
    named = opened.features.hugging_face_name
    trained = adapter_for_export(run, with_base)
    bare, score = split_head(trained.lora)
    adapters, tables = split_tables(bare)
    # A model with a sequence head has no language-model head to which the embedding could be tied.
    features = opened.features if run.head is None else dataclasses.replace(opened.features, tie_embeddings=False)
    if run.tables:
        raise ValueError(
            f"--format peft: {run.path} is already a PEFT adapter, with whole tables. Use it, or --format hf"
        )
    check_exportable(run.lora_args.method, tables, features)
    lora = {named(name): matrices for name, matrices in adapters.items()}
    config, tensors = in_peft_format(lora, trained.args, opened.features, base, run.frozen)
    config |= {"revision": revision} | table_config(tables, run.new_ids, features)
    tensors |= table_tensors(tables, features)
    if run.head is not None:
        config, tensors = with_head(config, tensors, score, run.head, features)
    total_rows = opened.full_features.vocab_size
    resized_rows = total_rows if total_rows > opened.features.vocab_size and not with_base else None
    notes = [*trained.notes, *notes_for_readers(config)]
    with staged_folder(output) as folder:
        tokenizer, padding = opened.tokenizer, None
        if run.head is not None:
            padding = head_padding(tokenizer, opened.source.config, opened.stop_ids)
            tokenizer = padded_tokenizer(tokenizer, padding) if run.head.outputs else tokenizer
        write_adapter(folder, tensors, config, resized_rows, run.head, padding)
        if tables or opened.replaces_template:
            write_tokenizer(folder, tokenizer, opened.source, opened.stop_ids)
        if with_base:
            notes += _write_base(folder / BASE_FOLDER, opened, options.base_dtype, options.progress)
        elif opened.unlisted_stop_ids:
            notes.append(f"its base does not list the end of a turn: pass eos_token_id={opened.stop_ids} to generate")
    lines = _lines(output, run, base, resized_rows, notes)
    return ExportResult(path=output, lines=lines)


def _base_of(source: ModelSource) -> tuple[str, str | None]:
    """(base, revision) for adapter_config.json: a Hub name and its commit, or an absolute path and None."""
    on_hub = HubName.parse(source.hub_name or "")
    if on_hub is None:
        return str(source.path.absolute()), None
    return str(dataclasses.replace(on_hub, revision=None)), on_hub.revision


def _write_base(folder: Path, opened: OpenedModel, dtype: str | None, progress: Progress | None) -> list[str]:
    """Writes the base that training saw: quantized and dequantized again, new tokens with the mean row.

    Returns notes about its rounding.
    """
    model = load_base(opened, opened.args, progress)
    folder.mkdir()
    computed, slots = model.model.embed_tokens.weight[...].dtype, slots_of(model)
    stored = jnp.dtype(dtype or computed)
    add_token_rows(model, opened.tokenizer.new_ids, computed)
    slots, config = with_tables(slots, opened.source.config, merged_tables(model, ()))
    multimodal = opened.source.multimodal
    write_dense_folder(folder, slots, config, compute_dtype=computed, dtype=stored, adapters={}, multimodal=multimodal)
    write_tokenizer(folder, opened.tokenizer, opened.source, opened.stop_ids)
    return rounding_note(stored.name, computed.name)


def _lines(output: Path, run: Run, base: str, resized_rows: int | None, notes: list[str]) -> tuple[str, ...]:
    lines = [f"adapter of {run.label}: {output}", f"its base model: {base}"]
    if resized_rows:
        lines.append(f"PEFT requires a longer embedding first: base.resize_token_embeddings({resized_rows})")
    lines += notes
    if is_gguf(base):
        lines.append(
            "peft cannot load a GGUF file: export with --with_base and another --output to get a base that it loads"
        )
    return tuple(lines)
