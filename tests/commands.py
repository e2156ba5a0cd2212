"""Commands whose module must not be imported: its name is a function's of the package."""

import runpy


def quantize_main(argv: list[str]) -> None:
    """`python -m qlora_jax.quantize`, in this process."""
    runpy.run_module("qlora_jax.quantize", run_name="quantize")["main"](argv)
