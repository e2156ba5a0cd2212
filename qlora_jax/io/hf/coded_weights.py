"""Linear layers that files store in codes: one entry for the tensors of each weight, and checks of their settings.

Each method of quantization has a file that describes its tensors; integer_groups.py and float_codes.py turn them into
blocks (pallas_kernels/formats/ggml_blocks.py) with the same numbers, so nothing is rounded.

Dimension key: N out, K in.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pallas_kernels.formats.ggml_tensor import GgmlTensor
from qlora_jax.model_source import TensorEntry
from qlora_jax.models.tensor_names import MAX_LINES, lines_by_layer
from qlora_jax.untrusted_json import check_value, shorten

GIVE_16_BITS = "Give the folder of the 16-bit model that these weights were made from: loading quantizes it"
CODE_TYPES = ("U8", "F8_E4M3")  # types of a tensor `weight` that has codes

Parts = Mapping[str, TensorEntry]  # the tensors of one weight, by the last part of their names
Settings = Mapping[str, Any]  # quantization_config, checked against the method's TypedDict


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodedWeight:
    """A weight in codes, whose tensors were checked.

    Attributes:
      shape: (N, K).
      file_type: the name of its block format, or of another form.
      read_rows: (first, end) -> these rows, dequantized, f32.
      read_stored: (first, end) -> these rows in blocks; None if they have no such form.
    """

    shape: tuple[int, int]
    file_type: str
    read_rows: Callable[[int, int], np.ndarray]
    read_stored: Callable[[int, int], GgmlTensor] | None


class CodedMethod(NamedTuple):
    """One method's form of weights in codes.

    Attributes:
      title: its name in messages.
      settings: TypedDict of the keys of quantization_config that are used.
      problems: (settings) -> a line per setting that is not supported.
      parts: last part of a tensor's name -> True if every weight has this tensor. The first is one that no other layer
        has.
      weight: (tensors, settings) -> the weight; raises ValueError with everything that is wrong.
    """

    title: str
    settings: type
    problems: Callable[[Settings], list[str]]
    parts: Mapping[str, bool]
    weight: Callable[[Parts, Settings], CodedWeight]


def check_settings(path: Path, quantization: Settings, method: CodedMethod) -> Settings:
    """Returns the settings of a method from quantization_config.

    Raises:
      ValueError: settings have other types, or are not supported; all are listed.
    """
    settings = check_value(quantization, method.settings, f"{path}, quantization_config")
    if problems := method.problems(settings):
        raise ValueError(
            f"{path}: quantization_config of {method.title} is not supported ({'; '.join(problems)}). {GIVE_16_BITS}"
        )
    return settings


def group_codes(folder: Path, tensors: Parts, method: CodedMethod, settings: Settings) -> dict[str, TensorEntry]:
    """Replaces the tensors of each weight in codes by one entry; other tensors stay unchanged.

    Raises:
      ValueError: lists everything that is wrong with the tensors.
    """
    stems: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in tensors.items():
        stem, _, part = name.rpartition(".")
        if part in method.parts and (part != "weight" or entry.file_type in CODE_TYPES):
            stems.setdefault(stem, {})[part] = entry
    found, problems = {}, {}
    for stem, parts in stems.items():
        try:
            found[f"{stem}.weight"] = _entry(f"{stem}.weight", parts, method, settings, tensors)
        except ValueError as error:
            problems.setdefault(str(error), []).append(stem)
    if not stems:
        problems = {f"no tensor is named .{next(iter(method.parts))}": ["model"]}
    lines = [line for problem, stems in problems.items() for line in lines_by_layer(problem, stems)]
    if lines:
        more = [f"and {len(lines) - MAX_LINES} more"] if len(lines) > MAX_LINES else []
        text = "\n  ".join([*lines[:MAX_LINES], *more])
        raise ValueError(
            f"{folder}: {method.title} weights cannot be read. Use undamaged files, or the 16-bit model:\n  {text}"
        )
    used = {entry.name for parts in stems.values() for entry in parts.values()}
    return {name: entry for name, entry in tensors.items() if name not in used} | found


def _entry(name: str, parts: Parts, method: CodedMethod, settings: Settings, tensors: Parts) -> TensorEntry:
    """Returns the entry of one weight; raises ValueError with its problems."""
    missing = [part for part, required in method.parts.items() if required and part not in parts]
    problems = [f"missing {', '.join(missing)}"] if missing else []
    if name in tensors and "weight" not in parts:
        problems.append("weight in 16 bits next to its codes")
    if problems:
        raise ValueError("; ".join(problems))
    weight = method.weight(parts, settings)
    return TensorEntry(
        name=name,
        shape=weight.shape,
        file_type=weight.file_type,
        nbytes=sum(entry.nbytes for entry in parts.values()),
        read_rows=weight.read_rows,
        ranges_of=lambda first, end: tuple(each for entry in parts.values() for each in entry.ranges_of(0, entry.rows)),
        read_stored=weight.read_stored,
    )


def tensor_problems(parts: Parts, expected: Mapping[str, tuple[Sequence[str], tuple[int, ...]]]) -> list[str]:
    """Returns a line for each tensor that has not one of the types, or not the shape, that are expected of it."""
    return [
        f"{part}: found {parts[part].file_type} {list(parts[part].shape)}, expected {' or '.join(types)} {list(shape)}"
        for part, (types, shape) in expected.items()
        if part in parts and (parts[part].file_type not in types or parts[part].shape != shape)
    ]


def setting_problems(settings: Settings, expected: Mapping[str, tuple[object, ...]]) -> list[str]:
    """Returns a line for each setting that is present and has none of the values expected of it."""
    return [
        f"{key}: found {shorten(settings[key])}, expected {' or '.join(map(str, values))}"
        for key, values in expected.items()
        if key in settings and settings[key] not in values
    ]
