"""What Pallas kernels by Mosaic GPU share; `installation` can be imported without Mosaic."""
