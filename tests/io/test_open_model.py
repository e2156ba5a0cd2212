"""Models of strangers: each wrong value of a metadata file is one error that names the file and the key."""

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest

from qlora_jax.data.tokenizer.tokenizer import load_tokenizer
from qlora_jax.io.loading.loader import load_model
from qlora_jax.io.open_model import open_model
from qlora_jax.models.config import WeightFormat
from qlora_jax.models.families import model_config
from tests.io.gguf_families import FAMILIES
from tests.io.tiny_models import _add as add_key
from tests.io.tiny_models import random_weights, tiny_config, tokenizer_json, write_folder, write_gguf

HOSTILE: list[Any] = [True, 0, -1, 1.5, math.nan, math.inf, 2**31, 2**63, 10**400, "", "x", "x" * 100_000]
HOSTILE += [[], [None], [[]], ["x", 3], {}, {"a": 1}, {"a": {"b": []}}]
LIMIT = 5  # seconds of processor time for one file
CONFIG = tiny_config()
WEIGHTS = random_weights(CONFIG)
SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
BOS = {"SpecialToken": {"id": "<s>", "type_id": 0}}
TEMPLATE = {"type": "TemplateProcessing", "single": [BOS, {"Sequence": {"id": "A", "type_id": 0}}], "pair": [BOS]}
TEMPLATE |= {"special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}}
TOKENIZER = json.loads(tokenizer_json()) | {"post_processor": {"type": "Sequence", "processors": [TEMPLATE]}}
FILES: dict[str, Any] = {
    "tokenizer_config.json": SPECIAL | {"add_bos_token": None, "chat_template": [{"name": "default", "template": "t"}]},
    "special_tokens_map.json": {"pad_token": {"content": "</s>"}},
    "generation_config.json": {"eos_token_id": [2]},
    "model.safetensors.index.json": {"weight_map": dict.fromkeys(WEIGHTS, "model-00001-of-00001.safetensors")},
    "tokenizer.json": {"post_processor": TOKENIZER["post_processor"]},
}


def changed(value: Any, hostile: Any) -> Iterator[Any]:
    """Yields the value with each of its parts, and itself, replaced by a hostile one."""
    yield hostile
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in list(items)[:6]:
        for other in changed(part, hostile):
            copy = value.copy()
            copy[key] = other
            yield copy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_folder(tmp_path_factory.mktemp("model"), CONFIG, WEIGHTS)
    (path / "model.safetensors").rename(path / "model-00001-of-00001.safetensors")
    for name, content in FILES.items():
        (path / name).write_text(json.dumps(TOKENIZER if name == "tokenizer.json" else content))
    return path


def _open(path: Path) -> None:
    source = open_model(path)
    model_config(source.config, source.config_name)


def opens_or_names_the_file(path: Path, name: Path) -> bool:
    """Returns False if a ValueError that names the file was raised; anything else that is raised is a failure."""
    start = time.process_time()
    try:
        _open(path)
    except ValueError as error:
        assert str(name) in str(error) and len(str(error)) < 20_000
        return False
    finally:
        assert time.process_time() - start < LIMIT
    return True


@pytest.mark.parametrize("name", FILES)
def test_a_value_of_another_type_is_an_error_that_names_the_file(folder: Path, name: str):
    path = folder / name
    sound, refused = path.read_bytes(), 0
    try:
        for hostile in HOSTILE[1::3]:
            for content in changed(FILES[name], hostile):
                path.write_text(json.dumps(content))
                refused += not opens_or_names_the_file(folder, folder if "index" in name else path)
    finally:
        path.write_bytes(sound)
    _open(folder)
    load_tokenizer(open_model(folder).tokenizer)
    assert refused >= 5


SCALINGS = [
    {"type": "linear", "factor": 2.0},
    {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
    | {"original_max_position_embeddings": 64},
    {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32, "mscale": 1.0, "truncate": False, "attention_factor": None},
    {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
]
CONFIGS = {name: config for name, (_, config) in FAMILIES.items()}
CONFIGS |= {f"rope {number}": CONFIG | {"rope_scaling": scaling} for number, scaling in enumerate(SCALINGS)}
CONFIGS |= {"bitsandbytes": CONFIG | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}}
CONFIGS |= {"ropes": CONFIGS["gemma3"] | {"rope_parameters": {"full_attention": SCALINGS[0]}, "rope_scaling": None}}


@pytest.mark.parametrize("family", CONFIGS)
def test_a_config_with_an_attribute_of_another_type_is_described_or_refused(family: str):
    config = CONFIGS[family]
    for hostile in HOSTILE[::2]:
        for key, value in config.items():
            for other in changed(value, hostile):
                start = time.process_time()
                try:
                    features = model_config(config | {key: other}, "m/config.json")
                except ValueError as error:
                    assert str(error).startswith("m/config.json: ") and len(str(error)) < 20_000
                else:
                    assert features.parameters() > 0 and hash(features)
                assert time.process_time() - start < LIMIT


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_hidden_layers=10**9), "num_hidden_layers: found 1000000000, expected at most 4096"),
        (dict(num_hidden_layers=4096), r"missing: model.layers.\*.input_layernorm.weight in layers 2 to 4095"),
        (dict(vocab_size=2**31), f"vocab_size: found {2**31}, expected at most"),
        (dict(vocab_size=2**24), rf"shape \[32, 64\] of lm_head.weight, expected \[{2**24}, 64\]"),
        (dict(num_attention_heads=4096, head_dim=2**14), rf"expected \[{2**26}, 64\]"),
        (dict(intermediate_size=2**20, hidden_size=2**18), rf"expected \[{2**20}, {2**18}\]"),
        (dict(max_position_embeddings=2**40), "max_position_embeddings: found"),
    ],
)
def test_sizes_are_compared_with_the_files_before_anything_is_allocated(tmp_path: Path, changes: dict, message: str):
    folder = write_folder(tmp_path, CONFIG | changes, WEIGHTS)
    start = time.process_time()
    with pytest.raises(ValueError, match=message) as error:
        source = open_model(folder)
        load_model(source, model_config(source.config, source.config_name), WeightFormat())
    assert str(folder) in str(error.value) and len(str(error.value)) < 50_000
    assert time.process_time() - start < LIMIT


KEYS: dict[str, Any] = {
    "general.architecture": "llama",
    "general.alignment": 64,
    "llama.block_count": 2,
    "llama.attention.head_count": 4,
    "llama.rope.freq_base": 1e4,
    "llama.rope.scaling.type": "linear",
    "tokenizer.chat_template": "t",
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.merges": ["t 0"],
    "tokenizer.ggml.token_type": [1, 2],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.add_bos_token": True,
}
GGUF_VALUES = [True, 0, 3, 2**31, 2**32 - 1, 1.5, math.nan, "", "x", [1], ["x"], ["absent tokens"], [0.5]]


@pytest.mark.parametrize("key", KEYS)
def test_a_gguf_key_of_another_type_is_read_or_refused(tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch):
    write, refused = gguf.GGUFWriter.write_header_to_file, 0
    for number, value in enumerate(GGUF_VALUES):

        def changed_header(writer: gguf.GGUFWriter, value: Any = value) -> None:
            writer.kv_data[0].pop(key, None)
            add_key(writer, key, value)
            write(writer)

        monkeypatch.setattr(gguf.GGUFWriter, "write_header_to_file", changed_header)
        path = write_gguf(tmp_path / f"{number}.gguf", CONFIG, WEIGHTS)
        try:
            _open(path)
            load_tokenizer(open_model(path).tokenizer)
        except ValueError as error:
            assert str(path) in str(error) or str(error).startswith("GGUF: ")
            refused += 1
    assert refused
