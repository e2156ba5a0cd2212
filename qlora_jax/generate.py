"""`qlora-jax generate`: replies of a model or run to one prompt, a file of prompts, or in a chat."""

import contextlib
import functools
import io
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from qlora_jax import allocator
from qlora_jax.atomic_files import LineFile
from qlora_jax.config import Command, run_main
from qlora_jax.inference.settings import GenerateArgs, check_generate
from qlora_jax.terminal.visible import visible_json

if TYPE_CHECKING:
    from rich.console import Console

    from qlora_jax.data.readers.files import Row
    from qlora_jax.io.pretrained import OpenedModel
    from qlora_jax.models.decoder import CausalLM

COMMAND = Command(
    name="generate",
    summary="Replies to one prompt, to a file of prompts, or in a chat if there is neither.",
    example="--run runs/mine --prompt Hello",
    schema=GenerateArgs,
    check=check_generate,
    flags={"raw": "no chat template: the model continues the text of the prompt"},
)


def main(argv: list[str]) -> None:
    """Replies; raises ValueError or OSError for bad input."""
    args, flags = COMMAND.read(argv)
    # Imported after the settings are read, because importing jax takes a second.
    from qlora_jax import runtime
    from qlora_jax.api.generate import stop_ids
    from qlora_jax.api.provenance import parts_of
    from qlora_jax.inference import prompts
    from qlora_jax.inference.decode import Conversation, stream
    from qlora_jax.inference.fast_decoding import for_fast_decoding
    from qlora_jax.inference.replies import write_replies
    from qlora_jax.inference.sampling_params import Sampling
    from qlora_jax.inference.terminal_chat import END_MESSAGES, chat, show_reply
    from qlora_jax.io.pretrained import open_pretrained
    from qlora_jax.terminal.console import Console

    runtime.start()
    rows = _rows(args)
    opened = open_pretrained(
        model=args.model,
        run=args.run,
        step=args.step,
        chat_template=args.chat_template,
        chat_template_kwargs=args.chat_template_kwargs,
    )
    prompter = prompts.prompter(opened.tokenizer, raw="raw" in flags, system=args.system)
    limit = opened.features.max_positions
    encoded = prompts.encode_prompts(args.prompts or "--prompt", rows, prompter, limit)
    messages = Console(stderr=True)
    model = _load(opened, args, messages)
    automatic = 8 if args.fast else None
    head_bits = automatic if args.head_bits == "auto" else args.head_bits
    parts = for_fast_decoding(parts_of(model), integer=args.fast, head_bits=head_bits)
    settings = {
        "sampling": Sampling(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed),
        "max_new_tokens": args.max_new_tokens,
        "stop_ids": stop_ids(model, opened.tokenizer, chat=prompter.chat),
    }
    reply_to = functools.partial(stream, parts, tokenizer=opened.tokenizer, **settings)
    if args.prompts is not None:
        with _writer(args.output) as write:
            write_replies(rows, reply_to(encoded), opened.tokenizer, write, messages)
        if args.output is not None:
            messages.print(f"{len(rows):,} replies: {args.output}", markup=False, highlight=False, soft_wrap=True)
    elif args.prompt is not None:
        _, end = show_reply(reply_to(encoded), Console())
        if end == "interrupted":
            raise KeyboardInterrupt
        if end in END_MESSAGES:
            messages.print(END_MESSAGES[end], style="dim", highlight=False)
    else:
        chat(prompter, Conversation(parts, opened.tokenizer, settings).reply, limit, Console())


def _rows(args: GenerateArgs) -> list["Row"]:
    """The prompts as rows; none for a chat."""
    from qlora_jax.data.readers.files import Place, Row
    from qlora_jax.inference.prompts import read_prompts

    if args.prompts is not None:
        return read_prompts(args.prompts)
    return [] if args.prompt is None else [Row(Place(1, 0), {"prompt": args.prompt})]


def _load(opened: "OpenedModel", args: GenerateArgs, console: "Console") -> "CausalLM":
    """Loads the model in the weight format of the settings, by default that of training."""
    from qlora_jax.api.load import load_opened
    from qlora_jax.api.settings import loading_bar
    from qlora_jax.io.loading.stored_codes import stored_types
    from qlora_jax.io.pretrained import weight_settings
    from qlora_jax.models.config import STORED

    settings = weight_settings(opened, args.quant_type, args.compute_dtype, args.keep_16bit, args.experts)
    with loading_bar(True) as progress:
        model = load_opened(opened, settings, args.chat_template, progress)
    if opened.run is not None and settings.quant_type != opened.args.quant_type:
        trained = f"the adapter was trained on a base in {opened.args.quant_type}"
        console.print(f"note: {trained}, and runs on one in {settings.quant_type}", highlight=False)
    quantizes = settings.quant_type not in (STORED, "none")
    if opened.run is None and quantizes and (codes := stored_types(opened.source, opened.features)):
        console.print(f"note: quantized again, from {codes}; --quant_type stored keeps these codes", highlight=False)
    return model


@contextlib.contextmanager
def _writer(path: str | None) -> Iterator[Callable[[str], object]]:
    """Yields a function that writes lines to the file, or to standard output."""
    if path is None:
        in_terminal = sys.stdout.isatty()
        yield lambda line: print(visible_json(line) if in_terminal else line, end="", flush=True)
        return
    with LineFile(io.FileIO(path, "w")) as lines:
        yield lines.write


if __name__ == "__main__":
    allocator.tune()
    run_main(main)
