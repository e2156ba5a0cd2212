"""Runs llama.cpp's quantizer: `worker.py SOURCE TARGET TYPE BUFFER_BYTES`. Its log goes to standard error.

A separate process, because llama.cpp aborts on some errors, and Ctrl-C must stop it.
"""

import ctypes
import signal
import sys

from llama_cpp import llama_cpp as llama  # pyright: ignore[reportMissingImports]

source, target, dtype, buffer_bytes = sys.argv[1:]
signal.signal(signal.SIGINT, signal.SIG_DFL)
llama.llama_log_set(llama.llama_log_callback(0), ctypes.c_void_p())
settings = llama.llama_model_quantize_default_params()
settings.ftype = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{dtype.upper()}")
settings.max_buf_size = int(buffer_bytes)
sys.exit(llama.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(settings)))
