"""Kinds of damaged files whose weights are stored codes, fused experts, or the text half of a larger model."""

import functools
import json
import random
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType
from safetensors.numpy import load_file, save_file

from qlora_jax.config import ModelArgs
from qlora_jax.io.hf.model_writer import TYPES
from qlora_jax.io.hf.reader import read_header
from qlora_jax.io.pretrained import open_base
from scripts.campaign.file_kind import FileKind
from scripts.campaign.model_files import (
    GGUF,
    MODEL,
    add_tokenizer,
    byte_level,
    damage_file,
    damage_gguf_file,
    damage_tensors,
    read_model,
    read_opened,
    set_vocabulary,
    variant,
)
from scripts.campaign.mutations import damage_bytes
from tests.ggml_codes import random_codes
from tests.io.float_folders import FLOAT_FORMS
from tests.io.gguf_families import FAMILIES, random_tensors
from tests.io.integer_folders import FORMS, Form, write_integer_folder
from tests.io.tiny_models import random_weights, tiny_config, write_folder, write_gguf

STORED_TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")  # rows of 64 weights have whole blocks of these
TOWERS = {"vision_tower.patch.weight": np.ones((3, 4), "f4"), "multi_modal_projector.linear.weight": np.ones(2, "f2")}


def _read_stored(path: Path) -> list[object]:
    """Loads a model with the codes of its files."""
    return read_opened(open_base(ModelArgs(path=str(path), quant_type="stored", compute_dtype="float32")))


# GGUF files in codes


def _write_stored_gguf(folder: Path) -> None:
    config = tiny_config()
    for name in STORED_TYPES:
        path = write_gguf(variant(folder, name) / GGUF, config, random_weights(config), GGMLQuantizationType[name])
        set_vocabulary(path, byte_level())


# gpt-oss in MXFP4


def _write_mxfp4(folder: Path) -> None:
    _, config = FAMILIES["gptoss"]
    tensors = {name: values for name, values in random_tensors(config).items() if ".experts." not in name}
    experts, width, inner = config["num_local_experts"], config["hidden_size"], config["intermediate_size"]
    for layer in range(config["num_hidden_layers"]):
        stem = f"model.layers.{layer}.mlp.experts"
        for name, rows, columns in (("gate_up_proj", 2 * inner, width), ("down_proj", width, inner)):
            blocks = random_codes("MXFP4", (experts, rows), columns).reshape(experts, rows, columns // 32, 17)
            tensors |= {f"{stem}.{name}_scales": np.ascontiguousarray(blocks[..., 0])}
            tensors |= {f"{stem}.{name}_blocks": np.ascontiguousarray(blocks[..., 1:])}
            tensors |= {f"{stem}.{name}_bias": np.ones((experts, rows), np.float32)}
    write_folder(folder / MODEL, config | {"quantization_config": {"quant_method": "mxfp4"}}, tensors)
    add_tokenizer(folder / MODEL)


def _damage_mixture(chance: random.Random, folder: Path) -> str:
    """Damages config.json, the header, or the bytes of tensors."""
    place, path = chance.random(), folder / MODEL / "model.safetensors"
    if place < 0.4:
        return damage_file(chance, folder / MODEL / "config.json")
    if place < 0.9:
        return damage_tensors(chance, path)
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    path.write_bytes(content[:end] + damage_bytes(chance, content[end:]))
    return f"{path.name}: bytes of tensors"


# Codes of GPTQ, AWQ, compressed-tensors, ModelOpt and FP8


def _write_coded(forms: Mapping[str, Form], folder: Path) -> None:
    config = tiny_config()
    for name, form in forms.items():
        target = variant(folder, name) / MODEL
        write_integer_folder(target, form, config, random_weights(config))
        add_tokenizer(target)


def _damage_coded(chance: random.Random, folder: Path) -> str:
    """Removes, cuts or retypes a tensor, or damages as in mixtures."""
    if chance.random() < 0.5:
        return _damage_mixture(chance, folder)
    path = folder / MODEL / "model.safetensors"
    tensors = {entry.name: np.array(entry.read()) for entry in read_header(path, TYPES)}
    name = chance.choice([name for name in tensors if "_proj." in name])
    values = tensors.pop(name)
    changes = (None, values[1:], values.T, values[..., None], values.view(np.uint8), values * 0, values[:0])
    if (changed := chance.choice(changes)) is not None:
        tensors[name] = np.ascontiguousarray(changed)
    save_file(tensors, path)
    return f"{name}, {'removed' if changed is None else f'{changed.dtype} {changed.shape}'}"


# Experts of a projection in one tensor, as transformers 5 writes them


def _write_fused(folder: Path) -> None:
    _, config = FAMILIES["qwen3moe"]
    tensors, experts = random_tensors(config), config["num_experts"]
    for layer in range(config["num_hidden_layers"]):
        stem = f"model.layers.{layer}.mlp.experts"
        parts = {
            name: np.stack([tensors.pop(f"{stem}.{expert}.{name}.weight") for expert in range(experts)])
            for name in ("gate_proj", "up_proj", "down_proj")
        }
        tensors[f"{stem}.gate_up_proj"] = np.concatenate([parts["gate_proj"], parts["up_proj"]], axis=1)
        tensors[f"{stem}.down_proj"] = parts["down_proj"]
    write_folder(folder / MODEL, config, tensors)
    add_tokenizer(folder / MODEL)


# Text halves


def _write_multimodal(folder: Path) -> None:
    config = {"model_type": "llava", "text_config": tiny_config()}
    weights = random_weights(tiny_config(tie_word_embeddings=False))
    named = {f"language_model.{name}": values for name, values in weights.items()}
    write_folder(folder / MODEL, config, named | TOWERS)
    add_tokenizer(folder / MODEL)


def _damage_multimodal(chance: random.Random, folder: Path) -> str:
    """Renames tensors to names of the other generation, or damages as in mixtures."""
    path = folder / MODEL / "model.safetensors"
    if chance.random() < 0.8:
        return _damage_mixture(chance, folder)
    tensors = load_file(path)
    for name in chance.sample(sorted(tensors), chance.choice((1, 2, len(tensors)))):
        bare = name.removeprefix("language_model.model.").removeprefix("language_model.")
        start = chance.choice(("model.language_model.", "language_model.", "model.", "", "model.vision_tower.", "x."))
        tensors[start + bare] = tensors.pop(name) if chance.random() < 0.8 else tensors[name]
    save_file(tensors, path)
    config = folder / MODEL / "config.json"
    kind = chance.choice(("llava", "gemma3", "mistral3", "internvl", "qwen2_vl"))
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": kind}))
    return f"other names, {kind}"


MIXTURE_KINDS: Mapping[str, FileKind] = (
    {
        "stored_gguf": FileKind(
            write=_write_stored_gguf, variants=True, damage=damage_gguf_file, read=lambda f: _read_stored(f / GGUF)
        ),
        "mxfp4": FileKind(write=_write_mxfp4, damage=_damage_mixture, read=lambda f: _read_stored(f / MODEL)),
    }
    | {
        name: FileKind(
            write=functools.partial(_write_coded, forms),
            variants=True,
            damage=_damage_coded,
            read=lambda f: _read_stored(f / MODEL),
        )
        for name, forms in {"integers": FORMS, "floats": FLOAT_FORMS}.items()
    }
    | {
        "fused_experts": FileKind(write=_write_fused, damage=_damage_mixture, read=lambda f: read_model(f / MODEL)),
        "multimodal": FileKind(
            write=_write_multimodal, damage=_damage_multimodal, read=lambda f: read_model(f / MODEL)
        ),
    }
)
