"""The dtypes in which each export format stores the weights of a model.

The command checks its settings with this table before it imports JAX, so this file imports nothing heavy.
"""

from typing import Literal

AdapterFormat = Literal["peft", "gguf-lora"]
MergedFormat = Literal["hf", "gguf"]
Dtype = Literal["bfloat16", "float16", "float32", "q8_0", "q4_0"]

_FOLDER: tuple[Dtype, ...] = ("bfloat16", "float16", "float32")
_GGUF: tuple[Dtype, ...] = ("float16", "bfloat16", "float32", "q8_0", "q4_0")
# The dtypes of a merged model, the default first.
MERGED_DTYPES: dict[MergedFormat, tuple[Dtype, ...]] = {"hf": _FOLDER, "gguf": _GGUF}
# The dtypes of the base next to an adapter; the default is the dtype in which training computed.
BASE_DTYPES: dict[AdapterFormat, tuple[Dtype, ...]] = {"peft": _FOLDER, "gguf-lora": _GGUF}


def dtype_problems(format: AdapterFormat | MergedFormat, dtype: Dtype | None, base_dtype: Dtype | None) -> list[str]:
    """Lists the settings whose dtype the format cannot store; None stands for the default."""
    if format == "hf" or format == "gguf":
        possible = {"dtype": MERGED_DTYPES[format], "base_dtype": ()}
    else:
        possible = {"dtype": (), "base_dtype": BASE_DTYPES[format]}
    none = {
        "dtype": "none, since an adapter keeps its dtype",
        "base_dtype": "none, since a merged model has no base",
    }
    return [
        f"{key}: found {value} with --format {format}, expected {', '.join(possible[key]) or none[key]}"
        for key, value in {"dtype": dtype, "base_dtype": base_dtype}.items()
        if value not in (None, *possible[key])
    ]
