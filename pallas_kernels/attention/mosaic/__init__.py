"""Pallas kernels (Mosaic GPU) for attention by mma.sync; `capabilities` can be imported without Mosaic."""
