"""`qlora-jax export`: a run's adapter, or its model with the adapter merged, for other libraries."""

import dataclasses
from pathlib import Path

from qlora_jax import allocator
from qlora_jax.config import Command, ConfigError, run_main
from qlora_jax.config.exports import EXPORTS, Dtype, ExportFormat, ExportOptions, dtype_problems, formats
from qlora_jax.config.fields import NON_NEGATIVE, NOT_EMPTY, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportArgs:
    """The run to export, and the format to write."""

    run: str = setting("the run's folder", bound=NOT_EMPTY)
    format: ExportFormat = setting(
        "peft: an adapter for the peft library. hf: a whole model for transformers, the adapter merged into the "
        "dequantized base. gguf: the same as one file for llama.cpp. gguf-lora: an adapter for llama.cpp, to use with "
        "a GGUF file of the base",
        "peft",
    )
    output: str | None = setting("a new folder; null: RUN/FORMAT", None, NOT_EMPTY)
    step: int | None = setting("the checkpoint to export; null: the newest", None, NON_NEGATIVE)
    push: str | None = setting(
        "org/name of a new private repository on a Hugging Face Hub, for the output and a model card. Requires the "
        "extra hub, and a token: HF_TOKEN, or hf auth login",
        None,
        NOT_EMPTY,
    )
    model: str | None = setting("the base model, if it moved after training: a path or org/name", None, NOT_EMPTY)
    base: str | None = setting(
        "hf and gguf: merge into the weights of this 16-bit model, which the run's base was quantized from, instead of "
        "the dequantized base. Reports how far the logits move",
        None,
        NOT_EMPTY,
    )
    dtype: Dtype | None = setting(
        "hf and gguf: dtype of the weights; null: bfloat16 for hf, float16 for gguf, which also takes q8_0, q4_0 "
        "and, by llama.cpp's quantizer (the extra gguf-quantize), q6_k, q5_k_m, q4_k_m, q4_k_s and iq4_nl. gguf of a "
        "run with lora.merge_into: that format; hf of one with nf4, nvfp4, int4 or mxfp4: that, as "
        "bitsandbytes or compressed-tensors stores it",
        None,
    )
    base_dtype: Dtype | None = setting(
        "peft and gguf-lora, with --with_base: dtype of the base, rounded from the compute dtype of training; null: "
        "that dtype. gguf-lora also takes q8_0 and q4_0",
        None,
    )


def check_export(args: ExportArgs) -> None:
    """Raises ConfigError if settings contradict each other."""
    problems = dtype_problems(args.format, args.dtype, args.base_dtype)
    if not EXPORTS[args.format].merged and args.base is not None:
        whole = " or ".join(formats(merged=True))
        problems.append(f"base: requires --format {whole} (an adapter works with any base). Remove it")
    if problems:
        raise ConfigError(problems)


COMMAND = Command(
    name="export",
    summary="Writes a run as a PEFT adapter, a merged Hugging Face model, a GGUF file, or a llama.cpp adapter.",
    example="--run runs/mine --format peft",
    schema=ExportArgs,
    check=check_export,
    flags={
        "with_base": "peft and gguf-lora: also write the dequantized base that the adapter was trained on. peft cannot "
        "load GGUF files, so a run from a GGUF file needs it",
        "adapter_alone": "peft and gguf-lora, of a run with lora.merge_into: export the adapter, although the model "
        "that was trained is the base and the adapter merged and rounded",
    },
)


def main(argv: list[str]) -> None:
    """Exports the run; raises ValueError or OSError for bad input."""
    args, flags = COMMAND.read(argv)
    if EXPORTS[args.format].merged and "with_base" in flags:
        adapters = " or ".join(formats(merged=False))
        raise ValueError(f"--with_base: requires --format {adapters} (a merged model has no base). Remove it")
    # Imported after the settings are read, because importing jax takes a second.
    from qlora_jax import runtime
    from qlora_jax.api.export import write_export
    from qlora_jax.api.model_card import write_model_card
    from qlora_jax.io.hf.push import check_name, check_vacant, push_folder, upload_command
    from qlora_jax.io.pretrained import open_finetuned
    from qlora_jax.terminal.console import Console

    runtime.start()
    if args.push is not None:
        check_name(args.push)
        check_vacant(args.push)
    output = Path(args.run) / args.format if args.output is None else Path(args.output)
    opened = open_finetuned(args.run, base=args.model, step=args.step)
    options = ExportOptions(
        with_base="with_base" in flags,
        base_dtype=args.base_dtype,
        dtype=args.dtype,
        base=args.base,
        adapter_alone="adapter_alone" in flags,
    )
    result = write_export(opened, output, args.format, options, progress=True)
    console = Console()
    console.print(str(result), markup=False, highlight=False, soft_wrap=True)
    if args.push is not None:
        write_model_card(output, opened, result, args.format, args.dtype)
        again = f"pushing; if it is interrupted, {upload_command(output, args.push)} continues"
        console.print(again, markup=False, highlight=False, soft_wrap=True)
        console.print(f"pushed: {push_folder(output, args.push)}", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    allocator.tune()
    run_main(main)
