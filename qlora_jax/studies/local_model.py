"""Opens and loads the models that reply or judge here, one at a time."""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.inference import prompts
from qlora_jax.inference.decode import Reply, complete, stream
from qlora_jax.inference.prompts import Prompter
from qlora_jax.inference.result_cache import digest
from qlora_jax.inference.sampling_params import Sampling
from qlora_jax.inference.settings import LocalModelArgs
from qlora_jax.io.loading.loader import Progress
from qlora_jax.io.pretrained import (
    OpenedModel,
    apply_adapter,
    is_finetuned,
    load_base,
    open_pretrained,
    parts_before_training,
    weight_settings,
)
from qlora_jax.models.partition import ModelParts


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalModel:
    """A loaded model that replies to prompts."""

    parts: ModelParts
    tokenizer: Tokenizer
    stop_ids: frozenset[int]

    def reply_each(
        self, ids: Sequence[Sequence[int]], sampling: Sampling, max_new_tokens: int
    ) -> Iterator[tuple[int, Reply]]:
        """Yields (index of the prompt, its reply), each as soon as it is complete."""
        limits = {"max_new_tokens": max_new_tokens, "stop_ids": self.stop_ids}
        yield from complete(stream(self.parts, ids, sampling=sampling, **limits))


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpenedLocalModel:
    """A model without its weights."""

    args: LocalModelArgs
    opened: OpenedModel
    prompter: Prompter

    @property
    def max_positions(self) -> int:
        """The model's positions for prompt and reply."""
        return self.opened.features.max_positions

    def load(self, progress: Progress | None) -> LocalModel:
        """Loads the weights.

        Raises:
          ValueError: a file is damaged, or the base is not the one that the run was trained on.
        """
        opened = self.opened
        model = load_base(opened, weight_settings(opened, self.args.quant_type, self.args.compute_dtype), progress)
        parts = parts_before_training(model, None) if opened.run is None else apply_adapter(model, opened.run)
        listed = opened.source.tokenizer["stop_token_ids"]
        stops = prompts.stop_ids(opened.tokenizer, listed, chat=self.prompter.chat)
        return LocalModel(parts=parts, tokenizer=opened.tokenizer, stop_ids=stops)

    def identity(self) -> dict[str, str | None]:
        """Digests of the base's files and of the adapter, without loading the base."""
        run = self.opened.run
        adapter = None if run is None else digest([*_leaves(run.lora), sorted(run.tables.items()), run.lora_args])
        return {"base": files_digest(Path(self.opened.source.path)), "adapter": adapter}


def open_local_model(args: LocalModelArgs, system: str | None) -> OpenedLocalModel:
    """Opens a model's metadata and tokenizer.

    Args:
      system: system message, or None for the template's default.

    Raises:
      ValueError: files are missing, damaged or not supported, or there is a system message but no chat template.
    """
    if is_finetuned(args.path):
        named = {"model": args.base, "run": args.path}
    elif args.base is not None or args.step is not None:
        raise ValueError(f"{args.path}: base and step require a run or adapter (found a base model). Remove them")
    else:
        named = {"model": args.path, "run": None}
    opened = open_pretrained(**named, step=args.step, chat_template=args.chat_template)
    prompter = prompts.prompter(opened.tokenizer, raw=args.raw, system=system)
    return OpenedLocalModel(args=args, opened=opened, prompter=prompter)


def files_digest(path: Path) -> str:
    """SHA-256 of a model's files: names and contents."""
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
    found = hashlib.sha256()
    for file in files:
        facts = file.stat()
        found.update(f"{file.name} {_content_digest(file, facts.st_size, facts.st_mtime_ns)}\n".encode())
    return found.hexdigest()


@functools.cache  # so that a base of several adapters is read once
def _content_digest(file: Path, size: int, changed: int) -> str:
    """SHA-256 of a file that has this size and this time of change."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _leaves(tree: object) -> list[object]:
    import jax

    return jax.tree.leaves(tree)
