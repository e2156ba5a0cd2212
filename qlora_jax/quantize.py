"""`qlora-jax quantize`: a model in 4 bits or back in 16, and what 4 bits cost each of its layers."""

import dataclasses
import functools
from pathlib import Path
from typing import Literal

from qlora_jax import allocator
from qlora_jax.config import Command, ConfigError, run_main
from qlora_jax.config.fields import AT_LEAST_ONE, NOT_EMPTY, setting
from qlora_jax.config.sizes import parse_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizeArgs:
    """The model to convert and the format to write; with `measure`, what that format costs each layer."""

    model: str = setting("a Hugging Face folder in 16 or 4 bits, a GGUF file, or org/name on the Hub", bound=NOT_EMPTY)
    output: str = setting("a new folder", bound=NOT_EMPTY)
    quant_type: Literal["nf4", "fp4", "nvfp4", "none"] = setting(
        "4-bit data type: nf4 and fp4 for bitsandbytes, nvfp4 for compressed-tensors; none: back to 16 bits", "nf4"
    )
    double_quant: bool = setting("quantize the scales too", True)
    dtype: Literal["bfloat16", "float16", "float32"] = setting("dtype of the unquantized tensors", "bfloat16")
    keep_16bit: str | list[str] = setting(
        "linear layers that stay in dtype: names such as [down_proj, layers.0.self_attn.v_proj], or one regular "
        "expression for full names",
        [],
    )
    measure: str | None = setting(
        "file of training rows: instead of a model, write what 4 bits cost each linear layer, as the increase of the "
        "loss on these rows",
        None,
        NOT_EMPTY,
    )
    budget: str | None = setting(
        "measure: bytes of the base, such as 6GiB; also choose the layers to keep in 16 bits", None, NOT_EMPTY
    )
    max_rows: int | None = setting("measure: use only the first rows; null: all", None, AT_LEAST_ONE)
    compute_dtype: Literal["auto", "bfloat16", "float32"] = setting("measure: dtype of the matmuls", "float32")


def check_quantize(args: QuantizeArgs) -> None:
    """Raises ConfigError if settings contradict each other; the message lists all contradictions."""
    problems = []
    plain = QuantizeArgs(model=args.model, output=args.output)
    if args.measure is None:
        problems += [
            f"{name}: found {value!r} without measure, which uses it. Set measure too, or remove it"
            for name in ("budget", "max_rows", "compute_dtype")
            if (value := getattr(args, name)) != getattr(plain, name)
        ]
    elif args.quant_type in ("none", "nvfp4"):
        problems.append(
            f"quant_type: found {args.quant_type!r} with measure, expected nf4 or fp4. Remove one of these settings"
        )
    if args.keep_16bit and (args.measure is not None or args.quant_type == "none"):
        other = "quant_type=none" if args.measure is None else "measure"
        problems.append(f"keep_16bit: found {args.keep_16bit!r} with {other}. Remove one of these settings")
    try:
        parse_bytes(args.budget or "0B")
    except ValueError as error:
        problems.append(f"budget: {error}")
    if problems:
        raise ConfigError(problems)


COMMAND = Command(
    name="quantize",
    summary="Writes a model in 4 bits of bitsandbytes or in NVFP4 for transformers, or back in 16 bits; or "
    "measures what 4 bits cost each layer.",
    example="--model ~/models/Llama-3.2-1B-Instruct --output llama-nf4",
    schema=QuantizeArgs,
    check=check_quantize,
)


def main(argv: list[str]) -> None:
    """Converts or measures the model; raises ValueError or OSError for bad input."""
    args, _ = COMMAND.read(argv)
    # Imported after the settings are read, because importing jax takes a second.
    from qlora_jax import runtime

    runtime.start()
    if args.measure is None:
        from qlora_jax.api.export import save_quantized
        from qlora_jax.terminal.console import Console

        settings = {name: getattr(args, name) for name in ("quant_type", "double_quant", "dtype", "keep_16bit")}
        written = save_quantized(args.model, args.output, **settings, progress=True)
        Console().print(f"{args.model} in {args.quant_type}: {written}", markup=False, highlight=False, soft_wrap=True)
    else:
        _measure(args, args.measure)


def _measure(args: QuantizeArgs, rows: str) -> None:
    """Prints the costs even if they cannot be written, and writes them even if the chosen layers fail the check."""
    from qlora_jax.api.quantization_cost import measure_quantization
    from qlora_jax.atomic_files import staged_folder
    from qlora_jax.evaluation.quantization_cost.files import (
        SETTINGS_FILE,
        check_choice,
        print_costs,
        print_progress,
        write_files,
    )
    from qlora_jax.progress_reporter import ConsoleReporter
    from qlora_jax.terminal.console import Console

    console, messages = Console(), Console(stderr=True)
    settings = {name: getattr(args, name) for name in ("quant_type", "double_quant", "dtype", "budget", "max_rows")}
    settings |= {"compute_dtype": args.compute_dtype, "reporter": ConsoleReporter(messages)}
    with staged_folder(Path(args.output)) as staged:
        found = measure_quantization(args.model, rows, **settings, progress=functools.partial(print_progress, messages))
        model = {"path": args.model, "quant_type": args.quant_type, "double_quant": args.double_quant}
        print_costs(found, console)
        write_files(staged, found, model)
    check_choice(found)
    if found.choice is not None:
        text = f"next: qlora-jax train --config {Path(args.output) / SETTINGS_FILE} --data.train ..."
        console.print(text, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    allocator.tune()
    run_main(main)
