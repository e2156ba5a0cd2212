"""Pallas kernels (Mosaic GPU) for products with 4-bit weights in the layout `split_k`.

`hopper` is for sm_90, `ampere` for other cards from sm_80 to sm_121, `skinny` for few rows on all of them.
`capabilities` can be imported without Mosaic.
"""
