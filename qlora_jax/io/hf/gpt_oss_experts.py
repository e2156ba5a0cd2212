"""Experts in Hugging Face's files of gpt-oss, which fuse all experts of a layer in one tensor.

`gate_up_proj` is [E, K, 2F]: transposed; columns of gate and up alternate, as in `gate_up_proj_bias` [E, 2F].
In MXFP4 files, `gate_up_proj_blocks` uint8 [E, 2F, K / 32, 16] has two values of E2M1 per byte, the first in the low
bits, and `gate_up_proj_scales` uint8 [E, 2F, K / 32] has exponents of two plus 127. `down_proj` has the same forms.
Here every expert has separate matrices and biases, under the names of other mixtures.

Dimension key: E experts, F inner width, N out, K in, G = K / 32 blocks.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize

from pallas_kernels.formats.ggml_tensor import GgmlTensor
from qlora_jax.model_source import ByteRange, TensorEntry
from qlora_jax.models.config import FUSED_PROJECTIONS
from qlora_jax.models.families.multimodal import text_config
from qlora_jax.untrusted_json import JsonObject

MODEL_TYPE = "gpt_oss"
FUSED = re.compile(r"(?P<experts>.+\.mlp\.experts)\.(?P<part>gate_up_proj|down_proj)(?P<kind>|_bias|_blocks|_scales)")
MXFP4 = "MXFP4"
BLOCK, BLOCK_BYTES = 32, 16  # values of a block, and bytes of their codes


def is_mxfp4(config: JsonObject, quantization: Mapping[str, object]) -> bool:
    """True if a config and its quantization_config describe gpt-oss with experts in MXFP4."""
    return text_config(config).get("model_type") == MODEL_TYPE and quantization.get("quant_method") == "mxfp4"


def expert_by_expert(folder: Path, tensors: Mapping[str, TensorEntry], count: int) -> dict[str, TensorEntry]:
    """Returns the tensors with one entry per expert, projection, and weight or bias.

    Args:
      count: E, by config.json.

    Raises:
      ValueError: names all tensors of experts with another form, and codes without scales.
    """
    found = {name: match for name in tensors if (match := FUSED.fullmatch(name))}
    problems = [problem for name, match in found.items() if (problem := _problem(match, tensors[name], tensors, count))]
    if problems:
        raise ValueError(f"{folder}: experts that cannot be read:\n  " + "\n  ".join(problems))
    apart = {entry.name: entry for name, match in found.items() for entry in _entries(match, tensors[name], tensors)}
    return {name: entry for name, entry in tensors.items() if name not in found} | apart


def _problem(match: re.Match[str], entry: TensorEntry, tensors: Mapping[str, TensorEntry], count: int) -> str | None:
    kind, parts, shape = match["kind"], len(FUSED_PROJECTIONS[match["part"]]), list(entry.shape)
    axes = {"": 3, "_bias": 2, "_blocks": 4, "_scales": 3}[kind]
    if len(shape) != axes or shape[0] != count or 0 in shape:
        return f"{entry.name}: found shape {shape}, expected {axes} axes, the first of {count} experts, none of them 0"
    rows = shape[2] if kind == "" else shape[1]
    if rows % parts:
        return f"{entry.name}: found {rows} outputs per expert, expected an even number, with gate and up alternating"
    if kind not in ("_blocks", "_scales"):
        return f"{entry.name}: found bytes (U8), expected floating point" if entry.file_type == "U8" else None
    stem = f"{match['experts']}.{match['part']}"
    other = tensors.get(f"{stem}{'_scales' if kind == '_blocks' else '_blocks'}")
    if other is None or entry.file_type != "U8":
        return f"{entry.name}: found only {entry.file_type}, expected bytes (U8) in {stem}_blocks and {stem}_scales"
    if stem in tensors:
        return f"{entry.name}: found {stem} too, expected one of them"
    if kind == "_blocks" and shape != [*other.shape, BLOCK_BYTES]:
        return f"{entry.name}: found shape {shape}, expected {[*other.shape, BLOCK_BYTES]}, as in {other.name}"
    return None


def _entries(match: re.Match[str], entry: TensorEntry, tensors: Mapping[str, TensorEntry]) -> Iterator[TensorEntry]:
    make: Callable[[TensorEntry, ExpertRows], TensorEntry]
    if match["kind"] == "_scales":  # read with their blocks
        return
    if match["kind"] == "_blocks":
        make = functools.partial(_mxfp4, tensors[entry.name.replace("_blocks", "_scales")])
    else:
        make = _bias if match["kind"] else transposed_matrix
    parts, leaf = FUSED_PROJECTIONS[match["part"]], "bias" if match["kind"] == "_bias" else "weight"
    outputs = entry.shape[2 if match["kind"] == "" else 1] // len(parts)
    for place, part in enumerate(parts):
        for expert in range(entry.shape[0]):
            made = make(entry, ExpertRows(expert, place, len(parts), outputs))
            yield dataclasses.replace(made, name=f"{match['experts']}.{expert}.{part}.{leaf}")


@dataclasses.dataclass(frozen=True)
class ExpertRows:
    """The outputs of one projection among those of an expert in the file: every `step`-th from `start`."""

    expert: int
    start: int
    step: int
    outputs: int

    def of(self, first: int, end: int) -> slice:
        """Returns the places in the file of some outputs."""
        return slice(self.start + self.step * first, self.start + self.step * end, self.step)

    def ranges(self, entry: TensorEntry, first: int, end: int) -> tuple[ByteRange, ...]:
        """Returns the bytes of some rows of an entry whose second axis has the outputs, from the first to the last."""
        (stored,) = entry.ranges_of(self.expert, self.expert + 1)
        row = stored.nbytes // entry.shape[1]
        return (ByteRange(stored.path, stored.offset + self.step * first * row, self.step * (end - first) * row),)


def transposed_matrix(entry: TensorEntry, rows: ExpertRows) -> TensorEntry:
    """Returns the matrix [N, K] of one projection of an expert, from a fused tensor [E, K, outputs of an expert]."""
    experts, k, n = entry.shape

    def read(first: int, end: int) -> np.ndarray:
        columns = entry.read_rows(rows.expert, rows.expert + 1)[0][:, rows.of(first, end)]
        return np.ascontiguousarray(columns.T)

    return dataclasses.replace(
        entry,
        shape=(rows.outputs, k),
        nbytes=entry.nbytes // (experts * n) * rows.outputs,
        read_rows=read,
        ranges_of=lambda first, end: entry.ranges_of(rows.expert, rows.expert + 1),
    )


def _bias(entry: TensorEntry, rows: ExpertRows) -> TensorEntry:
    def read(first: int, end: int) -> np.ndarray:
        return np.ascontiguousarray(entry.read_rows(rows.expert, rows.expert + 1)[0, rows.of(first, end)])

    return dataclasses.replace(
        entry,
        shape=(rows.outputs,),
        nbytes=entry.nbytes // (entry.shape[0] * entry.shape[1]) * rows.outputs,
        read_rows=read,
        ranges_of=lambda first, end: entry.ranges_of(rows.expert, rows.expert + 1),
    )


def _mxfp4(scales: TensorEntry, blocks: TensorEntry, rows: ExpertRows) -> TensorEntry:
    experts, _, groups, _ = blocks.shape
    k = groups * BLOCK

    def read_stored(first: int, end: int) -> GgmlTensor:
        of_blocks, of_scales = (
            entry.read_rows(rows.expert, rows.expert + 1)[0, rows.of(first, end)] for entry in (blocks, scales)
        )
        return GgmlTensor(codes=as_ggml(of_blocks, of_scales), ggml_type=MXFP4, shape=(end - first, k), dtype="float32")

    def ranges_of(first: int, end: int) -> tuple[ByteRange, ...]:
        return (*rows.ranges(blocks, first, end), *rows.ranges(scales, first, end))

    return TensorEntry(
        name=blocks.name,
        shape=(rows.outputs, k),
        file_type=MXFP4,
        nbytes=(blocks.nbytes + scales.nbytes) // (experts * rows.step),
        read_rows=lambda first, end: dequantize(read_stored(first, end).codes, GGMLQuantizationType.MXFP4),
        ranges_of=ranges_of,
        read_stored=read_stored,
    )


def as_ggml(blocks_NGb: np.ndarray, scales_NG: np.ndarray) -> np.ndarray:
    """Returns the same codes in ggml's blocks, uint8 [N, 17 G]: the scale, then values j and j + 16 in byte j.

    Args:
      blocks_NGb: uint8 [N, G, 16], values 2 j and 2 j + 1 in byte j, the first in the low bits.
      scales_NG: uint8 [N, G].
    """
    values_NGv = np.stack([blocks_NGb & 15, blocks_NGb >> 4], axis=-1).reshape(*scales_NG.shape, BLOCK)
    low_NGb, high_NGb = values_NGv[..., :BLOCK_BYTES], values_NGv[..., BLOCK_BYTES:]
    codes_NGb = np.concatenate([scales_NG[..., None], low_NGb | (high_NGb << 4)], axis=-1)
    return codes_NGb.reshape(len(scales_NG), -1)
