"""The product x @ W^T with a frozen W in the blocks of ggml, and its gradient from the same bytes."""

from pallas_kernels.ggml_matmul.api import ggml_matmul as ggml_matmul
