"""Declares the formats of `export`: their contents, and the dtypes in which they store weights."""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, Literal

from qlora_jax.config.registry import Registry

_Folder = Literal["bfloat16", "float16", "float32", "nf4", "nvfp4", "int4", "mxfp4"]
Dtype = Literal[_Folder, "q8_0", "q4_0", "q6_k", "q5_k_m", "q4_k_m", "q4_k_s", "iq4_nl"]

_FOLDER: tuple[Dtype, ...] = ("bfloat16", "float16", "float32")
_GGUF: tuple[Dtype, ...] = ("float16", "bfloat16", "float32", "q8_0", "q4_0")
MIXTURES: tuple[Dtype, ...] = ("iq4_nl", "q4_k_s", "q4_k_m", "q5_k_m", "q6_k")  # Smallest first, by llama.cpp
_NOT_IN_GGUF = "not in the file: {}. llama.cpp reads these parts from a separate file (mmproj)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """The choices of one export.

    Attributes:
      with_base: also write the dequantized base that an adapter was trained on.
      base_dtype: of that base; None: the dtype in which training computed.
      dtype: of a merged model.
      base: a model in 16 bits or more whose weights take the adapter; None: the dequantized weights of training.
      adapter_alone: export the adapter of a run with lora.merge_into, without the rounding that it was trained with.
      progress: called while a base loads, as by `load_model`, and in later stages with the stage's name as well.
      score: from ModelParts to the RowScores of the run's held-out rows; None: they are not scored.
      importance: from ModelParts to the importance of each column, on the same rows; None: columns count alike.
    """

    with_base: bool = False
    base_dtype: Dtype | None = None
    dtype: Dtype | None = None
    base: str | None = None
    adapter_alone: bool = False
    progress: Callable[..., None] | None = None
    score: Callable[..., Any] | None = None
    importance: Callable[..., Any] | None = None


DEFAULT_OPTIONS = ExportOptions()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportDeclaration:
    """The facts about a format that settings and messages read.

    Attributes:
      implementation: a function of an opened run, a new folder and ExportOptions, which writes the folder and returns
        an ExportResult (io/export/result.py); or its place as "module:attribute".
      merged: it holds a whole model, with the adapter merged; False: an adapter.
      dtypes: of the whole model, the default first; or of the base next to the adapter. Empty: it offers none.
      other_parts: a line on the parts {} beside the text half of a multimodal model.
    """

    implementation: str | Callable[..., object]
    merged: bool
    dtypes: tuple[Dtype, ...] = ()
    other_parts: str = "not exported: {}"


EXPORTS: Registry[ExportDeclaration] = Registry(
    "qlora_jax.exports",
    ExportDeclaration,
    {
        "peft": ExportDeclaration(
            implementation="qlora_jax.io.export.peft:export_peft",
            merged=False,
            dtypes=_FOLDER,
            other_parts="PEFT loads the adapter on the whole model, and leaves these parts as they are: {}",
        ),
        "hf": ExportDeclaration(
            implementation="qlora_jax.io.export.merged:run_hf",
            merged=True,
            dtypes=(*_FOLDER, "nf4", "nvfp4", "int4", "mxfp4"),
            other_parts="parts beside the text half, copied unchanged: {}",
        ),
        "gguf": ExportDeclaration(
            implementation="qlora_jax.io.export.merged:run_gguf",
            merged=True,
            dtypes=(*_GGUF, *MIXTURES),
            other_parts=_NOT_IN_GGUF,
        ),
        "gguf-lora": ExportDeclaration(
            implementation="qlora_jax.io.export.gguf_lora:export_gguf_lora",
            merged=False,
            dtypes=_GGUF,
            other_parts=_NOT_IN_GGUF,
        ),
    },
)
ExportFormat = Annotated[str, EXPORTS]


def formats(*, merged: bool) -> tuple[str, ...]:
    """Returns the names of the formats of whole models, or of adapters."""
    return tuple(name for name, declared in EXPORTS.items() if declared.merged == merged)


def dtype_problems(format: str, dtype: Dtype | None, base_dtype: Dtype | None) -> list[str]:
    """Lists the settings whose dtype the format cannot store; None stands for the default."""
    declared = EXPORTS[format]
    possible = {"dtype": declared.dtypes * declared.merged, "base_dtype": declared.dtypes * (not declared.merged)}
    none = {
        "dtype": "none, since an adapter keeps its dtype",
        "base_dtype": "none, since a merged model has no base",
    }
    return [
        f"{key}: found {value} with --format {format}, expected {', '.join(possible[key]) or none[key]}"
        for key, value in {"dtype": dtype, "base_dtype": base_dtype}.items()
        if value not in (None, *possible[key])
    ]


def register_export(
    name: str,
    run: Callable[..., object],
    *,
    merged: bool,
    dtypes: tuple[Dtype, ...] = (),
    other_parts: str | None = None,
) -> None:
    """Adds an export format to this process; the command finds one by an entry point of the group qlora_jax.exports.

    Args:
      run, merged, dtypes, other_parts: see `ExportDeclaration`.

    Raises:
      ValueError: the name is taken.
    """
    texts = {} if other_parts is None else {"other_parts": other_parts}
    EXPORTS.register(name, ExportDeclaration(implementation=run, merged=merged, dtypes=dtypes, **texts))
