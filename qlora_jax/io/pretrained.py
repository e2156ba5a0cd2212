"""Opens pretrained models and runs for use: metadata and tokenizer first, then the base, then the adapter."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from qlora_jax.config import LoraArgs, ModelArgs
from qlora_jax.config.fields import TemplateValue
from qlora_jax.data.tokenizer.embedding_rows import fit_to_rows
from qlora_jax.data.tokenizer.tokenizer import (
    Tokenizer,
    load_tokenizer,
    with_chat_template,
    with_new_tokens,
    with_template_kwargs,
)
from qlora_jax.io.digests import json_digest
from qlora_jax.io.hf.hub import HubName
from qlora_jax.io.hf.tokenizer import read_tokenizer
from qlora_jax.io.initial_file import InitialAdapter
from qlora_jax.io.loading.adapter_init import WeightDecomposer, subtract_initial
from qlora_jax.io.loading.base_fingerprint import EARLIER_OFFSETS
from qlora_jax.io.loading.loader import Loaded, Progress, load_model, unchanged
from qlora_jax.io.open_model import open_model
from qlora_jax.io.peft.reader import base_model_of, is_adapter, read_adapter
from qlora_jax.io.peft.start_adapter import check_shapes, read_start_adapter, starting_parameters
from qlora_jax.io.run_folder.checkpoint import CONFIG_FILE, Run, open_run
from qlora_jax.io.run_folder.start_parameters import FILE, start_digest
from qlora_jax.methods.attach import attach_method
from qlora_jax.model_source import ModelSource, TokenizerData
from qlora_jax.models.config import ModelConfig, WeightFormat
from qlora_jax.models.decoder import CausalLM
from qlora_jax.models.families import model_config
from qlora_jax.models.partition import Lora, ModelParts, partition
from qlora_jax.models.precision import weight_format
from qlora_jax.models.trainable_embeddings import add_tables, add_token_rows, rows_train, set_tables

TemplateKwargs = Mapping[str, TemplateValue]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpenedModel:
    """A model's metadata and tokenizer, and the run whose adapter it gets; no weight has been read yet.

    Fields:
      args: weight format of the base; the run's if there is one.
      stop_ids: ids that end a reply, which exported models list: those of the base's files, and for an export also the
        end of a turn that the run learned.
    """

    source: ModelSource
    features: ModelConfig
    tokenizer: Tokenizer
    args: ModelArgs
    run: Run | None
    stop_ids: Sequence[int]

    @property
    def unlisted_stop_ids(self) -> list[int]:
        """Ids that end a reply, of which the base's files say nothing."""
        listed = {*self.source.tokenizer["stop_token_ids"], self.tokenizer.eos_id}
        return [number for number in self.stop_ids if number not in listed]

    @property
    def full_features(self) -> ModelConfig:
        """The model's features, its vocabulary extended by the rows that the run added."""
        assert self.tokenizer.rows is not None, "open_tokenizer sets it"
        return dataclasses.replace(self.features, vocab_size=self.tokenizer.rows)

    @property
    def replaces_template(self) -> bool:
        """True if its chat template is not the one of the base's files."""
        return self.tokenizer.chat_template not in (None, self.source.tokenizer["chat_template"])


def is_finetuned(path: str | Path) -> bool:
    """True if the folder holds a training run or a PEFT adapter, not a base model."""
    folder = Path(path).expanduser()
    return (folder / CONFIG_FILE).is_file() or is_adapter(folder)


def open_base(
    args: ModelArgs, chat_template: str | None = None, chat_template_kwargs: TemplateKwargs | None = None
) -> OpenedModel:
    """Opens the base model at `args.path`, a path or a name on the Hub.

    Args:
      chat_template: a jinja file to use instead of the model's template.
      chat_template_kwargs: variables for the template, such as `enable_thinking`.

    Raises:
      ValueError: the files are missing, damaged or not supported.
    """
    return _opened(open_model(args.path), args, None, chat_template, chat_template_kwargs)


def open_finetuned(
    folder: str | Path,
    *,
    base: str | None = None,
    step: int | None = None,
    chat_template: str | None = None,
    chat_template_kwargs: TemplateKwargs | None = None,
) -> OpenedModel:
    """Opens the base of a training run or PEFT adapter, together with the adapter.

    Args:
      base: path of the base model, if it moved after training.
      step: the run's checkpoint; None for the newest.
      chat_template: a jinja file to use instead of the run's or the model's template.
      chat_template_kwargs: variables for the template; None for the run's.

    Raises:
      ValueError: the files of either are missing, damaged or not supported, or the checkpoint does not exist.
    """
    if is_adapter(Path(folder)):
        return _open_adapter(Path(folder), base, step, chat_template, chat_template_kwargs)
    run = open_run(Path(folder), step)
    source = open_model(run.model.path if base is None else base)
    variables = run.chat_template_kwargs if chat_template_kwargs is None else chat_template_kwargs
    opened = _opened(source, run.model, run, chat_template or run.chat_template, variables)
    if chat_template is None and run.template_digest not in (None, json_digest(opened.tokenizer.chat_template)):
        raise ValueError(
            f"{run.chat_template}: not the chat template that {run.path} was trained with: its text has changed. "
            "Restore the file, or give --chat_template to generate or evaluate with another one"
        )
    return opened


def open_pretrained(
    *,
    model: str | None = None,
    run: str | None = None,
    step: int | None = None,
    chat_template: str | None = None,
    chat_template_kwargs: TemplateKwargs | None = None,
) -> OpenedModel:
    """Opens the base `model`, or the finetuned `run`, whose base is then looked for at `model` if both are given.

    Raises:
      ValueError: as `open_base` and `open_finetuned`.
    """
    if run is not None:
        return open_finetuned(
            run, base=model, step=step, chat_template=chat_template, chat_template_kwargs=chat_template_kwargs
        )
    return open_base(ModelArgs(path=str(model)), chat_template, chat_template_kwargs)


def _opened(
    source: ModelSource,
    args: ModelArgs,
    run: Run | None,
    chat_template: str | None,
    chat_template_kwargs: TemplateKwargs | None,
    own: TokenizerData | None = None,
) -> OpenedModel:
    """Returns the opened model; the template of an adapter's folder, in `own`, replaces the base's."""
    features = model_config(source.config, source.config_name)
    tokenizer = open_tokenizer(source, args, _rows(features, run))
    if run is not None:
        tokenizer = dataclasses.replace(tokenizer, new_ids=tokenizer.new_ids or run.new_ids)
        run = dataclasses.replace(run, new_ids=tokenizer.new_ids)
    if chat_template is not None:
        tokenizer = with_chat_template(tokenizer, chat_template)
    elif own is not None and own["chat_template"] is not None:
        tokenizer = dataclasses.replace(
            tokenizer, chat_template=own["chat_template"], template_name=own["template_name"]
        )
    return OpenedModel(
        source=source,
        features=features,
        tokenizer=with_template_kwargs(tokenizer, chat_template_kwargs or {}, "chat_template_kwargs"),
        args=args,
        run=run,
        stop_ids=source.tokenizer["stop_token_ids"],
    )


def _rows(features: ModelConfig, run: Run | None) -> int:
    """Returns the rows of the embedding, those of the run's adapter included."""
    if run is None:
        return features.vocab_size
    return max(features.vocab_size, *(number + 1 for number in run.new_ids), *map(len, run.tables.values()), 0)


def _open_adapter(
    folder: Path,
    base: str | None,
    step: int | None,
    chat_template: str | None,
    chat_template_kwargs: TemplateKwargs | None,
) -> OpenedModel:
    if step is not None:
        raise ValueError(f"{folder}: a PEFT adapter has no steps (found step {step}). Remove --step")
    path = base or base_model_of(folder)
    if path is None or not (Path(path).expanduser().exists() or HubName.parse(path)):
        raise ValueError(f"{folder}: its base model does not exist (found {path!r}). Give its path with --model")
    args = ModelArgs(path=path)
    source = open_model(path)
    features = model_config(source.config, source.config_name)
    adapter = read_adapter(folder, features)
    own = None
    if adapter.new_ids or adapter.tables:
        source = _with_tokenizer_of(folder, source, max((0, *adapter.new_ids)))
    else:
        own = read_tokenizer(folder)
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
        frozen=adapter.frozen,
        head=adapter.head,
    )
    return _opened(source, args, run, chat_template, chat_template_kwargs, own)


def _with_tokenizer_of(folder: Path, source: ModelSource, last: int) -> ModelSource:
    """The source with the adapter's tokenizer; without one, the base's tokenizer must know all tokens up to `last`."""
    own = read_tokenizer(folder)
    if "tokenizer_json" in own:
        stop = own["stop_token_ids"] or source.tokenizer["stop_token_ids"]
        template = own if own["chat_template"] else source.tokenizer
        merged: TokenizerData = {
            **own,
            "stop_token_ids": stop,
            "chat_template": template["chat_template"],
            "template_name": template["template_name"],
        }
        return dataclasses.replace(source, tokenizer=merged)
    if (size := load_tokenizer(source.tokenizer).vocab_size) <= last:
        raise ValueError(
            f"{folder}: tokenizer.json is missing (found rows of new tokens up to {last}, the base's tokenizer has "
            f"{size} tokens). Copy the tokenizer of training into the folder"
        )
    return source


def weight_settings(
    opened: OpenedModel,
    quant_type: str,
    compute_dtype: str,
    keep_16bit: str | list[str] | None = None,
    experts: str = "auto",
) -> ModelArgs:
    """The weight format to load the base in; "auto" and None stand for the format in `opened`."""
    given = {"quant_type": quant_type, "compute_dtype": compute_dtype, "keep_16bit": keep_16bit, "experts": experts}
    changes = {name: value for name, value in given.items() if value not in ("auto", None)}
    return dataclasses.replace(opened.args, **changes)


def load_base(opened: OpenedModel, args: ModelArgs, progress: Progress | None = None) -> CausalLM:
    """Loads the base in the weight format of `args`.

    Raises:
      ValueError: a file is damaged, or it is not the run's base; the latter is checked if the weights are quantized as
        in training.
    """
    return load_checked(opened, args, progress).model


def load_checked(opened: OpenedModel, args: ModelArgs, progress: Progress | None = None) -> Loaded:
    """Loads the base like `load_base`, and returns its fingerprint too."""
    run = opened.run
    transform = unchanged
    if run is not None and run.initial is not None:
        transform = subtract_initial(run.initial, opened.features, run.lora_args)
    like = None if run is None else run.fingerprint
    loaded = load_model(
        opened.source, opened.features, weight_format(args, opened.features), progress, transform, fingerprint=like
    )
    if run is None or run.fingerprint is None:
        return loaded
    if _quantization(args, opened.features) != _quantization(run.model, opened.features):
        return loaded
    if loaded.fingerprint != run.fingerprint:
        raise ValueError(
            f"{opened.source.path} is not the base that {run.path} was trained on: its fingerprint is "
            f"{loaded.fingerprint[:12]}, expected {run.fingerprint[:12]}. Give the path of the right one: --model. "
            f"{EARLIER_OFFSETS}"
        )
    return loaded


def load_for_training(
    source: ModelSource,
    features: ModelConfig,
    weights: WeightFormat,
    lora: LoraArgs,
    key: jax.Array,
    progress: Progress | None = None,
    *,
    mesh: Mesh | None = None,
    new_ids: tuple[int, ...] = (),
    fingerprint: str | None = None,
) -> tuple[Loaded, InitialAdapter | None]:
    """Loads a base for a new adapter: (the base, what the adapter starts with if that is a part of the weights).

    Args:
      key: of the adapter's initial values.
      mesh: devices that share the base; None for the default device.
      new_ids: ids of tokens whose rows train.
      fingerprint: of the checkpoint that the run resumes from, which is computed in its form.
    """
    load = functools.partial(
        load_model,
        *(source, features, weights, progress),
        mesh=mesh,
        whole_tables=rows_train(features, lora, new_ids),
        fingerprint=fingerprint,
    )
    if lora.init == "default":
        return load(), None
    decomposer = WeightDecomposer(features, weights, lora, key)
    return load(decomposer), decomposer.initial_adapter()


def apply_adapter(model: CausalLM, run: Run) -> ModelParts:
    """Puts the run's adapter on the model, in place, and returns the model's parts.

    Raises:
      ValueError: the adapter does not fit the model; the message names every projection that differs.
    """
    fresh = _with_fresh_adapter(model, run)
    return fresh.with_lora(jax.tree.map(jnp.asarray, run.lora))


def apply_adapter_with_reference(model: CausalLM, run: Run) -> tuple[ModelParts, ModelParts | None]:
    """Puts the run's adapter on the model like `apply_adapter`; returns (the run's model, the one it trained from).

    The latter has the parameters that the run started with: those in its folder, those of `lora.start`, or fresh ones,
    which change nothing by default. It is None if they are not those of the start, by the digest in the checkpoint; or
    for a PEFT adapter that replaces embedding tables, because the model has only one set of them.
    """
    config = model.config
    fresh = _with_fresh_adapter(model, run)
    trained = fresh.with_lora(jax.tree.map(jnp.asarray, run.lora))
    if run.tables:
        return trained, None
    initial = _start_of(run, config, fresh.lora)
    known = run.start_digest in (None, start_digest(initial))
    return trained, fresh.with_lora(initial) if known else None


def _start_of(run: Run, config: ModelConfig, fresh: Lora) -> Lora:
    """Returns the parameters that a run started with."""
    if run.start is not None:
        return starting_parameters(run.start, fresh, run.path / FILE)
    if run.lora_args.start is None:
        return fresh
    path = Path(run.lora_args.start)
    start = read_start_adapter(path, config, run.lora_args, run.new_ids, run.head)
    return starting_parameters(start, fresh, path)


def _with_fresh_adapter(model: CausalLM, run: Run) -> ModelParts:
    """Adds an adapter of the run's shapes to the model, in place, and returns the model's parts."""
    initial = None if run.initial is None else run.initial.factors
    attach_method(model, run.lora_args, jax.random.key(0), initial, frozen=run.frozen)
    if run.head is not None:
        model.add_sequence_head(run.head.spec(), jax.random.key(0))
    set_tables(model, run.tables)
    add_tables(model, run.new_ids, run.lora_args)
    fresh = partition(model)
    check_shapes(run.path, run.lora, fresh.lora)
    return fresh


def parts_before_training(model: CausalLM, run: Run | None) -> ModelParts:
    """The parts of the model as it was before the run's training.

    With lora.init=pissa or loftq that includes the initial adapter, which holds a part of the base's weights. Tokens
    that the base does not have get its mean row.
    """
    if run is not None:
        if run.initial is not None:
            attach_method(model, run.lora_args, jax.random.key(0), run.initial.factors)
        longest = max((0, *map(len, run.tables.values())))
        beyond = tuple(range(model.config.vocab_size, longest))
        add_token_rows(model, run.new_ids or beyond, run.lora_args.dtype)
    return partition(model)


def _quantization(args: ModelArgs, features: ModelConfig) -> WeightFormat:
    """Returns what determines the codes of the base, and so its fingerprint."""
    return dataclasses.replace(weight_format(args, features, "cpu"), dtype="float32", experts_on_host=False)


def open_tokenizer(source: ModelSource, args: ModelArgs, rows: int) -> Tokenizer:
    """The tokenizer of `source`, with the new tokens of `args`.

    Args:
      rows: rows of the model's embedding.

    Raises:
      ValueError: the tokenizer cannot be read; a token that is not special has no row; or a token is not new.
    """
    new = [*args.new_tokens, *args.new_special_tokens]
    tokenizer = fit_to_rows(load_tokenizer(source.tokenizer), rows, new, source.path)
    return with_new_tokens(tokenizer, args.new_tokens, args.new_special_tokens)
