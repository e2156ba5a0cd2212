"""Exports a run as a LoRA for llama.cpp: a GGUF file that it applies to a GGUF file of the base.

llama.cpp computes W x + alpha / rank * B (A x), with one alpha for all modules and a rank per module.

Dimension key: L layers, E experts, K in, R rank, N out.
"""

import collections
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qlora_jax.atomic_files import staged_folder, write_text
from qlora_jax.config.exports import ExportOptions
from qlora_jax.io.export.gguf_metadata import export_spec, spec_without_tokenizer
from qlora_jax.io.export.methods import check_head, check_method
from qlora_jax.io.export.modelfile import write_modelfile
from qlora_jax.io.export.original_base import adapter_for_export
from qlora_jax.io.export.result import ExportResult
from qlora_jax.io.gguf.reader import RowTransform
from qlora_jax.io.gguf.writer import GgufSpec, OutputTensor, typed_keys, write_gguf
from qlora_jax.io.hf.model_writer import dense_tensors
from qlora_jax.io.peft.writer import is_gguf
from qlora_jax.io.pretrained import OpenedModel, load_base
from qlora_jax.io.rounding import rounding_note
from qlora_jax.io.run_folder.checkpoint import Run
from qlora_jax.io.tensor_map import slots_of
from qlora_jax.methods.lora import effective_alphas
from qlora_jax.methods.targets import adapter_layers, some_layers
from qlora_jax.models.config import STORED, ModelConfig
from qlora_jax.models.partition import AdapterArrays
from qlora_jax.models.tensor_names import expert_name, layer_name

FILE, TEMPLATE_FILE = "adapter.gguf", "chat_template.jinja"
PLAIN_LEAVES = {"lora_a", "lora_b"}


def export_gguf_lora(opened: OpenedModel, output: Path, options: ExportOptions) -> ExportResult:
    """Writes a run's adapter to the new folder `output` as a GGUF file for llama.cpp; prints nothing.

    Args:
      opened: a run or an adapter, with its base; see `open_finetuned`.
      options: `with_base` writes the base as a GGUF file next to it.

    Raises:
      ValueError: `output` exists, the adapter is not a plain LoRA, a GGUF file cannot hold the model or (without
        `with_base`) its weights, or (with `with_base`) the base is not the one that the run was trained on.
    """
    run, with_base = opened.run, options.with_base
    if run is None:
        raise ValueError(f"{opened.source.path}: a base model has no adapter to export. Open a run")
    check_method(run.lora_args.method, "gguf-lora")
    check_head(run.head, "gguf-lora", opened.source.config)
    if not with_base:
        _check_gguf_exists(opened)
    trained = adapter_for_export(run, with_base)
    named = {opened.features.hugging_face_name(name): matrices for name, matrices in trained.lora.items()}
    check_plain(run, named)
    base = export_spec(opened) if with_base else None
    layers_of = adapter_layers(opened.features, run.lora_args)
    partial = some_layers(layers_of, opened.features.num_layers)
    scaled = shared_alpha(effective_alphas(named, trained.args, partial))
    layers = list(by_layer(named, scaled.factors, layers_of, opened.features))
    spec = lora_spec(spec_without_tokenizer(opened), layers, scaled.alpha)
    notes = [*trained.notes]
    with staged_folder(output) as folder:
        write_gguf(folder / FILE, spec, list(spec.tensors), lora_tensors(layers), "float32")
        weights = str(opened.source.path.absolute()) if is_gguf(str(opened.source.path)) else None
        if base:
            notes += base.notes + _write_base(folder, base.spec, opened, options)
            (weights,) = (f"./{path.name}" for path in folder.glob("base-*.gguf"))
        else:
            notes += _write_template(folder, output, opened) + _unlisted(opened)
        if weights is not None:
            notes += write_modelfile(folder, opened, weights, f"./{FILE}")
    lines = [f"LoRA of {run.label} for llama.cpp: {output / FILE}", _alpha_line(scaled), *notes]
    if base is None:
        lines.append(_where_to_apply(opened))
    return ExportResult(path=output / FILE, lines=tuple(lines))


def _write_template(folder: Path, output: Path, opened: OpenedModel) -> list[str]:
    """Writes the run's chat template, unless it is the base's; returns notes that say how to use it."""
    if not opened.replaces_template:
        return []
    write_text(folder / TEMPLATE_FILE, opened.tokenizer.chat_template or "")
    option = f"--jinja --chat-template-file {output / TEMPLATE_FILE}"
    return [f"its chat template is not the base's: give llama.cpp {option}"]


def _unlisted(opened: OpenedModel) -> list[str]:
    """Returns a note on the end of a turn, if the base's file does not list it."""
    first = opened.unlisted_stop_ids[:1]
    option = "--override-kv tokenizer.ggml.eot_token_id=int:"
    return [f"its base does not list the end of a turn: give llama.cpp {option}{number}" for number in first]


def _check_gguf_exists(opened: OpenedModel) -> None:
    """Checks that the weights that a run was trained on have codes that a GGUF file can hold.

    Raises:
      ValueError: they do not.
    """
    if opened.args.quant_type == STORED and (method := opened.source.coded_by):
        raise ValueError(
            f"--format gguf-lora: {opened.source.path} has the codes of {method}, which the run was trained on and "
            "no GGUF file holds. Add --with_base, which writes these weights dequantized, or use --format gguf, merged"
        )


def _where_to_apply(opened: OpenedModel) -> str:
    if opened.args.quant_type == STORED and opened.source.path.is_file():
        return f"llama.cpp applies it to {opened.source.path}, whose codes it was trained on"
    return "llama.cpp applies it to a GGUF file of the base; --with_base writes the one it was trained on"


def check_plain(run: Run, lora: AdapterArrays) -> None:
    """Checks that an adapter consists only of A and B.

    Raises:
      ValueError: names every module that trains something else, which llama.cpp cannot read.
    """
    other = {name: sorted(leaves) for name, leaves in lora.items() if leaves.keys() != PLAIN_LEAVES}
    other |= {name: ["the whole table"] for name in run.tables}
    if other:
        raise ValueError(
            f"{run.label} is not a plain LoRA, the only adapter that llama.cpp reads: it trains "
            f"{'; '.join(f'{name}: {leaves}' for name, leaves in other.items())}. Export with --format gguf, merged"
        )


class SharedAlpha(NamedTuple):
    """The file's alpha, and the factor of each module's B that preserves its scaling under that alpha."""

    alpha: float
    factors: dict[str, float]


def shared_alpha(alphas: Mapping[str, float]) -> SharedAlpha:
    """Chooses the alpha that most modules have, and scales the B of the others."""
    (alpha, _), *_ = collections.Counter(alphas.values()).most_common(1)
    return SharedAlpha(alpha, {name: each / alpha for name, each in alphas.items()})


class LayerFactors(NamedTuple):
    """A and B in f32 of one weight of the base in one layer, or of that weight of each expert.

    Attributes:
      names: Hugging Face's names of the weights.
      a: [len(names), K, R].
      b: [len(names), R, N], multiplied by what keeps its scaling under the file's alpha.
    """

    names: list[str]
    a: np.ndarray
    b: np.ndarray


def by_layer(
    lora: AdapterArrays, factors: Mapping[str, float], layers_of: Mapping[str, Sequence[int]], model: ModelConfig
) -> Iterator[LayerFactors]:
    """Yields the adapter of each layer of each module.

    llama.cpp has gate and up of experts as two weights, so each gets a copy of their common A; and experts that share
    an adapter get a copy each.

    Args:
      lora: by Hugging Face's names without the layer's index.
      layers_of: the layers of each module.
    """
    for name, leaves in lora.items():
        b = np.asarray(leaves["lora_b"], np.float32) * np.float32(factors[name])
        for part, b_of_part in _split_experts(name, b):
            for row, layer in enumerate(layers_of[name]):
                names = _weights(part, layer, model)
                a_KR, b_RN = np.asarray(leaves["lora_a"][row], np.float32), b_of_part[row]
                a_EKR, b_ERN = (np.broadcast_to(each, (len(names), *each.shape[-2:])) for each in (a_KR, b_RN))
                yield LayerFactors(names, a_EKR, b_ERN)


def _split_experts(name: str, b: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Returns (weight without the layer's index, its B); of gate and up, each with its half of the outputs."""
    module, _, part = name.rpartition(".")
    if b.ndim == 3 or part != "gate_up_proj":
        return [(name, b)]
    return [(f"{module}.{half}", each) for half, each in zip(("gate_proj", "up_proj"), np.split(b, 2, -1), strict=True)]


def _weights(name: str, layer: int, model: ModelConfig) -> list[str]:
    weight = layer_name(f"{name}.weight", layer)
    if ".experts." not in weight:
        return [weight]
    assert model.experts is not None
    return [expert_name(weight, expert) for expert in range(model.experts.count)]


def lora_spec(base: GgufSpec, layers: Iterable[LayerFactors], alpha: float) -> GgufSpec:
    """Keys and tensors of the file: NAME.lora_a [R, K] and NAME.lora_b [N, R], rows of B in the base's GGUF order."""
    keys = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": float(alpha)}
    tensors = {}
    for names, a_EKR, _ in layers:
        rank = a_EKR.shape[2]
        for name in names:
            in_base = base.tensors[name]
            shape = rank, in_base.shape[1]
            tensors[f"{name}.lora_a"] = OutputTensor(f"{in_base.name}.lora_a", shape, RowTransform())
        for name in names:
            in_base = base.tensors[name]
            shape = in_base.shape[0], rank
            tensors[f"{name}.lora_b"] = OutputTensor(f"{in_base.name}.lora_b", shape, in_base.transform)
    return GgufSpec(base.architecture, typed_keys(keys), tensors, {})


def lora_tensors(layers: Iterable[LayerFactors]) -> Iterator[np.ndarray]:
    """Yields A [R, K] and B [N, R] in the order of `lora_spec`'s tensors."""
    for _, a_EKR, b_ERN in layers:
        yield from a_EKR.swapaxes(1, 2)
        yield from b_ERN.swapaxes(1, 2)


def _write_base(folder: Path, spec: GgufSpec, opened: OpenedModel, options: ExportOptions) -> list[str]:
    """Writes the base that training saw: quantized and dequantized again; returns notes about its rounding."""
    model = load_base(opened, opened.args, options.progress)
    slots, computed = slots_of(model), model.model.embed_tokens.weight[...].dtype
    dtype = options.base_dtype or computed.name
    names = [name for slot in slots for name in slot.names]
    values = (np.asarray(tensor) for tensor in dense_tensors(slots, computed, {}))
    write_gguf(folder / f"base-{dtype}.gguf", spec, names, values, dtype)
    return rounding_note(dtype, computed.name)


def _alpha_line(scaled: SharedAlpha) -> str:
    folded = {name: factor for name, factor in scaled.factors.items() if factor != 1}
    text = f"alpha {scaled.alpha:g}, divided by each module's rank"
    if not folded:
        return text
    return f"{text}; {len(folded)} modules had another scaling, which is multiplied into their B: {', '.join(folded)}"
