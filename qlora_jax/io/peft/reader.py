"""Reads a PEFT adapter folder: LoRA parameters and their settings.

Dimension key: L layers, K in, R rank, N out.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

import numpy as np
from pydantic import with_config

from qlora_jax.config import LoraArgs
from qlora_jax.config.methods import LORA, peft_types
from qlora_jax.io.hf.hub import hub_name_of
from qlora_jax.io.hf.reader import read_header
from qlora_jax.io.peft.embeddings import read_tables, setting_problems
from qlora_jax.io.peft.head_adapters import head_modules, named_as_causal, read_score, without_lm_head
from qlora_jax.io.peft.multimodal import with_current_names
from qlora_jax.methods.method import form_of
from qlora_jax.methods.peft_form import CONFIG, NO_ARRAYS, WEIGHTS, PeftFile, PeftKeys
from qlora_jax.models.config import ModelConfig
from qlora_jax.objectives.head_objective import TrainedHead
from qlora_jax.untrusted_json import read_json, shorten, shorten_key

PICKLE = "adapter_model.bin"
# Settings of every method that do not change the computation; the tensors show which modules are targets.
HARMLESS = {
    *("auto_mapping", "inference_mode", "runtime_config", "fan_in_fan_out"),
    "layers_pattern",  # a model here has one stack of layers
}


@with_config(extra="allow")
class _Type(TypedDict, total=False):
    peft_type: object


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeftAdapter:
    """The contents of a PEFT adapter folder.

    Attributes:
      args: settings with which `attach_method` creates adapters of these shapes and scalings.
      lora: {"model.layers.self_attn.q_proj": {"lora_a": [L, K, R], "lora_b": [L, R, N]}} in f32, by our names;
        other leaves for other methods, and {"rows": [N, D]} of embedding and head.
      new_ids: ids of the tokens that these rows belong to.
      tables: embedding and head that replace the base's, if they were trained whole.
      base: path or name of the base model when the adapter was trained; None if the config does not say.
      frozen: arrays of the base that the method would draw from `args`, if the adapter has others.
      head: the sequence head, if the adapter has one; its matrix is in `lora`.
    """

    args: LoraArgs
    lora: dict[str, dict[str, np.ndarray]]
    base: str | None
    new_ids: tuple[int, ...]
    tables: dict[str, np.ndarray]
    frozen: Mapping[str, np.ndarray] = NO_ARRAYS
    head: TrainedHead | None = None


def is_adapter(folder: Path) -> bool:
    """True if a folder contains a PEFT adapter."""
    return (folder / CONFIG).is_file()


def base_model_of(folder: Path) -> str | None:
    """The path or name of an adapter's base model; a Hub name includes the revision, if the adapter has one."""
    config = read_json(folder / CONFIG, PeftKeys)
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    on_hub = hub_name_of(base) if base and revision else None
    return str(dataclasses.replace(on_hub, revision=revision)) if on_hub else base


def read_adapter(folder: Path, model: ModelConfig) -> PeftAdapter:
    """Reads the adapter in a folder for a model with these features.

    Raises:
      ValueError: the adapter's type or settings are not supported (all problems are named), or its tensors do not fit
        the model (all problems are named).
    """
    peft_type = read_json(folder / CONFIG, _Type).get("peft_type", LORA)
    form = form_of(peft_type) if isinstance(peft_type, str) else None
    if form is None:
        expected = " or ".join(map(repr, peft_types()))
        raise ValueError(f"{folder / CONFIG}:\n  peft_type: found {shorten(peft_type)}, expected {expected}")
    config: PeftKeys = read_json(folder / CONFIG, form.keys)
    problems = []
    if config.get("bias", "none") != "none":
        problems.append(f"bias: found {shorten(config.get('bias'))}, expected 'none'")
    problems += [f"{name} is missing" for name in form.required if name not in config]
    problems += form.problems(config)
    known = {*PeftKeys.__annotations__, *HARMLESS, *form.unused, *form.settings(config, model)}
    problems += [
        f"{shorten_key(name)}: {shorten(value)} is not supported"
        for name, value in sorted(config.items())
        if name not in known and value not in (None, False, {}, [])
    ]
    problems += setting_problems(config, without_lm_head(config, model), head_modules(config))
    if problems:
        raise ValueError(f"{folder / CONFIG}:\n  " + "\n  ".join(problems))
    if not (folder / WEIGHTS).is_file():
        raise ValueError(_no_weights(folder))
    entries = named_as_causal(config, with_current_names(list(read_header(folder / WEIGHTS)), model), model)
    head, score, entries, wrong_head = read_score(folder, config, entries, model)
    tables, tensors, wrong = read_tables(config, entries, without_lm_head(config, model))
    file = PeftFile(folder=folder, config=config, tensors=tensors, model=model, problems=wrong_head + wrong)
    lora, args, frozen = form.read(file)
    return PeftAdapter(
        args=args,
        lora=lora | tables.rows | score,
        base=config.get("base_model_name_or_path"),
        new_ids=tables.ids,
        tables=tables.whole,
        frozen=frozen,
        head=head,
    )


def _no_weights(folder: Path) -> str:
    if (folder / PICKLE).is_file():
        return (
            f"{folder}: {PICKLE} is a pickle, which is not read because it can run any code. If you trust it, convert "
            "it with peft: PeftModel.from_pretrained(base, folder).save_pretrained(new_folder)"
        )
    return f"{folder}: {WEIGHTS} is missing (found {CONFIG}). Copy it from where the adapter was trained"
