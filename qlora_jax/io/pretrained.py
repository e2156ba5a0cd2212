"""A model to use rather than to train: a base from disk, with the adapter of a run or without."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp

from qlora_jax.config import ModelArgs
from qlora_jax.data.tokenizer.tokenizer import Tokenizer, load_tokenizer, with_chat_template, with_new_tokens
from qlora_jax.io.adapter_init import rest_by
from qlora_jax.io.checkpoint import Run, open_run
from qlora_jax.io.hf.hub import HubName
from qlora_jax.io.hf.tokenizer import read_tokenizer
from qlora_jax.io.loader import Progress, load_model, whole
from qlora_jax.io.model_source import ModelSource
from qlora_jax.io.open_model import open_model
from qlora_jax.io.peft.reader import base_of, check_shapes, is_adapter, read_adapter
from qlora_jax.models.add_adapters import add_lora
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.decoder import CausalLM
from qlora_jax.models.families import model_config
from qlora_jax.models.partition import ModelParts, partition
from qlora_jax.models.precision import weight_format
from qlora_jax.models.trainable_embeddings import add_tables, add_token_rows, set_tables


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opened:
    """A model's metadata and tokenizer, and the run whose adapter it gets; no weight of the base has been read yet.

    Fields:
      args: how the base is held; those of the run where there is one.
    """

    source: ModelSource
    features: ModelConfig
    tokenizer: Tokenizer
    args: ModelArgs
    run: Run | None

    @property
    def whole_features(self) -> ModelConfig:
        """The features of the model with all rows of the run's tables."""
        tables = {} if self.run is None else self.run.tables
        lengths = (*(number + 1 for number in self.tokenizer.new_ids), *map(len, tables.values()))
        rows = max((self.features.vocab_size, *lengths))
        return dataclasses.replace(self.features, vocab_size=rows)


def open_base_or_run(
    model: str | None, run: str | None, *, step: int | None = None, chat_template: str | None = None
) -> Opened:
    """The model `model`, or the base of the run in folder `run` (looked for at `model` where both are given).

    Args:
      model: a path, or a name on the Hub.
      run: a run's folder, or a PEFT adapter's.
      step: the run's checkpoint; None for the newest.
      chat_template: a jinja file instead of the run's, or the model's own.

    Raises:
      ValueError: whatever is wrong with the files of either.
    """
    if run is not None and is_adapter(Path(run)):
        return _open_adapter(Path(run), model, step, chat_template)
    opened_run = None if run is None else open_run(Path(run), step)
    args = ModelArgs(path=str(model)) if opened_run is None else opened_run.model
    source = open_model(args.path if model is None else model)
    template = chat_template or (opened_run.chat_template if opened_run else None)
    return _opened(source, args, opened_run, template)


def _opened(source: ModelSource, args: ModelArgs, run: Run | None, chat_template: str | None) -> Opened:
    features = model_config(source.config)
    tokenizer = open_tokenizer(source, args, features.vocab_size)
    if run is not None:
        tokenizer = dataclasses.replace(tokenizer, new_ids=tokenizer.new_ids or run.new_ids)
        run = dataclasses.replace(run, new_ids=tokenizer.new_ids)
    return Opened(
        source=source,
        features=features,
        tokenizer=tokenizer if chat_template is None else with_chat_template(tokenizer, chat_template),
        args=args,
        run=run,
    )


def _open_adapter(folder: Path, model: str | None, step: int | None, chat_template: str | None) -> Opened:
    if step is not None:
        raise ValueError(f"{folder} is a PEFT adapter, which has no steps: leave out --step {step}")
    path = model or base_of(folder)
    if path is None or not (Path(path).expanduser().exists() or HubName.of(path)):
        raise ValueError(f"the base of {folder} is {path!r}, which is not here: give its path with --model")
    args = ModelArgs(path=path)
    source = open_model(path)
    features = model_config(source.config)
    adapter = read_adapter(folder, features)
    if adapter.new_ids or adapter.tables:
        source = _with_tokenizer_of(folder, source, max((0, *adapter.new_ids)))
    run = Run(
        path=folder,
        model=args,
        lora_args=adapter.args,
        chat_template=None,
        step=None,
        lora=adapter.lora,
        fingerprint=None,
        new_ids=adapter.new_ids,
        tables=adapter.tables,
    )
    return _opened(source, args, run, chat_template)


def _with_tokenizer_of(folder: Path, source: ModelSource, last: int) -> ModelSource:
    """With the adapter's own tokenizer, if it has one; else the base's has to know the tokens up to `last`."""
    own = read_tokenizer(folder)
    if "tokenizer_json" in own:
        stop = own["stop_token_ids"] or source.tokenizer["stop_token_ids"]
        template = own["chat_template"] or source.tokenizer["chat_template"]
        return dataclasses.replace(source, tokenizer={**own, "stop_token_ids": stop, "chat_template": template})
    if (size := load_tokenizer(source.tokenizer).vocab_size) <= last:
        raise ValueError(
            f"{folder} has rows of new tokens, up to {last}, but no tokenizer.json, and the base's tokenizer has "
            f"{size} tokens: put the tokenizer that it was trained with into the folder"
        )
    return source


def held_as(opened: Opened, quant_type: str, compute_dtype: str) -> ModelArgs:
    """How to hold the base: as asked for, or as `opened` says where that is "auto"."""
    wanted = {"quant_type": quant_type, "compute_dtype": compute_dtype}
    return dataclasses.replace(opened.args, **{name: value for name, value in wanted.items() if value != "auto"})


def load_base(opened: Opened, args: ModelArgs, progress: Progress | None = None) -> CausalLM:
    """The base, held as `args` says.

    Raises:
      ValueError: it is not the base of the run; that can be told where it is quantized as the run was trained.
    """
    run = opened.run
    rest = whole if run is None or run.initial is None else rest_by(run.initial, opened.features, run.lora_args)
    loaded = load_model(opened.source, opened.features, weight_format(args), progress, rest)
    if run is None or run.fingerprint is None or _quantization(args) != _quantization(run.model):
        return loaded.model
    if loaded.fingerprint != run.fingerprint:
        raise ValueError(
            f"{opened.source.path} is not the base that {run.path} was trained on: its fingerprint is "
            f"{loaded.fingerprint[:12]}, expected {run.fingerprint[:12]}. Give the path of the right one: --model"
        )
    return loaded.model


def adapted(model: CausalLM, run: Run) -> ModelParts:
    """The parts of the model with the run's adapter on it.

    Raises:
      ValueError: the adapter does not fit the model; names every projection where it does not.
    """
    add_lora(model, run.lora_args, jax.random.key(0), None if run.initial is None else run.initial.factors)
    set_tables(model, run.tables)
    add_tables(model, run.new_ids, run.lora_args)
    fresh = partition(model)
    check_shapes(run.path, run.lora, fresh.lora)
    return fresh.with_lora(jax.tree.map(jnp.asarray, run.lora))


def unadapted(model: CausalLM, run: Run | None) -> ModelParts:
    """Likewise before the run's training: the base, with that part of its weights that the run's adapters began with;
    tokens that it does not have, and the run's new ones, have the mean row."""
    if run is not None:
        if run.initial is not None:
            add_lora(model, run.lora_args, jax.random.key(0), run.initial.factors)
        longest = max((0, *map(len, run.tables.values())))
        beyond = tuple(range(model.config.vocab_size, longest))
        add_token_rows(model, run.new_ids or beyond, run.lora_args.dtype)
    return partition(model)


def _quantization(args: ModelArgs) -> tuple[str, int, bool]:
    return args.quant_type, args.block_size, args.double_quant


def open_tokenizer(source: ModelSource, args: ModelArgs, vocabulary: int) -> Tokenizer:
    """The tokenizer of `source`, with the settings' new tokens.

    Args:
      vocabulary: rows of the model's embedding.

    Raises:
      ValueError: it can't be read; a token that is not new; or, with new tokens, fewer rows than tokens before them.
    """
    tokenizer = load_tokenizer(source.tokenizer)
    grown = with_new_tokens(tokenizer, args.new_tokens, args.new_special_tokens)
    if grown.new_ids and min(grown.new_ids) > vocabulary:
        raise ValueError(
            f"{source.path}: its tokenizer has {tokenizer.vocab_size} tokens, its embedding {vocabulary} rows: new "
            "tokens would leave rows between them that nothing fills"
        )
    return grown
