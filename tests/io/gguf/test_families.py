"""GGUF files of every architecture: config and tensors are those that the file was made from."""

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from qlora_jax.io.gguf.architectures import ARCHITECTURES
from qlora_jax.io.gguf.header import TensorInfo
from qlora_jax.io.gguf.reader import transform_of
from qlora_jax.io.gguf.writer import spec_from_file, write_gguf
from qlora_jax.io.open_model import open_model
from qlora_jax.models.families import model_config
from qlora_jax.models.families.multimodal import text_only
from tests.io.gguf_families import FAMILIES, ONE_MORE, TEXT_HALVES, random_tensors, with_images, write_family


def test_every_architecture_is_tried():
    tried = {architecture for architecture, *_ in (*FAMILIES.values(), *TEXT_HALVES.values())}
    assert tried == ARCHITECTURES.keys()


@pytest.mark.parametrize("name", FAMILIES)
def test_config_and_tensors_return(tmp_path: Path, name: str) -> None:
    architecture, config = FAMILIES[name]
    tensors = random_tensors(config)
    source = open_model(write_family(tmp_path / "t.gguf", architecture, config, tensors))
    assert model_config(source.config) == model_config(config)
    assert source.tensors.keys() == tensors.keys()
    rounding = 1e-7 if architecture in ONE_MORE else 0  # 1 is added and taken away
    for tensor, values in tensors.items():
        np.testing.assert_allclose(source.tensors[tensor].read(), values, rtol=0, atol=rounding, err_msg=tensor)


@pytest.mark.parametrize("kind", TEXT_HALVES)
def test_text_halves_are_text_models(tmp_path: Path, kind: str) -> None:
    """A file with three positions per token is a model of the family that computes the same on text."""
    architecture, _, _, sections = TEXT_HALVES[kind]
    whole, text = with_images(kind)
    tensors = random_tensors(text)
    source = open_model(write_family(tmp_path / "t.gguf", architecture, text, tensors, sections))
    assert model_config(source.config) == model_config(text) == text_only(model_config(whole))
    assert source.tensors.keys() == tensors.keys()
    for tensor, values in tensors.items():
        np.testing.assert_array_equal(source.tensors[tensor].read(), values, err_msg=tensor)


SECTIONS = {
    "missing": (None, "missing"),
    "a fourth position": ([2, 3, 2, 1], r"found \[2, 3, 2, 1\], expected three numbers with sum 8, half of "),
    "too few": ([2, 3, 2], r"found \[2, 3, 2, 0\], expected three numbers with sum 8"),
    "negative": ([-2, 5, 5], "found -2"),
}


@pytest.mark.parametrize("problem", SECTIONS)
def test_sections_that_text_does_not_ignore_are_refused(tmp_path: Path, problem: str) -> None:
    sections, message = SECTIONS[problem]
    text = with_images("qwen2_vl")[1]
    path = write_family(tmp_path / "t.gguf", "qwen2vl", text, random_tensors(text), sections)
    with pytest.raises(ValueError, match=rf"qwen2vl.rope.dimension_sections(\.0)?: {message}"):
        open_model(path)


def test_layers_for_further_tokens_are_left_out(tmp_path: Path) -> None:
    """GLM-4.5's files have such a layer at the end, which block_count includes."""
    architecture, config = FAMILIES["glm4moe"]
    tensors, more = random_tensors(config), random_tensors(config | {"num_hidden_layers": 4})
    longer = config | {"num_hidden_layers": 4, "num_nextn_predict_layers": 1}
    path = write_family(tmp_path / "t.gguf", architecture, longer, more)
    source = open_model(path)
    assert source.tensors.keys() == tensors.keys() < more.keys()
    assert source.config["num_nextn_predict_layers"] == 0 and source.not_loaded.startswith("blk.3 (")
    assert model_config(source.config) == model_config(config)
    spec = spec_from_file(path, source.config, None)
    write_gguf(tmp_path / "new.gguf", spec, list(tensors), iter(tensors.values()), "float32")
    again = open_model(tmp_path / "new.gguf")
    assert model_config(again.config) == model_config(config) and again.tensors.keys() == tensors.keys()


def test_a_wrong_number_of_fused_rows_is_told(tmp_path: Path) -> None:
    info = TensorInfo(name="blk.1.attn_qkv.bias", shape=(128,), type=Kind.F32, offset=0, nbytes=512)
    with pytest.raises(ValueError, match=r"blk.1.attn_qkv.bias, F32 \[128\].*expected 4 heads of as many rows"):
        transform_of(tmp_path, info, ARCHITECTURES["gptneox"], {"num_attention_heads": 4})


def test_more_heads_than_the_width_is_refused(tmp_path: Path) -> None:
    """The width of a head would be 0, and the fraction of it that rotates is divided by it."""
    architecture, config = FAMILIES["phi3"]
    path = write_family(tmp_path / "t.gguf", architecture, config, random_tensors(config))
    key = b"phi3.attention.head_count" + struct.pack("<I", gguf.GGUFValueType.UINT32)
    rotated = b"phi3.rope.dimension_count"
    content = path.read_bytes().replace(key + struct.pack("<I", 4), key + struct.pack("<I", 1028))
    path.write_bytes(content.replace(rotated, rotated.replace(b"phi3", b"phi4")))
    with pytest.raises(ValueError, match=r"phi3.attention.head_count: found 1028, expected at most 64, the width"):
        open_model(path)
