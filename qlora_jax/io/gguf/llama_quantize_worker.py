"""Runs llama.cpp's quantizer: `worker.py SOURCE TARGET TYPE BUFFER_BYTES IMPORTANCE`. Its log goes to standard error.

IMPORTANCE is a safetensors file with the importance of each column of some tensors, by their names; it may be empty.
Without a TARGET, the log alone says which type each tensor would have.

A separate process, because llama.cpp aborts on some errors, and Ctrl-C must stop it.
"""

import ctypes
import signal
import sys

from llama_cpp import llama_cpp as llama  # pyright: ignore[reportMissingImports]
from safetensors.numpy import load_file

source, target, dtype, buffer_bytes, importance = sys.argv[1:]
signal.signal(signal.SIGINT, signal.SIG_DFL)
llama.llama_log_set(llama.llama_log_callback(0), ctypes.c_void_p())
settings = llama.llama_model_quantize_default_params()
settings.ftype = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{dtype.upper()}")
settings.max_buf_size = int(buffer_bytes)
settings.dry_run = not target
columns = load_file(importance) if importance else {}
entries = {name.encode(): (ctypes.c_float * len(values)).from_buffer_copy(values) for name, values in columns.items()}
if entries:
    fields = [(name, values, len(values)) for name, values in entries.items()]
    settings.imatrix = (llama.llama_model_imatrix_data * (len(fields) + 1))(*fields)  # a name of NULL ends the array
sys.exit(llama.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(settings)))
