"""Encodes f32 `rows` as ggml does without importance, with `numbers`: {a name: ggml's number of the type}."""

import ctypes
import importlib.util
from pathlib import Path

import numpy as np
from bridge import inputs, save

library = Path(importlib.util.find_spec("llama_cpp").submodule_search_locations[0], "lib", "libggml-base.so")
ggml = ctypes.CDLL(library)
ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
ggml.ggml_row_size.restype = ctypes.c_size_t

given = inputs()
rows = np.ascontiguousarray(given["rows"], np.float32)
pointer = ctypes.POINTER(ctypes.c_float)
found = {}
for name, number in given["numbers"].items():
    out = np.zeros((len(rows), ggml.ggml_row_size(number, ctypes.c_int64(rows.shape[1]))), np.uint8)
    written = ggml.ggml_quantize_chunk(
        number,
        rows.ctypes.data_as(pointer),
        out.ctypes.data_as(ctypes.c_void_p),
        *map(ctypes.c_int64, (0, *rows.shape)),
        None,
    )
    assert written == out.nbytes, name
    found[name] = out
save(**found)
