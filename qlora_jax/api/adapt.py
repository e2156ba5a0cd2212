"""`add_adapter`: puts a new adapter on a loaded model."""

import dataclasses
from pathlib import Path

import jax
from flax import nnx

from qlora_jax.api.provenance import attach, parts_of, provenance_of
from qlora_jax.api.settings import loading_bar
from qlora_jax.config import Config, DataArgs, LoraArgs, validate
from qlora_jax.io.export.gguf_metadata import with_merge_types
from qlora_jax.io.loading.adapter_init import check_decomposable
from qlora_jax.io.peft.start_adapter import read_start_adapter
from qlora_jax.io.pretrained import load_for_training
from qlora_jax.models.decoder import CausalLM
from qlora_jax.models.partition import combine
from qlora_jax.nn.random_keys import named_key
from qlora_jax.training.run_spec import weights_for
from qlora_jax.training.session import training_parts


def add_adapter(
    model: nnx.Module, lora: LoraArgs | None = None, *, key: jax.Array | None = None, progress: bool = False
) -> CausalLM:
    """Returns the model with a new adapter; the adapter is what trains.

    >>> model = q.add_adapter(model, q.LoRA(rank=8, target_modules=["q_proj", "v_proj"]))
    >>> model.model.layers.self_attn.q_proj.adapter.lora_a.shape  # layers, inputs, rank
    (2, 64, 8)

    The given model stays as it is. Both share the arrays of the base, except with `init="pissa"` or "loftq": these take
    a part of each weight, so the base is read from disk again.

    Args:
      model: a base from `load`.
      lora: rank, alpha, target modules and so on; None for the defaults.
      key: random key of the initial values; None for `jax.random.key(0)`. `jax.random.key(seed)` gives the values that
        the command has with `--train.seed`.
      progress: show a progress bar if the base is read again.

    Raises:
      TypeError: `lora` is not a `qlora_jax.LoRA`.
      ValueError: the model is not from `load` or has an adapter, settings contradict each other, or a pattern of target
        modules matches nothing.
    """
    provenance = provenance_of(model)
    if provenance.lora_args is not None:
        raise ValueError("model: already has an adapter. Load the base with qlora_jax.load to add another")
    opened, args = provenance.opened, provenance.opened.args
    lora = LoraArgs() if lora is None else lora
    if not isinstance(lora, LoraArgs):
        raise TypeError(f"lora: found {lora!r}, expected qlora_jax.LoRA(...)")
    validate(Config(model=args, lora=lora, data=DataArgs(train="unused"), output="unused"))
    lora = with_merge_types(lora, opened.source, opened.features)
    check_decomposable(opened.source, lora)
    key = named_key(jax.random.key(0) if key is None else key, "lora")
    fingerprint, initial, base = provenance.fingerprint, None, combine(parts_of(model))
    if lora.init != "default":
        weights = weights_for(args, opened.source, opened.features)
        with loading_bar(progress) as report:
            loaded, initial = load_for_training(opened.source, opened.features, weights, lora, key, report)
        fingerprint, base = loaded.fingerprint, loaded.model
    new_ids = opened.tokenizer.new_ids
    start = None if lora.start is None else read_start_adapter(Path(lora.start), opened.features, lora, new_ids)
    parts = training_parts(base, lora, key, new_ids=new_ids, initial=initial, start=start)
    changed = dataclasses.replace(provenance, fingerprint=fingerprint, lora_args=lora, initial=initial)
    return attach(combine(parts), changed)
