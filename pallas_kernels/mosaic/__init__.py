"""Code that all Mosaic GPU kernels share; `installation` can be imported without Mosaic."""
