"""The types that a mixture gives the tensors of a model are known before its file exists: they are llama.cpp's."""

from pathlib import Path

import pytest

from qlora_jax.config.exports import MIXTURES
from qlora_jax.io.gguf.expert_stacks import stack_name
from qlora_jax.io.gguf.header import parse_header
from qlora_jax.io.gguf.llama_quantizer import mixture_types, quantize_file
from qlora_jax.io.gguf.writer import spec_from_file, tensor_types, write_gguf, write_outline
from qlora_jax.io.open_model import open_model
from tests.io.gguf_families import FAMILIES, random_tensors, write_family
from tests.marks import EXHAUSTIVE, SLOW

WIDE = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=9)  # enough for K types that depend on the layer
WIDENED = ("llama", "qwen2", "mixtral", "gemma", "phi3", "cohere2")
CASES = [
    ("llama", WIDE, "q4_k_m"),
    *(pytest.param(name, WIDE, "q4_k_m", marks=SLOW) for name in ("mixtral", "phi3")),
    *(pytest.param(name, WIDE, dtype, marks=EXHAUSTIVE) for name in WIDENED for dtype in MIXTURES),
    *(pytest.param(name, {}, "q4_k_m", marks=EXHAUSTIVE) for name in FAMILIES),
]


def _file_and_spec(tmp_path: Path, name: str, changes: dict):
    architecture, config = FAMILIES[name]
    config = config | changes
    base = write_family(tmp_path / "base.gguf", architecture, config, random_tensors(config))
    source = open_model(base)
    spec = spec_from_file(base, source.config, None)
    path = tmp_path / "model.gguf"
    write_gguf(path, spec, list(spec.tensors), (source.tensors[name].read() for name in spec.tensors), "float16")
    return path, spec


def _types(path: Path) -> dict[str, str]:
    return {info.name: info.type.name for info in parse_header(path).tensors}


@pytest.mark.usefixtures("quantizer")
@pytest.mark.parametrize(("name", "changes", "dtype"), CASES)
def test_types_are_those_of_the_quantized_file(tmp_path: Path, name: str, changes: dict, dtype: str) -> None:
    path, spec = _file_and_spec(tmp_path, name, changes)
    planned = mixture_types(spec, dtype)
    quantize_file(path, tmp_path / "quantized.gguf", dtype, lambda *_: None)
    found = _types(tmp_path / "quantized.gguf")
    assert planned == {name: found[stack_name(tensor.name)] for name, tensor in spec.tensors.items()}
    assert len(set(planned.values())) > 1


def test_an_outline_is_the_file_without_its_weights(tmp_path: Path) -> None:
    path, spec = _file_and_spec(tmp_path, "qwen2", {})
    write_outline(tmp_path / "outline.gguf", spec, "float16")
    found, expected = (parse_header(each) for each in (tmp_path / "outline.gguf", path))
    assert found.metadata == expected.metadata
    assert {(i.name, i.shape, i.type) for i in found.tensors} == {(i.name, i.shape, i.type) for i in expected.tensors}
    assert (tmp_path / "outline.gguf").stat().st_size == path.stat().st_size
    assert tensor_types(spec, "float16") == {name: _types(path)[tensor.name] for name, tensor in spec.tensors.items()}
