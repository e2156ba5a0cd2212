"""`python -m qlora_jax.quantize`: a model in 4 bits, for transformers with bitsandbytes, or back in 16 bits."""

import dataclasses
from pathlib import Path
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
    from rich.console import Console

    from qlora_jax import runtime
    from qlora_jax.data.tokenizer.tokenizer import load_tokenizer
    from qlora_jax.io.atomic import staged_folder
    from qlora_jax.io.hf.bnb_writer import write_quantized_folder
    from qlora_jax.io.hf.model_writer import write_tokenizer
    from qlora_jax.io.open_model import open_model
    from qlora_jax.io.progress import loading
    from qlora_jax.models.config import WeightFormat

    runtime.start()
    source = open_model(args.model)
    tokenizer = load_tokenizer(source.tokenizer)
    quant_type = None if args.quant_type == "none" else args.quant_type
    weights = WeightFormat(quant_type=quant_type, double_quant=args.double_quant, dtype=args.dtype)
    console = Console()
    with staged_folder(Path(args.output)) as folder, loading(console) as progress:
        write_quantized_folder(folder, source, weights, progress)
        write_tokenizer(folder, tokenizer, source.tokenizer["stop_token_ids"])
    console.print(f"{args.model} in {args.quant_type}: {args.output}", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    allocator.tune()
    run_main(main)
