"""Joins the experts of a layer to the fused tensors of Hugging Face's files of gpt-oss and Qwen3-VL-MoE.

gpt_oss_experts.py and fused_experts.py separate them. The weights of other models are written as they are.

Dimension key: E experts, N out, K in.
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from qlora_jax.io.hf.fused_experts import TRANSPOSED
from qlora_jax.io.hf.gpt_oss_experts import MODEL_TYPE
from qlora_jax.io.hf.shard_writer import TensorSpec
from qlora_jax.io.tensor_map import Slot
from qlora_jax.metadata import JsonObject
from qlora_jax.models.experts_config import FUSED_PROJECTIONS
from qlora_jax.models.families.multimodal import text_config

EXPERT = re.compile(r"(?P<experts>.+\.experts)\.(?P<expert>\d+)\.(?P<part>\w+)\.(?P<leaf>weight|bias)")
FUSED_OF = {part: (fused, place) for fused, parts in FUSED_PROJECTIONS.items() for place, part in enumerate(parts)}


class Place(NamedTuple):
    """The place of one expert's weight or bias in a tensor of the file."""

    tensor: str
    expert: int
    part: int


def in_file_order(slots: Sequence[Slot], config: JsonObject) -> list[tuple[Slot, int]]:
    """Returns (slot, index of a name) of all tensors, those that a file joins one after another."""
    names = [(slot, index) for slot in slots for index in range(len(slot.names))]
    if not _is_joined(config):
        return names
    return sorted(names, key=lambda each: _place(each[0].names[each[1]]) or Place(each[0].names[each[1]], 0, 0))


def _is_joined(config: JsonObject) -> bool:
    return text_config(config).get("model_type") in (MODEL_TYPE, *TRANSPOSED)


def _takes_turns(config: JsonObject) -> bool:
    """True if outputs of gate and up take turns in a joined tensor; else those of gate are first."""
    return text_config(config).get("model_type") == MODEL_TYPE


def _place(name: str) -> Place | None:
    match = EXPERT.fullmatch(name)
    if match is None or match["part"] not in FUSED_OF:
        return None
    fused, part = FUSED_OF[match["part"]]
    return Place(f"{match['experts']}.{fused}{'_bias' * (match['leaf'] == 'bias')}", int(match["expert"]), part)


def joined_specs(specs: Sequence[TensorSpec], config: JsonObject) -> list[TensorSpec]:
    """Returns the tensors of the file.

    Args:
      specs: the model's tensors, in the order of `in_file_order`.
    """
    return [each[0] if tensor is None else _joined_spec(tensor, each) for tensor, each in _groups(specs, config)]


def _groups(specs: Sequence[TensorSpec], config: JsonObject) -> Iterator[tuple[str | None, list[TensorSpec]]]:
    """Yields (name of the joined tensor, its parts), or (None, [a tensor that is not joined])."""
    if not _is_joined(config):
        yield from ((None, [spec]) for spec in specs)
        return
    for name, each in itertools.groupby(specs, key=_name_in_file):
        parts = list(each)
        yield (None if name == parts[0].name else name), parts


def _name_in_file(spec: TensorSpec) -> str:
    place = _place(spec.name)
    return spec.name if place is None else place.tensor


def _joined_spec(name: str, specs: Sequence[TensorSpec]) -> TensorSpec:
    parts = len(FUSED_PROJECTIONS[name.rpartition(".")[2].removesuffix("_bias")])
    n, *k = specs[0].shape
    return TensorSpec(name, specs[0].dtype, (len(specs) // parts, *k, n * parts))


def joined_values(
    specs: Sequence[TensorSpec], values: Iterable[np.ndarray], config: JsonObject
) -> Iterator[np.ndarray]:
    """Yields the arrays of the file's tensors from those of the model's, one tensor at a time."""
    stream = iter(values)
    for tensor, parts in _groups(specs, config):
        if tensor is None:
            yield next(stream)
        else:
            yield _joined(stream, _joined_spec(tensor, parts), len(parts), _takes_turns(config))


def _joined(stream: Iterator[np.ndarray], spec: TensorSpec, arrays: int, turns: bool) -> np.ndarray:
    """Joins matrices [N, K] or biases [N] of all experts, gate and up, to [E, K, 2N] or [E, 2N].

    Args:
      stream: its next `arrays` arrays are joined; one of them is in memory at a time.
      turns: True if outputs of gate and up take turns.
    """
    joined = np.empty(spec.shape, spec.dtype)
    parts = arrays // spec.shape[0]
    rows = spec.shape[-1] // parts
    # transformers transposes the matrices of Qwen3-VL-MoE that it reads, except square ones.
    upright = not turns and spec.shape[1:] == (spec.shape[-1],) * 2
    for index, each in enumerate(itertools.islice(stream, arrays)):
        expert, part = divmod(index, parts)
        place = joined[expert].T if upright else joined[expert]
        place[..., slice(part, None, parts) if turns else slice(part * rows, (part + 1) * rows)] = each.T
    return joined
