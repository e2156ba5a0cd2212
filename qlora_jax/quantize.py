"""`python -m qlora_jax.quantize MODEL --output DIR`: a model in 4 bits, for transformers + bitsandbytes."""

import argparse
from pathlib import Path

from rich.console import Console

from qlora_jax import allocator
from qlora_jax.config import run_main

PROG = "python -m qlora_jax.quantize"


def main(argv: list[str]) -> None:
    """Writes a model's linear layers in the 4 bits of bitsandbytes, or with --quant-type none back in 16 bits."""
    args = _parser().parse_args(argv)
    # After the arguments: jax starts when these are imported, and a typing error should not wait for it.
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
    with staged_folder(args.output) as folder, loading(console) as progress:
        write_quantized_folder(folder, source, weights, progress)
        write_tokenizer(folder, tokenizer, source.tokenizer["stop_token_ids"])
    console.print(f"{args.model} in {args.quant_type}: {args.output}", markup=False, highlight=False, soft_wrap=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROG, description=main.__doc__)
    parser.add_argument("model", help="a Hugging Face folder, in 16 bits or in 4, a GGUF file, or org/name on the Hub")
    parser.add_argument("--output", type=Path, required=True, help="a new folder")
    parser.add_argument("--quant-type", choices=["nf4", "fp4", "none"], default="nf4", help="none: back to 16 bits")
    parser.add_argument(
        "--double-quant", action=argparse.BooleanOptionalAction, default=True, help="quantize the scales too"
    )
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16", help="of all that is not in 4 bits"
    )
    return parser


if __name__ == "__main__":
    allocator.tune()
    run_main(main)
