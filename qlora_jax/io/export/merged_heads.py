"""Merged models with a sequence head: transformers' classes for sequence classification.

A model for embeddings is written as a causal model, whose body transformers' AutoModel reads.

Dimension key: D embed, C outputs.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.io.head_padding import Padding
from qlora_jax.io.peft.readme import label_settings
from qlora_jax.io.tensor_map import Slot
from qlora_jax.metadata import JsonObject
from qlora_jax.model_source import ModelSource
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.decoder import SCORE, CausalLM
from qlora_jax.models.families import model_config
from qlora_jax.models.partition import ModelParts, partition
from qlora_jax.objectives.head_objective import TrainedHead

TENSOR = f"{SCORE}.weight"
CAUSAL, CLASSIFIER = "ForCausalLM", "ForSequenceClassification"
OTHER_NAMES = {"Gemma3ForSequenceClassification": "Gemma3TextForSequenceClassification"}  # the former sees images


def with_score(
    slots: Sequence[Slot],
    config: JsonObject,
    head: TrainedHead,
    padding: Padding,
    lora: Mapping[str, Mapping[str, jax.Array | np.ndarray]],
    model: ModelConfig,
) -> tuple[list[Slot], JsonObject]:
    """Returns (slots, config.json) of the model with its sequence head in place of the language-model head.

    Args:
      padding: the padding token of its texts.
      lora: trained parameters; those of the head are {"score": {"weight": [D, C]}}.
    """
    if not head.outputs:
        return [*slots], config
    lm_head = model.hugging_face_name("lm_head.")
    kept = [slot for slot in slots if not slot.names[0].startswith(lm_head)]
    weight_CD = jnp.asarray(lora[SCORE]["weight"]).T
    score = Slot(path=(SCORE, "weight"), leaf=weight_CD, names=[TENSOR], stack=())
    return [*kept, score], {**config, "architectures": [class_name(config)], **label_settings(head, padding)}


def class_name(config: JsonObject) -> str:
    """Returns the name of transformers' class for sequence classification.

    Raises:
      ValueError: the config names no causal model.
    """
    named = (config.get("architectures") or [""])[0]
    if not named.endswith(CAUSAL):
        raise ValueError(
            f"--format hf: architectures in config.json names no model of transformers with a class for sequence "
            f"classification (found {named!r}, expected a name that ends with {CAUSAL}). Use --format peft"
        )
    name = named.removesuffix(CAUSAL) + CLASSIFIER
    return OTHER_NAMES.get(name, name)


def load_headed(source: ModelSource, head: TrainedHead, load: Callable[..., CausalLM]) -> ModelParts:
    """Loads a model that `with_score` described.

    Args:
      load: (source, features=) -> the model without a sequence head.
    """
    features = model_config(source.config, source.config_name)
    if head.outputs:  # the file has no language-model head
        body = {name: entry for name, entry in source.tensors.items() if name != TENSOR}
        model = load(
            dataclasses.replace(source, tensors=body), features=dataclasses.replace(features, tie_embeddings=True)
        )
    else:
        model = load(source)
    model.add_sequence_head(head.spec(), jax.random.key(0))
    parts = partition(model)
    if not head.outputs:
        return parts
    weight_DC = jnp.asarray(np.asarray(source.tensors[TENSOR].read(), np.float32).T)
    return parts.with_lora(parts.lora | {SCORE: {"weight": weight_DC}})
