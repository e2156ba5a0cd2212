"""`python -m qlora_jax.generate`: replies of a model or run to one prompt, a file of prompts, or in a chat."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from rich.console import Console

from qlora_jax import allocator
from qlora_jax.config import Command, run_main
from qlora_jax.inference.settings import GenerateArgs, check_generate

if TYPE_CHECKING:
    from qlora_jax.data.readers.files import Row
    from qlora_jax.inference.prompts import Prompter
    from qlora_jax.io.pretrained import OpenedModel
    from qlora_jax.models.partition import ModelParts

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
    from qlora_jax.inference import prompts
    from qlora_jax.inference.decode import stream
    from qlora_jax.inference.reply_file import write_replies
    from qlora_jax.inference.sampling import Sampling
    from qlora_jax.inference.terminal_chat import END_MESSAGES, chat, show_reply
    from qlora_jax.io.pretrained import open_pretrained

    runtime.start()
    opened = open_pretrained(model=args.model, run=args.run, step=args.step, chat_template=args.chat_template)
    prompter = prompts.prompter(opened.tokenizer, raw="raw" in flags, system=args.system)
    limit = opened.features.max_positions
    rows, encoded = _prompts(args, prompter, limit)
    messages = Console(stderr=True)
    parts = _load(opened, args, messages)
    reply_to = functools.partial(
        stream,
        parts,
        sampling=Sampling(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed),
        max_new_tokens=args.max_new_tokens,
        stop_ids=prompts.stop_ids(opened.tokenizer, opened.source.tokenizer["stop_token_ids"], chat=prompter.chat),
    )
    if args.prompts is not None:
        with _writer(args.output) as write:
            write_replies(rows, reply_to(encoded), opened.tokenizer, write, messages)
        if args.output is not None:
            messages.print(f"{len(rows):,} replies: {args.output}", markup=False, highlight=False, soft_wrap=True)
    elif args.prompt is not None:
        _, end = show_reply(reply_to(encoded), opened.tokenizer, Console())
        if end in END_MESSAGES:
            messages.print(END_MESSAGES[end], style="dim", highlight=False)
        if end == "interrupted":
            raise KeyboardInterrupt
    else:
        chat(prompter, lambda ids: reply_to([ids]), limit, Console())


def _prompts(args: GenerateArgs, prompter: "Prompter", max_positions: int) -> tuple[list["Row"], list[list[int]]]:
    """The rows of the file of prompts or the one prompt, and their ids; neither is there in a chat."""
    from qlora_jax.data.readers.files import Place, Row
    from qlora_jax.inference.prompts import encode_prompts, read_prompts

    if args.prompts is not None:
        rows = read_prompts(args.prompts)
        return rows, encode_prompts(args.prompts, rows, prompter, max_positions)
    rows = [] if args.prompt is None else [Row(Place(1, 0), {"prompt": args.prompt})]
    return rows, encode_prompts("--prompt", rows, prompter, max_positions)


def _load(opened: "OpenedModel", args: GenerateArgs, console: Console) -> "ModelParts":
    """The model as trained, or as the settings want it."""
    from qlora_jax.io.pretrained import apply_adapter, load_base, weight_settings
    from qlora_jax.io.progress import loading
    from qlora_jax.models.partition import partition

    held = weight_settings(opened, args.quant_type, args.compute_dtype)
    with loading(console) as progress:
        model = load_base(opened, held, progress)
    if opened.run is None:
        return partition(model)
    if held.quant_type != opened.args.quant_type:
        trained = f"this adapter was trained on a base in {opened.args.quant_type}"
        console.print(f"note: {trained}, and runs on one in {held.quant_type}", highlight=False)
    return apply_adapter(model, opened.run)


@contextlib.contextmanager
def _writer(path: str | None) -> Iterator[Callable[[str], object]]:
    """Yields what writes to the file, or to standard output, line by line."""
    if path is None:
        yield functools.partial(print, end="", flush=True)
        return
    with open(path, "w", encoding="utf-8", buffering=1) as file:
        yield file.write


if __name__ == "__main__":
    allocator.tune()
    run_main(main)
