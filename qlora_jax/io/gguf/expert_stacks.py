"""Experts of mixtures in GGUF files: a projection is one tensor [E, N, K], which is read and written expert by expert.

Within this package, `blk.3.ffn_up_exps.17.weight` names expert 17 of the file's `blk.3.ffn_up_exps.weight`.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator

from qlora_jax.io.gguf.header import TensorInfo
from qlora_jax.models.config import MAX_EXPERTS

STACK = re.compile(r"(?P<part>.+_exps)\.(?P<leaf>weight|bias)")
ONE = re.compile(r"(?P<part>.+_exps)\.(?P<expert>\d+)\.(?P<leaf>.+)")
SHARED_GATE = re.compile(r"blk\.\d+\.ffn_gate_inp_shexp\.weight")  # a matrix with one row, stored as a vector
# Tensors that llama.cpp's converter never quantizes.
ROUTERS = re.compile(r"blk\.\d+\.ffn_gate_inp(_shexp)?\.weight")


def split_experts(infos: Iterable[TensorInfo], count: int) -> Iterator[TensorInfo]:
    """Yields the tensors of a file in Hugging Face's shapes, those of experts one by one.

    A stack of another number of experts stays whole; the loader then reports it as unexpected.

    Args:
      count: E, by the file's metadata.
    """
    for info in infos:
        match = STACK.fullmatch(info.name)
        if SHARED_GATE.fullmatch(info.name) and len(info.shape) == 1:
            yield dataclasses.replace(info, shape=(1, *info.shape))
        elif match and len(info.shape) > 1 and info.shape[0] == count <= MAX_EXPERTS:
            yield from _experts(info, match["part"], match["leaf"])
        else:
            yield info


def _experts(info: TensorInfo, part: str, leaf: str) -> Iterator[TensorInfo]:
    count, *shape = info.shape
    nbytes = info.nbytes // count
    for expert in range(count):
        yield dataclasses.replace(
            info,
            name=f"{part}.{expert}.{leaf}",
            shape=tuple(shape),
            offset=info.offset + expert * nbytes,
            nbytes=nbytes,
        )


def stored_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns a tensor's shape in a GGUF file from Hugging Face's; for an expert's tensor, the shape of its part."""
    return shape[1:] if SHARED_GATE.fullmatch(name) else shape


def stack_name(name: str) -> str:
    """Returns the name of the file's tensor that contains a tensor: `blk.3.ffn_up_exps.weight` of an expert's."""
    match = ONE.fullmatch(name)
    return name if match is None else f"{match['part']}.{match['leaf']}"
