"""Exports a run as a LoRA for llama.cpp: a GGUF file that it applies to a GGUF file of the base.

llama.cpp computes W x + alpha / rank * B (A x), with one alpha for all modules and a rank per module.

Dimension key: L layers, K in, R rank, N out.
"""

import collections
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qlora_jax.atomic_files import staged_folder
from qlora_jax.io.checkpoint import Run
from qlora_jax.io.export.gguf_metadata import export_spec, spec_without_tokenizer
from qlora_jax.io.export.methods import check_head, check_method
from qlora_jax.io.export.original_delta import adapter_for_export
from qlora_jax.io.export.result import ExportResult
from qlora_jax.io.gguf.reader import RowTransform
from qlora_jax.io.gguf.writer import GgufSpec, OutputTensor, typed_keys, write_gguf
from qlora_jax.io.hf.model_writer import dense_tensors
from qlora_jax.io.loader import Progress
from qlora_jax.io.peft.writer import EVERY_LAYER, AdapterArrays, SomeLayers, effective_alphas
from qlora_jax.io.pretrained import OpenedModel, load_base
from qlora_jax.io.rounding import rounding_note
from qlora_jax.io.tensor_map import layer_name, slots_of
from qlora_jax.models.target_layers import partial_layers

FILE = "adapter.gguf"
PLAIN_LEAVES = {"lora_a", "lora_b"}


def export_gguf_lora(
    opened: OpenedModel,
    output: Path,
    *,
    with_base: bool = False,
    base_dtype: str | None = None,
    progress: Progress | None = None,
) -> ExportResult:
    """Writes a run's adapter to the new folder `output` as a GGUF file for llama.cpp; prints nothing.

    Args:
      opened: a run or an adapter, with its base; see `open_finetuned`.
      with_base: also write the dequantized base that the adapter was trained on, as a GGUF file next to it.
      base_dtype: dtype of that base, of BASE_DTYPES; None: the dtype in which training computed.
      progress: called while that base loads, as by `load_model`.

    Raises:
      ValueError: `output` exists, the adapter is not a plain LoRA, a GGUF
        file cannot hold the model, or (with `with_base`) the base is not the one that the run was trained on.
    """
    run = opened.run
    if run is None:
        raise ValueError(f"{opened.source.path}: a base model has no adapter to export. Open a run")
    check_method(run.lora_args.method, "gguf-lora")
    check_head(run.head, "gguf-lora")
    trained = adapter_for_export(run, with_base)
    named = {opened.features.hugging_face_name(name): matrices for name, matrices in trained.lora.items()}
    check_plain(run, named)
    base = export_spec(opened) if with_base else None
    some_layers = partial_layers(opened.features, run.lora_args)
    scaled = shared_alpha(effective_alphas(named, trained.args, some_layers))
    spec = lora_spec(spec_without_tokenizer(opened), named, scaled.alpha, some_layers)
    notes = [*trained.notes]
    with staged_folder(output) as folder:
        write_gguf(folder / FILE, spec, list(spec.tensors), lora_tensors(named, scaled.factors), "float32")
        if base:
            notes += base.notes + _write_base(folder, base.spec, opened, base_dtype, progress)
    lines = [f"LoRA of {run.label} for llama.cpp: {output / FILE}", _alpha_line(scaled), *notes]
    if base is None:
        lines.append("llama.cpp applies it to a GGUF file of the base; --with_base writes the one it was trained on")
    return ExportResult(path=output / FILE, lines=tuple(lines))


def check_plain(run: Run, lora: AdapterArrays) -> None:
    """Checks that an adapter consists of A and B alone.

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


def lora_spec(base: GgufSpec, lora: AdapterArrays, alpha: float, some_layers: SomeLayers = EVERY_LAYER) -> GgufSpec:
    """Keys and tensors of the file: NAME.lora_a [R, K] and NAME.lora_b [N, R], rows of B in the base's GGUF order."""
    keys = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": float(alpha)}
    tensors = {}
    for name, matrices in lora.items():
        for layer in some_layers.get(name, range(len(matrices["lora_a"]))):
            weight = layer_name(f"{name}.weight", layer)
            in_base, rank = base.tensors[weight], matrices["lora_a"].shape[-1]
            n, k = in_base.shape
            tensors[f"{weight}.lora_a"] = OutputTensor(f"{in_base.name}.lora_a", (rank, k), RowTransform())
            tensors[f"{weight}.lora_b"] = OutputTensor(f"{in_base.name}.lora_b", (n, rank), in_base.transform)
    return GgufSpec(base.architecture, typed_keys(keys), tensors, {})


def lora_tensors(lora: AdapterArrays, factors: Mapping[str, float]) -> Iterator[np.ndarray]:
    """Yields A [R, K] and B [N, R] of each layer of each module in f32, in the order of `lora_spec`'s tensors."""
    for name, matrices in lora.items():
        for a_KR, b_RN in zip(matrices["lora_a"], matrices["lora_b"], strict=True):
            yield np.asarray(a_KR, np.float32).T
            yield np.asarray(b_RN, np.float32).T * np.float32(factors[name])


def _write_base(
    folder: Path, spec: GgufSpec, opened: OpenedModel, dtype: str | None, progress: Progress | None
) -> list[str]:
    """Writes the base that training saw: quantized and dequantized again; returns notes about its rounding."""
    model = load_base(opened, opened.args, progress)
    slots, computed = slots_of(model), model.model.embed_tokens.weight[...].dtype
    dtype = dtype or computed.name
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
