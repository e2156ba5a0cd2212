"""Exports a run as one model: the adapter merged into the dequantized weights of training, or into the original ones.

Merged weights are rounded once, to 16 bits, and that rounding may exceed an adapter's change of a weight. So the merged
model is read back, and its logits are compared with those of base and adapter.

Dimension key: D embed, C outputs.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.atomic_files import staged_folder
from qlora_jax.config import ModelArgs
from qlora_jax.config.exports import MIXTURES, ExportOptions
from qlora_jax.config.methods import MERGED_FOLDERS
from qlora_jax.io.export.gguf_metadata import ExportSpec, export_spec
from qlora_jax.io.export.held_out_cost import HeldOutCost, TrainedScores, suggest_dtype
from qlora_jax.io.export.merged_codes import TrainedCodes
from qlora_jax.io.export.methods import check_head, check_method
from qlora_jax.io.export.modelfile import write_modelfile
from qlora_jax.io.export.original_base import check_original, open_original
from qlora_jax.io.export.result import ExportResult
from qlora_jax.io.export.verify import (
    PROMPTS,
    LogitDifference,
    PromptBatch,
    compare_logits,
    prompt_logits,
    tokenize_prompts,
)
from qlora_jax.io.gguf.llama_quantizer import SOURCE_DTYPE, check_quantizer, quantize_file, types_note
from qlora_jax.io.gguf.reader import stored_names
from qlora_jax.io.gguf.writer import GgufSpec, write_gguf
from qlora_jax.io.head_file import Padding, head_padding, padded_tokenizer
from qlora_jax.io.hf.merging import mergeables
from qlora_jax.io.hf.model_writer import dense_tensors, write_dense_folder, write_tokenizer
from qlora_jax.io.hf.quantized_folder import write_quantized_folder
from qlora_jax.io.hf.sentence_files import write_sentence_files
from qlora_jax.io.loading.loader import load_model
from qlora_jax.io.loading.progress import StageProgress
from qlora_jax.io.open_model import open_model
from qlora_jax.io.peft.readme import label_settings
from qlora_jax.io.pretrained import OpenedModel, apply_adapter, load_base
from qlora_jax.io.run_folder.checkpoint import Run
from qlora_jax.io.tensor_map import Slot, slots_of, with_tables
from qlora_jax.measures.metrics import RowScores
from qlora_jax.methods.merge_into import block_weights
from qlora_jax.model_source import ModelSource
from qlora_jax.models.config import ModelConfig, WeightFormat
from qlora_jax.models.decoder import SCORE, CausalLM
from qlora_jax.models.families import model_config
from qlora_jax.models.partition import ModelParts, combine, partition
from qlora_jax.models.precision import weight_format
from qlora_jax.models.trainable_embeddings import merged_tables
from qlora_jax.objectives.head_objective import TrainedHead
from qlora_jax.untrusted_json import JsonObject

# Merged models with a sequence head: transformers' classes for sequence classification.
#
# A model for embeddings is written as a causal model, whose body transformers' AutoModel reads.

TENSOR = f"{SCORE}.weight"
CAUSAL, CLASSIFIER = "ForCausalLM", "ForSequenceClassification"
OTHER_NAMES = {"Gemma3ForSequenceClassification": "Gemma3TextForSequenceClassification"}  # the former sees images


def with_score(
    slots: Sequence[Slot],
    config: JsonObject,
    head: TrainedHead,
    padding: Padding,
    lora: Mapping[str, Mapping[str, jax.Array | np.ndarray]],
    model: ModelConfig,
) -> tuple[list[Slot], JsonObject]:
    """Returns (slots, config.json) of the model with its sequence head in place of the language-model head.

    Args:
      padding: the padding token of its texts.
      lora: trained parameters; those of the head are {"score": {"weight": [D, C]}}.
    """
    if not head.outputs:
        return [*slots], config
    lm_head = model.hugging_face_name("lm_head.")
    kept = [slot for slot in slots if not slot.names[0].startswith(lm_head)]
    weight_CD = jnp.asarray(lora[SCORE]["weight"]).T
    score = Slot(path=(SCORE, "weight"), leaf=weight_CD, names=[TENSOR], stack=())
    return [*kept, score], {**config, "architectures": [class_name(config)], **label_settings(head, padding)}


def class_name(config: JsonObject) -> str:
    """Returns the name of transformers' class for sequence classification.

    Raises:
      ValueError: the config names no causal model.
    """
    named = (config.get("architectures") or [""])[0]
    if not named.endswith(CAUSAL):
        raise ValueError(
            f"--format hf: architectures in config.json names no model of transformers with a class for sequence "
            f"classification (found {named!r}, expected a name that ends with {CAUSAL}). Use --format peft"
        )
    name = named.removesuffix(CAUSAL) + CLASSIFIER
    return OTHER_NAMES.get(name, name)


def load_headed(source: ModelSource, head: TrainedHead, load: Callable[..., CausalLM]) -> ModelParts:
    """Loads a model that `with_score` described.

    Args:
      load: (source, features=) -> the model without a sequence head.
    """
    features = model_config(source.config, source.config_name)
    if head.outputs:  # the file has no language-model head
        body = {name: entry for name, entry in source.tensors.items() if name != TENSOR}
        model = load(
            dataclasses.replace(source, tensors=body), features=dataclasses.replace(features, tie_embeddings=True)
        )
    else:
        model = load(source)
    model.add_sequence_head(head.spec(), jax.random.key(0))
    parts = partition(model)
    if not head.outputs:
        return parts
    weight_DC = jnp.asarray(np.asarray(source.tensors[TENSOR].read(), np.float32).T)
    return parts.with_lora(parts.lora | {SCORE: {"weight": weight_DC}})


IMPORTANCE = "the quantizer weighted errors by the mean square of each input on the held-out rows"
# The loss by rounding to these is reported; it is not an error.
QUANTIZED = (*MERGED_FOLDERS, "q8_0", "q4_0", *MIXTURES)


class Measured(NamedTuple):
    """The f32 logits [real tokens, V] of the prompts, and the scores of held-out rows, if they are scored."""

    logits: np.ndarray
    scores: RowScores | None


Measure = Callable[[ModelParts], Measured]


class Trained(NamedTuple):
    """The measures of what was trained, and of the base alone."""

    adapted: Measured
    base: Measured

    def difference(self, merged: Measured) -> LogitDifference:
        """Compares the logits of a merged model with these."""
        return compare_logits(merged.logits, self.adapted.logits, self.base.logits)

    @property
    def scores(self) -> TrainedScores | None:
        """The scores of held-out rows, if they are scored."""
        adapted, base = self.adapted.scores, self.base.scores
        return None if adapted is None or base is None else TrainedScores(adapted, base)


class Merge(NamedTuple):
    """A merged model that was written, the dtype that training computed in, and the measures of what was trained.

    Fields:
      codes: those that a run with lora.merge_into computed with.
    """

    path: Path
    compute_dtype: np.dtype
    trained: Trained
    codes: TrainedCodes | None


def run_hf(opened: OpenedModel, output: Path, options: ExportOptions) -> ExportResult:
    """Writes the format `hf`; see `export_merged`."""
    return _run("hf", opened, output, options)


def run_gguf(opened: OpenedModel, output: Path, options: ExportOptions) -> ExportResult:
    """Writes the format `gguf`; see `export_merged`."""
    return _run("gguf", opened, output, options)


def _run(form: Literal["hf", "gguf"], opened: OpenedModel, output: Path, options: ExportOptions) -> ExportResult:
    assert options.dtype is not None, "write_export sets it"
    return export_merged(
        opened,
        output,
        form,
        dtype=options.dtype,
        base=options.base,
        progress=options.progress,
        score=options.score,
        importance=options.importance,
    )


def export_merged(
    opened: OpenedModel,
    output: Path,
    form: Literal["hf", "gguf"],
    *,
    dtype: str,
    base: str | None = None,
    progress: StageProgress | None = None,
    score: Callable[[ModelParts], RowScores] | None = None,
    importance: Callable[[ModelParts], Mapping[str, np.ndarray]] | None = None,
) -> ExportResult:
    """Writes a run to the new folder `output` as one model with the adapter merged; prints nothing.

    Args:
      opened: a run or an adapter, with its base; see `open_finetuned`.
      form: "hf", a folder for transformers; or "gguf", a file for llama.cpp.
      dtype: of the written weights: "float32", "float16", "bfloat16"; for "gguf" also "q8_0", "q4_0" and MIXTURES.
      base: a model in 16 bits or more whose weights take the adapter; None for the dequantized weights of training.
      progress: called while the run's base loads, as by `load_model`, and while a mixture is quantized.
      score: scores held-out rows: for dtypes in QUANTIZED, with the base, with the adapter, and with the file.
      importance: returns the importance of each column of a weight; a mixture's errors are weighted by it.

    Raises:
      ValueError: `output` exists, the base is not the one that the run was
        trained on, that base was not quantized from `base`, a GGUF file cannot hold the model, the merge (in 16 bits
        or more) gives other logits than base and adapter, or llama.cpp cannot quantize it.
    """
    run = opened.run
    if run is None:
        raise ValueError(f"{opened.source.path}: a base model has no adapter to export. Open a run")
    check_method(run.lora_args.method, form)
    check_head(run.head, form, opened.source.config)
    original = None if base is None else _open_original(base, opened, run)
    file = export_spec(opened) if form == "gguf" else None
    merge_into = run.lora_args.merge_into  # its codes are known, and are written here
    if is_mixture := dtype in MIXTURES and merge_into is None:
        check_quantizer(dtype)
    prompts, report = _prompts(opened), progress or (lambda *_: None)
    columns: dict[str, np.ndarray] = {}
    measure = functools.partial(_measure, prompts, score if dtype in QUANTIZED else None)
    with staged_folder(output) as folder:
        first = SOURCE_DTYPE if is_mixture else dtype
        merge = _write_merge(folder, opened, file and file.spec, original, measure, first, progress)
        path = folder / f"model-{dtype}.gguf" if is_mixture else merge.path
        quantize = functools.partial(quantize_file, merge.path, progress=report, importance=columns)
        if is_mixture:
            columns |= _importance(merge, importance)
            quantize(path, dtype)
        measured = measure(_load_written(path, merge.compute_dtype, run.head))
        expected = merge.trained
        if original is not None:
            logits_only = functools.partial(_measure, prompts, None)
            expected = _measure_trained(_load_dense(original, merge.compute_dtype), run, logits_only)[0]
        difference = expected.difference(measured)
        if not difference.is_small and (dtype not in QUANTIZED or merge.codes is not None):
            raise ValueError(f"the merge of {run.label} is not what was trained: {difference}. Try --dtype float32")
        notes = _held_out_lines(dtype, merge, measured, quantize, score)
        if merge.codes is not None and dtype == merge_into:
            notes += [f"all codes of {merge.codes.check(path):,} weights are those that training computed with"]
        if dtype in MIXTURES:
            notes += [types_note(path, dtype), *([IMPORTANCE] if columns else [])]
        if is_mixture:
            merge.path.unlink()
        if form == "gguf":
            notes += write_modelfile(folder, opened, f"./{path.name}")
    suggested = is_mixture and score is not None
    notes += _notes(file, dtype, difference.is_small or suggested)
    if original is None:
        lines = [f"{run.label}, merged: {output}", str(difference)]
    else:
        cost = f"cost of merging into other weights than those of training: {merge.trained.difference(measured)}"
        lines = [f"{run.label}, merged into {original.path}: {output}"]
        lines += [f"as a merge with these weights, {difference}", cost]
    return ExportResult(path=output, lines=(*lines, *notes), difference=difference)


def _measure(prompts: PromptBatch, score: Callable[[ModelParts], RowScores] | None, parts: ModelParts) -> Measured:
    return Measured(prompt_logits(parts, prompts), None if score is None else score(parts))


def _load_written(path: Path, compute_dtype: np.dtype, head: TrainedHead | None) -> ModelParts:
    load = functools.partial(_load_dense, compute_dtype=compute_dtype)
    source = open_model(path)
    return partition(load(source)) if head is None else load_headed(source, head, load)


def _importance(
    merge: Merge, importance: Callable[[ModelParts], Mapping[str, np.ndarray]] | None
) -> dict[str, np.ndarray]:
    """Returns the importance of columns by the names of tensors in the merged GGUF file."""
    if importance is None:
        return {}
    names = stored_names(merge.path)
    found = importance(_load_written(merge.path, merge.compute_dtype, None))
    return {names[name]: values for name, values in found.items()}


def _held_out_lines(
    dtype: str,
    merge: Merge,
    measured: Measured,
    quantize: Callable[[Path, str], None],
    score: Callable[[ModelParts], RowScores] | None,
) -> list[str]:
    """Returns lines on the cost on held-out rows, with a suggestion for a mixture; none if rows are not scored."""
    trained = merge.trained.scores
    if trained is None or measured.scores is None or score is None:
        return []
    found = HeldOutCost.of(dtype, trained, measured.scores)
    if dtype not in MIXTURES or merge.codes is not None:
        return found.lines()

    def score_file(path: Path) -> RowScores:
        return score(_load_written(path, merge.compute_dtype, None))

    return [*found.lines(), suggest_dtype(found, merge.path.parent, trained, quantize, score_file)]


def _notes(file: ExportSpec | None, dtype: str, is_small: bool) -> list[str]:
    notes = file.notes if file else []
    if is_small:
        return notes
    return [*notes, f"{dtype} rounds away more than the adapter adds: use --dtype q8_0 or float16 to preserve it"]


def _open_original(base: str, opened: OpenedModel, run: Run) -> ModelSource:
    if run.initial is not None:
        raise ValueError(
            f"--base: the adapter of {run.label} contains a part of the weights (lora.init={run.lora_args.init}), "
            "which the original weights contain, too. Remove --base, or export --format peft: a LoRA over the original "
            "weights"
        )
    return open_original(base, opened)


def _prompts(opened: OpenedModel) -> PromptBatch:
    """The fixed prompts, and one of the run's new tokens if it has any."""
    new = [*opened.args.new_tokens, *opened.args.new_special_tokens]
    return tokenize_prompts(opened.tokenizer, (*PROMPTS, *([" ".join(new)] if new else [])))


def _write_merge(
    folder: Path,
    opened: OpenedModel,
    spec: GgufSpec | None,
    original: ModelSource | None,
    measure: Measure,
    dtype: str,
    progress: StageProgress | None,
) -> Merge:
    """Loads base and adapter, writes their merge, and frees the base: memory may not hold it next to the merge."""
    assert opened.run is not None
    base = load_base(opened, opened.args, progress)
    slots, compute_dtype = slots_of(base), base.model.embed_tokens.weight[...].dtype
    if original is not None:
        check_original(original, slots, compute_dtype)
    trained, model = _measure_trained(base, opened.run, measure)
    lora = opened.run.lora_args
    codes = None if lora.merge_into is None else TrainedCodes(model, slots, lora)
    slots = slots if codes is None else codes.slots
    tables = merged_tables(model, opened.run.tables)
    slots, config = with_tables(slots, opened.source.config, tables)
    names = set(map(opened.features.hugging_face_name, tables))
    originals = {} if original is None else {n: entry for n, entry in original.tensors.items() if n not in names}
    adapters = mergeables(model)
    tokenizer, head, stop = opened.tokenizer, opened.run.head, opened.stop_ids
    if head is not None:
        padding = head_padding(tokenizer, opened.source.config, stop)
        slots, config = with_score(slots, config, head, padding, opened.run.lora, opened.features)
        if not head.outputs and padding.token is None:  # pooling of embeddings goes by the mask of a batch
            padding = Padding(tokenizer.eos_id, tokenizer.special_tokens.get("eos_token"))
        tokenizer = padded_tokenizer(tokenizer, padding)
    if spec is not None:
        path = folder / f"model-{dtype}.gguf"
        if codes is None:
            tensors = map(np.asarray, dense_tensors(slots, compute_dtype, adapters, originals))
            write_gguf(path, spec, _names(slots), tensors, dtype)
        else:
            write_gguf(path, spec, _names(slots), codes.tensors(), dtype, codes.types)
        return Merge(path, compute_dtype, trained, codes)
    if dtype in MERGED_FOLDERS:
        assert codes is not None, "`merged_dtype` refuses other runs"
        group = block_weights(next(iter(codes.types.values())))
        weights = WeightFormat(quant_type=dtype, block_size=group, dtype=compute_dtype.name)
        write_quantized_folder(folder, opened.source, weights, progress or (lambda *_: None), codes.tensor)
    else:
        write_dense_folder(
            folder,
            slots,
            config,
            compute_dtype=compute_dtype,
            dtype=jnp.dtype(dtype),
            adapters=adapters,
            original=originals,
            multimodal=(original or opened.source).multimodal,
        )
    write_tokenizer(folder, tokenizer, opened.source, stop)
    if head is not None and not head.outputs and opened.source.multimodal is None:
        write_sentence_files(folder, head.pooling, opened.features.embed_dim, opened.features.max_positions)
    return Merge(folder, compute_dtype, trained, codes)


def _measure_trained(model: CausalLM, run: Run, measure: Measure) -> tuple[Trained, CausalLM]:
    """(measures, the model with the run's adapter)."""
    parts = apply_adapter(model, run)
    # `apply_adapter` put fresh adapters on `model`, which change nothing: its logits are the base's.
    fresh = partition(model)
    fresh = fresh.with_lora(fresh.lora | {name: parts.lora[name] for name in (SCORE,) if name in parts.lora})
    return Trained(measure(parts), measure(fresh)), combine(parts)


def _names(slots: Sequence[Slot]) -> list[str]:
    return [name for slot in slots for name in slot.names]


def _load_dense(source: ModelSource, compute_dtype: np.dtype, features: ModelConfig | None = None) -> CausalLM:
    name = "bfloat16" if compute_dtype == jnp.bfloat16 else "float32"
    args = ModelArgs(path=str(source.path), quant_type="none", compute_dtype=name)
    features = features or model_config(source.config, source.config_name)
    return load_model(source, features, weight_format(args, features)).model
