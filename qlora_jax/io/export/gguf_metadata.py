"""What a GGUF file of a model holds beside its weights: like the base's own file, or made from a folder."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gguf.constants import GGMLQuantizationType

from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.io.gguf.architectures import ARCHITECTURES, OF_MODEL_TYPE, Architecture
from qlora_jax.io.gguf.config_reader import config_from_metadata
from qlora_jax.io.gguf.config_writer import features_lost, metadata_of, tensors_misplaced
from qlora_jax.io.gguf.header import TensorInfo
from qlora_jax.io.gguf.tokenizer_writer import vocabulary_of
from qlora_jax.io.gguf.writer import Frame, frame_like, keys_of, target_of
from qlora_jax.io.model_source import ModelSource
from qlora_jax.io.peft.writer import is_gguf
from qlora_jax.io.pretrained import OpenedModel
from qlora_jax.io.tensor_map import tensor_shapes
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families import model_config

WINDOW = "attention.sliding_window"
WINDOW_UNUSED = {"phi3"}  # llama.cpp reads the window, says that it does not use it, and lets every token see all


class Framed(NamedTuple):
    """A frame, and what whoever uses the file should know."""

    frame: Frame
    notes: list[str]


def framed(opened: OpenedModel) -> Framed:
    """The frame of a model's base: like the base's own file, or for a Hugging Face folder as the converter has it.

    Raises:
      ValueError: no architecture of GGUF, or features, tensors or a tokenizer that such a file can't hold: all of
        them but the tokenizer's at once.
    """
    source, features, tokenizer = opened.source, opened.full_features, opened.tokenizer
    bare, from_file = frame_without_tokenizer(opened), is_gguf(str(source.path))
    if from_file and features == opened.features and not tokenizer.new_ids:
        return Framed(bare, [])
    stop = source.tokenizer["stop_token_ids"]
    vocabulary, notes = vocabulary_of(tokenizer, features.vocab_size, stop, bare.architecture)
    if from_file:
        return Framed(_with_vocabulary(bare, features, vocabulary), notes)
    keys = [*keys_of(_named(source.path, tokenizer)), *bare.keys, *keys_of(vocabulary)]
    return Framed(bare._replace(keys=keys), notes + _notes(ARCHITECTURES[bare.architecture], features))


def _with_vocabulary(like: Frame, features: ModelConfig, vocabulary: Mapping[str, Any]) -> Frame:
    """The frame with another vocabulary, for which the tables of `features` have rows."""
    size, shapes = f"{like.architecture}.vocab_size", tensor_shapes(features)
    kept = [key for key in like.keys if key.name != size and not key.name.startswith("tokenizer.")]
    targets = {name: target._replace(shape=shapes[name]) for name, target in like.targets.items()}
    return like._replace(keys=[*kept, *keys_of({size: features.vocab_size, **vocabulary})], targets=targets)


def frame_without_tokenizer(opened: OpenedModel) -> Frame:
    """The frame of a model's base, without a tokenizer where that is a Hugging Face folder."""
    source, features = opened.source, opened.full_features
    if is_gguf(str(source.path)):
        return frame_like(source.path, source.config, opened.tokenizer.chat_template)
    return frame_of(source, features, tensor_shapes(features))


def frame_of(source: ModelSource, features: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> Frame:
    """Metadata and names of a model in a Hugging Face folder, in the form of llama.cpp's converter.

    Args:
      features: of the model.
      shapes: of its tensors, by Hugging Face's name.

    Raises:
      ValueError: no architecture of GGUF, or features and tensors that such a file can't hold, all at once.
    """
    model_type = source.config["model_type"]
    if model_type not in OF_MODEL_TYPE:
        raise ValueError(f"{source.path}: no GGUF architecture for model_type {model_type!r}: export with --format hf")
    architecture = OF_MODEL_TYPE[model_type]
    features = within_windows(features, architecture)
    names = {name: architecture.gguf_name(name) for name in shapes}
    metadata, tables = metadata_of(features, architecture)
    config = config_from_metadata(source.path, architecture, metadata, frozenset(names.values()), tables)
    if problems := _problems(architecture, features, model_config(config), names.values()):
        lines = "\n  ".join(problems)
        raise ValueError(
            f"{source.path}: a GGUF file of architecture {architecture.name} can't hold this model; export with "
            f"--format hf:\n  {lines}"
        )
    infos = {name: _info(there, shapes[name]) for name, there in names.items()}
    return Frame(
        architecture=architecture.name,
        keys=keys_of({"general.type": "model", **metadata}),
        targets={name: target_of(source.path, info, architecture, config) for name, info in infos.items()},
        tables=tables,
    )


# llama.cpp lets special tokens of a model that is called so take the space behind them, and looks up these tokens.
STRIPPING, STRIPPED = ("phi-3", "phi3"), ("</s>", "<unk>", "<s>", "<|endoftext|>")


def _named(folder: Path, tokenizer: Tokenizer) -> dict[str, str]:
    """general.name, the folder's, such that llama.cpp strips spaces where the tokenizer does; none where it can't."""
    name, backend = folder.absolute().name, tokenizer.backend
    strips = any(token.rstrip and token.special for token in backend.get_added_tokens_decoder().values())
    strips = strips and all(backend.token_to_id(token) is not None for token in STRIPPED)
    said = any(word in name.lower() for word in STRIPPING)
    if said == strips:
        return {"general.name": name}
    return {"general.name": f"{STRIPPING[0]} {name}"} if strips else {}


def _info(name: str, shape: tuple[int, ...]) -> TensorInfo:
    return TensorInfo(name=name, shape=shape, type=GGMLQuantizationType.F32, offset=0, nbytes=0)


def _problems(architecture: Architecture, features: ModelConfig, read: ModelConfig, names: Iterable[str]) -> list[str]:
    problems = [*features_lost(features, read), *tensors_misplaced(architecture, names)]
    queries = features.num_heads * features.head_dim
    if architecture.square and queries != features.embed_dim:
        problems.append(f"num_heads * head_dim = {queries}: llama.cpp takes it to be embed_dim = {features.embed_dim}")
    return problems


def within_windows(features: ModelConfig, architecture: Architecture) -> ModelConfig:
    """The model cut to the context within which its windows hide nothing, where a file has no key for windows."""
    windows = [window for window in features.windows if window is not None]
    if WINDOW in architecture.attributes or not windows:
        return features
    return dataclasses.replace(features, windows=(), max_positions=min(features.max_positions, *windows))


def _notes(architecture: Architecture, features: ModelConfig) -> list[str]:
    if not any(features.windows):
        return []
    if architecture.name in WINDOW_UNUSED:
        return ["llama.cpp does not use the sliding window of this architecture: beyond it, tokens see more than here"]
    cut = within_windows(features, architecture)
    if cut is features:
        return []
    return [
        f"a GGUF file of architecture {architecture.name} has no sliding window: it says a context of "
        f"{cut.max_positions} tokens instead of {features.max_positions}, and within that computes the same"
    ]
