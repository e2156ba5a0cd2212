"""The optional C++ handlers for CPUs: 4-bit products, f32 products, and attention, called by XLA through its FFI.

`python -m pallas_kernels.native.build` builds them for this machine's processor. Where they are not built, callers use
plain JAX: `library.problem()` and `library.attention_problem()` return the reason.
"""
