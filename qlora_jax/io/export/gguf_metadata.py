"""Builds the GGUF metadata of an exported model, from the base's GGUF file or from its Hugging Face folder."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from flax import nnx
from gguf.constants import GGMLQuantizationType

from qlora_jax.config import LoraArgs
from qlora_jax.config.exports import MIXTURES
from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.io.gguf.architectures import ARCHITECTURES, OF_MODEL_TYPE, Architecture
from qlora_jax.io.gguf.config_reader import config_from_metadata
from qlora_jax.io.gguf.config_writer import config_metadata, features_lost, image_metadata, tensors_misplaced
from qlora_jax.io.gguf.header import TensorInfo
from qlora_jax.io.gguf.llama_quantizer import mixture_types
from qlora_jax.io.gguf.tokenizer_metadata import STOP_KEYS, tokenizer_metadata
from qlora_jax.io.gguf.writer import GgufSpec, output_tensor, spec_from_file, typed_keys
from qlora_jax.io.peft.writer import is_gguf
from qlora_jax.io.pretrained import OpenedModel
from qlora_jax.io.tensor_map import slots_of, tensor_shapes
from qlora_jax.methods.merge_into import file_matrices
from qlora_jax.model_source import ModelSource
from qlora_jax.models.config import ModelConfig, WeightFormat
from qlora_jax.models.decoder import CausalLM
from qlora_jax.models.families import model_config
from qlora_jax.models.families.multimodal import text_config, text_only, text_only_name
from qlora_jax.untrusted_json import JsonObject

WINDOW = "attention.sliding_window"
WINDOW_UNUSED = {"phi3"}  # llama.cpp reads the window but ignores it: every token attends to all before it


class ExportSpec(NamedTuple):
    """The file without its weights, and notes for its users."""

    spec: GgufSpec
    notes: list[str]


def export_spec(opened: OpenedModel) -> ExportSpec:
    """Builds the spec of a model's base, from its GGUF file or, as llama.cpp's converter does, from its folder.

    Raises:
      ValueError: GGUF has no such architecture, or cannot store the features, tensors (all problems are named) or the
        tokenizer.
    """
    source, features, tokenizer = opened.source, opened.full_features, opened.tokenizer
    spec, from_file = spec_without_tokenizer(opened), is_gguf(str(source.path))
    if from_file and features == opened.features and not tokenizer.new_ids:
        return with_stop_ids(spec, opened.unlisted_stop_ids)
    vocabulary, notes = tokenizer_metadata(tokenizer, features.vocab_size, opened.stop_ids, spec.architecture)
    if from_file:
        return ExportSpec(_with_vocabulary(spec, features, vocabulary), notes)
    keys = [*typed_keys(_general_name(source.path, tokenizer)), *spec.keys, *typed_keys(vocabulary)]
    return ExportSpec(spec._replace(keys=keys), notes + _notes(ARCHITECTURES[spec.architecture], features))


def with_stop_ids(spec: GgufSpec, unlisted: Sequence[int]) -> ExportSpec:
    """Adds ids that end a reply to those of the spec; notes those for which it has no key left."""
    used = {key.name for key in spec.keys}
    free = [key for key in STOP_KEYS[1:] if key not in used]
    added = spec._replace(keys=[*spec.keys, *typed_keys(dict(zip(free, unlisted, strict=False)))])
    if len(unlisted) <= len(free):
        return ExportSpec(added, [])
    left = list(unlisted[len(free) :])
    note = f"a GGUF file can list {len(STOP_KEYS)} tokens that end a reply, so the ids {left} are not listed"
    return ExportSpec(added, [note])


def _with_vocabulary(spec: GgufSpec, features: ModelConfig, vocabulary: JsonObject) -> GgufSpec:
    """Replaces the vocabulary; embedding and head get the number of rows in `features`."""
    size, shapes = f"{spec.architecture}.vocab_size", tensor_shapes(features)
    kept = [key for key in spec.keys if key.name != size and not key.name.startswith("tokenizer.")]
    tensors = {name: tensor._replace(shape=shapes[name]) for name, tensor in spec.tensors.items()}
    return spec._replace(keys=[*kept, *typed_keys({size: features.vocab_size, **vocabulary})], tensors=tensors)


def spec_without_tokenizer(opened: OpenedModel) -> GgufSpec:
    """The spec of a model's base; the tokenizer is included only if the base is a GGUF file."""
    return _spec_of(opened.source, opened.full_features, opened.tokenizer.chat_template)


def _spec_of(source: ModelSource, features: ModelConfig, chat_template: str | None) -> GgufSpec:
    if is_gguf(str(source.path)):
        return spec_from_file(source.path, source.config, chat_template)
    return spec_from_folder(source, features, tensor_shapes(features))


def with_merge_types(lora: LoraArgs, source: ModelSource, features: ModelConfig) -> LoraArgs:
    """Returns the settings with llama.cpp's type of each tensor, if `lora.merge_into` is a mixture and they have none.

    Raises:
      ValueError: a GGUF file cannot hold the model, or llama.cpp's quantizer is missing or refuses it.
    """
    if lora.merge_into not in MIXTURES or lora.merge_types:
        return lora
    types, found = mixture_types(_spec_of(source, features, None), lora.merge_into), {}
    for slot in slots_of(nnx.eval_shape(lambda: CausalLM(features, WeightFormat(quant_type=None)))):
        if slot.module in file_matrices(features) and slot.path[-1] == "weight":
            experts = 1 if len(slot.stack) < 2 else slot.stack[1]  # The file has one tensor for those of a layer.
            words = [types[name] for name in slot.names[::experts]]
            found[slot.module] = words[0] if len({*words}) == 1 else " ".join(words)
    return dataclasses.replace(lora, merge_types=found)


def spec_from_folder(source: ModelSource, features: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> GgufSpec:
    """Builds metadata and tensor names for a Hugging Face folder in the form of llama.cpp's converter.

    Args:
      features: the model's features.
      shapes: shapes of its tensors by Hugging Face's name.

    Raises:
      ValueError: GGUF has no such architecture, or cannot store the features and tensors; all problems are named.
    """
    model_type = str(text_config(source.config)["model_type"])
    if model_type not in OF_MODEL_TYPE:
        raise ValueError(
            f"{source.path}: model_type {model_type!r} has no GGUF architecture that is supported here. Export with "
            "--format hf"
        )
    architecture = OF_MODEL_TYPE[model_type]
    features = text_only(within_windows(features, architecture))
    gguf_names = {name: architecture.gguf_name(text_only_name(name)) for name in shapes}
    metadata, tables = config_metadata(features, architecture)
    metadata |= image_metadata(source.path, source.config, architecture)
    config = config_from_metadata(source.path, architecture, metadata, frozenset(gguf_names.values()), tables)
    if problems := _problems(architecture, features, model_config(config), gguf_names.values()):
        lines = "\n  ".join(problems)
        raise ValueError(
            f"{source.path}: a GGUF file of architecture {architecture.name} cannot store this model. Export with "
            f"--format hf:\n  {lines}"
        )
    infos = {name: _info(gguf_name, shapes[name]) for name, gguf_name in gguf_names.items()}
    return GgufSpec(
        architecture=architecture.name,
        keys=typed_keys({"general.type": "model", **metadata}),
        tensors={name: output_tensor(source.path, info, architecture, config) for name, info in infos.items()},
        tables=tables,
    )


# In models with one of these names, llama.cpp strips the space after special tokens, and looks up these tokens.
STRIPPING_NAMES, STRIPPED_TOKENS = ("phi-3", "phi3"), ("</s>", "<unk>", "<s>", "<|endoftext|>")


def _general_name(folder: Path, tokenizer: Tokenizer) -> dict[str, str]:
    """The key general.name, chosen so that llama.cpp strips spaces if and only if the tokenizer does; or empty."""
    name, backend = folder.absolute().name, tokenizer.backend
    strips = any(token.rstrip and token.special for token in backend.get_added_tokens_decoder().values())
    strips = strips and all(backend.token_to_id(token) is not None for token in STRIPPED_TOKENS)
    implied = any(word in name.lower() for word in STRIPPING_NAMES)
    if implied == strips:
        return {"general.name": name}
    return {"general.name": f"{STRIPPING_NAMES[0]} {name}"} if strips else {}


def _info(name: str, shape: tuple[int, ...]) -> TensorInfo:
    return TensorInfo(name=name, shape=shape, type=GGMLQuantizationType.F32, offset=0, nbytes=0)


def _problems(architecture: Architecture, features: ModelConfig, read: ModelConfig, names: Iterable[str]) -> list[str]:
    problems = [*features_lost(features, read), *tensors_misplaced(architecture, names)]
    queries = features.num_heads * features.head_dim
    if architecture.square and queries != features.embed_dim:
        problems.append(f"num_heads * head_dim: found {queries}, llama.cpp requires embed_dim = {features.embed_dim}")
    return problems


def within_windows(features: ModelConfig, architecture: Architecture) -> ModelConfig:
    """The features with the context cut to the shortest window, if the architecture has no key for windows."""
    windows = [window for window in features.windows if window is not None]
    if WINDOW in architecture.attributes or not windows:
        return features
    return dataclasses.replace(features, windows=(), max_positions=min(features.max_positions, *windows))


def _notes(architecture: Architecture, features: ModelConfig) -> list[str]:
    if not any(features.windows):
        return []
    if architecture.name in WINDOW_UNUSED:
        return ["llama.cpp ignores the sliding window of this architecture: beyond it, tokens attend to more than here"]
    cut = within_windows(features, architecture)
    if cut is features:
        return []
    return [
        f"a GGUF file of architecture {architecture.name} has no sliding window, so its context is "
        f"{cut.max_positions} tokens instead of {features.max_positions}; within it, the results are the same"
    ]
