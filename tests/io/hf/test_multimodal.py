"""Text halves of multimodal checkpoints: names of both generations, parts that are left out, and tied heads."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from qlora_jax.data.tokenizer.tokenizer import load_tokenizer
from qlora_jax.io.hf.model_writer import other_tensors, write_dense_folder, write_tokenizer
from qlora_jax.io.open_model import open_model
from qlora_jax.io.tensor_map import check_tensors, slots_of, tensor_shapes
from qlora_jax.model_source import ModelSource
from qlora_jax.models.config import WeightFormat
from qlora_jax.models.decoder import CausalLM
from qlora_jax.models.families import model_config
from qlora_jax.models.families.multimodal import text_only
from tests.io.integer_folders import awq, awq_config, random_integers
from tests.io.tiny_models import random_weights, tiny_config, tokenizer_json, write_folder

TOWERS = {"vision_tower.patch.weight": np.ones((3, 4), "f4"), "multi_modal_projector.linear.weight": np.ones(2, "f2")}
OLDER = {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."}
NEWER = {"model.": "model.language_model.", "lm_head.": "lm_head."}


def _renamed(weights: dict[str, np.ndarray], prefixes: dict[str, str]) -> dict[str, np.ndarray]:
    starts = [(name, old) for name in weights for old in prefixes if name.startswith(old)]
    return {prefixes[old] + name.removeprefix(old): weights[name] for name, old in starts}


def _write(folder: Path, prefixes=None, text: dict[str, Any] | None = None, towers=TOWERS, **config: Any) -> Path:
    """A llava folder; `text` changes text_config, `config` the attributes beside it."""
    text_config = tiny_config(**(text or {}))
    weights = _renamed(random_weights(tiny_config(tie_word_embeddings=False)), prefixes or OLDER)
    return write_folder(folder, {"model_type": "llava", "text_config": text_config, **config}, weights | towers)


def _checked(source: ModelSource) -> ModelSource:
    features = model_config(source.config, source.config_name)
    check_tensors(source, tensor_shapes(features), features)
    return source


def test_both_generations_of_names_are_one_model(tmp_path: Path) -> None:
    newer_towers = {f"model.{name}": tensor for name, tensor in TOWERS.items()}
    older, newer = _write(tmp_path / "older"), _write(tmp_path / "newer", NEWER, towers=newer_towers)
    first, second = _checked(open_model(older)), _checked(open_model(newer))
    assert first.tensors.keys() == second.tensors.keys() and first.config == second.config
    assert "model.language_model.layers.1.mlp.up_proj.weight" in first.tensors and "lm_head.weight" in first.tensors
    for name, entry in first.tensors.items():
        assert entry.name == name
        np.testing.assert_array_equal(entry.read(), second.tensors[name].read())
    for part in ("vision_tower (1 tensor, 48 B)", "multi_modal_projector (1 tensor, 4 B)"):
        assert part in str(first.multimodal) and part in str(second.multimodal)
    assert first.multimodal is not None and first.multimodal.others.keys() == TOWERS.keys()
    assert first.multimodal.names["lm_head.weight"] == "language_model.lm_head.weight"


def test_a_flat_checkpoint_of_qwen(tmp_path: Path) -> None:
    """Qwen2.5-VL is published with the text half's attributes and names as if it were alone."""
    config = tiny_config(tie_word_embeddings=False) | {"model_type": "qwen2_5_vl", "vision_config": {"depth": 1}}
    for attribute in ("attention_bias", "mlp_bias", "rope_scaling"):
        config.pop(attribute, None)
    text = random_weights(tiny_config(tie_word_embeddings=False, attention_bias=True))
    text = {name: values for name, values in text.items() if not name.endswith("o_proj.bias")}
    source = _checked(
        open_model(write_folder(tmp_path, config, text | {"visual.blocks.0.norm1.weight": np.ones(4, "f4")}))
    )
    assert source.multimodal is not None and str(source.multimodal) == "visual (1 tensor, 16 B)"
    for name, values in text.items():
        inside = name.replace("model.", "model.language_model.", 1)
        assert source.multimodal.names[inside] == name
        np.testing.assert_array_equal(source.tensors[inside].read(), values)


def test_unknown_parts_and_tensors_that_are_there_twice_are_refused(tmp_path: Path) -> None:
    _write(tmp_path / "audio", towers={"audio_tower.weight": np.ones(3, "f4")})
    with pytest.raises(ValueError, match=r"unexpected: audio_tower\.weight"):
        _checked(open_model(tmp_path / "audio"))
    _write(tmp_path / "twice", towers={"lm_head.weight": np.ones((32, 64), "f4")})
    with pytest.raises(ValueError, match=r"1 tensors are stored twice.*such as language_model\.lm_head\.weight"):
        open_model(tmp_path / "twice")
    config = dict(model_type="llava", text_config=[1])
    with pytest.raises(ValueError, match=r"text_config: not an object \(found \[1\], expected the config"):
        model_config(config)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({}, {}),
        ({"tie_word_embeddings": True}, {}),
        ({"model_type": "mistral3", "tie_word_embeddings": True}, {"model_type": "mistral"}),
        ({"model_type": "mistral3"}, {"model_type": "mistral"}),
    ],
)
def test_another_head_in_the_files_is_not_tied(tmp_path: Path, config, text) -> None:
    source = _checked(open_model(_write(tmp_path / "model", None, text | {"tie_word_embeddings": None}, **config)))
    assert source.config["tie_word_embeddings"] is False
    assert not model_config(source.config).tie_embeddings


def test_a_head_that_equals_the_embedding_or_is_absent_is_tied(tmp_path: Path) -> None:
    config = tiny_config(model_type="mistral", attention_bias=None, mlp_bias=None, tie_word_embeddings=None)
    weights = random_weights(tiny_config(tie_word_embeddings=True))
    for name, head in {"equal": {"lm_head.weight": weights["model.embed_tokens.weight"]}, "absent": {}}.items():
        tensors = _renamed(weights | head, OLDER) | TOWERS
        source = _checked(
            open_model(write_folder(tmp_path / name, {"model_type": "mistral3", "text_config": config}, tensors))
        )
        assert source.config["tie_word_embeddings"] is True, name
    with pytest.raises(ValueError, match=r"missing: lm_head\.weight"):
        config = {"model_type": "mistral3", "text_config": config, "tie_word_embeddings": False}
        _checked(open_model(write_folder(tmp_path / "missing", config, _renamed(weights, OLDER))))


@pytest.mark.parametrize("prefixes", [OLDER, NEWER])
def test_a_whole_checkpoint_is_written_as_it_was(tmp_path: Path, prefixes: dict[str, str]) -> None:
    folder, copy = _write(tmp_path / "model", prefixes, torch_dtype="float32"), tmp_path / "copy"
    source = open_model(folder)
    features = model_config(source.config)
    slots = slots_of(nnx.eval_shape(lambda: CausalLM(features, WeightFormat(quant_type=None))))
    copy.mkdir()
    forms = {"compute_dtype": np.dtype("f4"), "dtype": np.dtype("f4"), "adapters": {}}
    write_dense_folder(copy, slots, source.config, **forms, original=source.tensors, multimodal=source.multimodal)
    found, expected = load_file(copy / "model.safetensors"), load_file(folder / "model.safetensors")
    assert found.keys() == expected.keys() and TOWERS.keys() < found.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name, strict=True)
    assert json.loads((copy / "config.json").read_text()) == source.config


def test_codes_of_a_tower_are_written_dequantized_in_the_dtype_of_the_copy(tmp_path: Path) -> None:
    weight = random_integers((16, 64), 32)
    codes = {f"vision_tower.fc.{part}": np.ascontiguousarray(values) for part, values in awq(weight).items()}
    source = open_model(_write(tmp_path / "model", towers=TOWERS | codes, quantization_config=awq_config(32)))
    specs, values = other_tensors(source.multimodal, np.dtype(np.float16))
    found = {spec.name: (spec.dtype, each) for spec, each in zip(specs, values, strict=True)}
    assert found.keys() == {*TOWERS, "vision_tower.fc.weight"}
    for name, expected in (TOWERS | {"vision_tower.fc.weight": weight.dense().astype(np.float16)}).items():
        dtype, written = found[name]
        assert dtype == written.dtype
        np.testing.assert_array_equal(written, expected, strict=True)


def test_files_of_tokenizer_and_images_are_copied(tmp_path: Path) -> None:
    folder = _write(tmp_path / "model")
    files = {"tokenizer.json": tokenizer_json(), "preprocessor_config.json": '{"size": 8}'}
    files |= {"tokenizer_config.json": '{"image_token": "<s>"}', "chat_template.json": '{"chat_template": "{{ 1 }}"}'}
    for name, text in files.items():
        (folder / name).write_text(text)
    source = open_model(folder)
    assert source.tokenizer["chat_template"] == "{{ 1 }}"
    (tmp_path / "copy").mkdir()
    write_tokenizer(tmp_path / "copy", load_tokenizer(source.tokenizer), source, [])
    assert {path.name: path.read_text() for path in (tmp_path / "copy").iterdir()} == files
    write_tokenizer(tmp_path / "copy", load_tokenizer(source.tokenizer), source, [5])  # the end of a turn
    assert json.loads((tmp_path / "copy/generation_config.json").read_text()) == {"eos_token_id": [5]}


def test_what_a_published_text_config_says_besides_is_understood() -> None:
    text = tiny_config() | {"is_composition": True, "top_k": 50, "temperature": 1.0, "max_length": 20}
    half = model_config(
        {"model_type": "llava", "text_config": text, "image_seq_length": 576, "vision_feature_layer": -2}
    )
    assert text_only(half) == model_config(tiny_config())


def test_logits_that_wrappers_do_not_change_are_refused() -> None:
    text = dict(json.loads(json.dumps(tiny_config())), model_type="gemma3_text", final_logit_softcapping=30.0)
    for attribute in ("hidden_act", "mlp_bias", "rope_scaling"):
        del text[attribute]
    with pytest.raises(ValueError, match=r"changes the logits \(head_softcap\), which transformers does in the text"):
        model_config(dict(model_type="gemma3", text_config=text))
