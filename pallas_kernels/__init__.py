"""4-bit weight formats and the matmuls that read them: raw arrays in, raw arrays out. Does not import qlora_jax.

- `formats`: code tables, byte layouts, `QTensor`, packing and dequantization.
- `nf4_matmul`: x @ w^T with a 4-bit w, forward and backward, on CPUs and NVIDIA GPUs.
- `native`: the optional C++ handlers for CPUs.
- `aot`: compiles for a GPU that is not in this machine, and reads registers, spills and memory.
- `gpu_specs`: the GPUs that `aot` knows.
- `kernel_report`: a command that prints which kernel runs which product.
"""
