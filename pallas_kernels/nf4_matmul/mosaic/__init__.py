"""Products with 4-bit weights in Pallas kernels for NVIDIA GPUs (Mosaic), from the layout `split_k`."""
