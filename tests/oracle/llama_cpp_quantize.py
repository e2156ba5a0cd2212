"""Quantizes GGUF files with llama.cpp: `files` has (path, path of the result, name of the mixture of types) of each."""

import ctypes

import llama_cpp
from bridge import inputs, save

for source, target, types in inputs()["files"]:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{types}")
    params.nthread = 1
    status = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params))
    assert status == 0, (source, status)
save()
