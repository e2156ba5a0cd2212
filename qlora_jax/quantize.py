"""`python -m qlora_jax.quantize`: a model in 4 bits, for transformers with bitsandbytes, or back in 16 bits."""

import dataclasses
from typing import Literal

from qlora_jax import allocator
from qlora_jax.config import Command, run_main
from qlora_jax.config.fields import NOT_EMPTY, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizeArgs:
    """The model to convert, and the format to write."""

    model: str = setting("a Hugging Face folder in 16 or 4 bits, a GGUF file, or org/name on the Hub", bound=NOT_EMPTY)
    output: str = setting("a new folder", bound=NOT_EMPTY)
    quant_type: Literal["nf4", "fp4", "none"] = setting("4-bit data type; none: back to 16 bits", "nf4")
    double_quant: bool = setting("quantize the scales too", True)
    dtype: Literal["bfloat16", "float16", "float32"] = setting("dtype of the unquantized tensors", "bfloat16")
    keep_16bit: str | list[str] = setting(
        "linear layers that stay in dtype: names such as [down_proj, layers.0.self_attn.v_proj], or one regular "
        "expression for full names",
        [],
    )


COMMAND = Command(
    name="quantize",
    summary="Writes a model in bitsandbytes' 4-bit format for transformers, or a 4-bit model back in 16 bits.",
    example="--model ~/models/Llama-3.2-1B-Instruct --output llama-nf4",
    schema=QuantizeArgs,
)


def main(argv: list[str]) -> None:
    """Converts the model; raises ValueError or OSError for bad input."""
    args, _ = COMMAND.read(argv)
    # Imported after the settings are read, because importing jax takes a second.
    from qlora_jax import runtime
    from qlora_jax.api.export import save_quantized
    from qlora_jax.terminal.console import Console

    runtime.start()
    settings = dataclasses.asdict(args)
    written = save_quantized(settings.pop("model"), settings.pop("output"), **settings, progress=True)
    Console().print(f"{args.model} in {args.quant_type}: {written}", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    allocator.tune()
    run_main(main)
