"""The optional C++ loops for CPUs: 4-bit products, f32 products, and attention, called by XLA through its FFI.

`python -m pallas_kernels.native.build` builds them for this machine's processor. Where they are not built, callers use
plain JAX, and `library.problem()` returns the reason.
"""
