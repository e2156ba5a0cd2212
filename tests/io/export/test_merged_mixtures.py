"""Exports of runs that trained with the types of a mixture: the file is the one that llama.cpp's quantizer makes."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from qlora_jax.config import LoraArgs
from qlora_jax.config.exports import MIXTURES
from qlora_jax.export import main
from qlora_jax.io.export.gguf_metadata import export_spec, with_merge_types
from qlora_jax.io.gguf.header import parse_header
from qlora_jax.io.gguf.llama_quantizer import quantize_file
from qlora_jax.io.gguf.writer import write_gguf
from qlora_jax.io.hf.merging import mergeables
from qlora_jax.io.hf.model_writer import dense_tensors
from qlora_jax.io.pretrained import open_pretrained
from qlora_jax.io.tensor_map import slots_of
from qlora_jax.model_source import map_bytes
from tests.marks import EXHAUSTIVE, SLOW
from tests.parity.test_llama_cpp import _folder
from tests.parity.test_peft import _write_run

WIDE = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=4)  # enough for types that depend on the layer
WIDE |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=64)
NARROW = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
CASES = [
    ("llama", "q4_k_m", WIDE),
    *(pytest.param(("llama", name, WIDE), marks=EXHAUSTIVE) for name in MIXTURES if name != "q4_k_m"),
    pytest.param(("llama", "q4_k_m", NARROW), marks=SLOW),  # rows that are not whole blocks of 256
    *(pytest.param((name, "q4_k_m", WIDE), marks=EXHAUSTIVE) for name in ("qwen2", "phi3")),
    pytest.param(("mixtral", "q4_k_m", WIDE), marks=SLOW),
]


@pytest.fixture(params=CASES, ids=str)
def run(request, tmp_path, quantizer) -> tuple[Path, LoraArgs]:
    """(the folder of a run, its settings)."""
    family, merge_into, sizes = request.param
    model = _folder(tmp_path, family, **sizes)
    opened = open_pretrained(model=str(model))
    lora = with_merge_types(LoraArgs(rank=4, merge_into=merge_into), opened.source, opened.features)
    _write_run(tmp_path / "run", model, lora, quant_type="none")
    return tmp_path / "run", lora


def stored(path: Path) -> Iterator[tuple[str, tuple[str, np.ndarray]]]:
    """Yields (name, (type, bytes)) of each tensor of a file."""
    for info in parse_header(path).tensors:
        yield info.name, (info.type.name, np.asarray(map_bytes(path, info.offset, info.nbytes)))


def test_the_file_is_that_of_llama_cpps_quantizer(run, tmp_path, capsys):
    """Its bytes are those that llama.cpp makes of the merged model in f32: tables, norms, and weights with adapters."""
    folder, lora = run
    main(["--run", str(folder), "--output", str(tmp_path / "out"), "--format", "gguf"])
    assert "weights are those that training computed with" in capsys.readouterr().out
    path = tmp_path / f"out/model-{lora.merge_into}.gguf"

    model = next(tmp_path.glob("*-model"))
    plain, base = _write_run(tmp_path / "plain", model, LoraArgs(rank=4), quant_type="none")
    slots, spec = slots_of(base), export_spec(open_pretrained(model=str(model))).spec
    tensors = dense_tensors(slots, np.dtype(np.float32), mergeables(plain), {})
    write_gguf(tmp_path / "f32.gguf", spec, [n for s in slots for n in s.names], map(np.asarray, tensors), "float32")
    quantize_file(tmp_path / "f32.gguf", tmp_path / "theirs.gguf", str(lora.merge_into), lambda *_: None)
    ours, theirs = (dict(stored(each)) for each in (path, tmp_path / "theirs.gguf"))
    assert {name: kind for name, (kind, _) in ours.items()} == {name: kind for name, (kind, _) in theirs.items()}
    assert not {name: n for name in ours if (n := int((ours[name][1] != theirs[name][1]).sum()))}
    found = parse_header(path).metadata["general.file_type"]
    assert found == parse_header(tmp_path / "theirs.gguf").metadata["general.file_type"]
