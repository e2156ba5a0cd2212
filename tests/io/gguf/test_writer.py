"""A GGUF file that copies another one's metadata differs from it only in its weights, in every architecture."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader
from gguf.quants import dequantize, quantize

from qlora_jax.io.gguf.header import parse_header
from qlora_jax.io.gguf.writer import spec_from_file, write_gguf
from qlora_jax.io.open_model import open_model
from qlora_jax.models.tensor_names import EXPERT
from tests.io.gguf_families import FAMILIES, ONE_MORE, random_tensors, write_family


def _written(tmp_path: Path, name: str, dtype: str):
    """(the base's file, the one written like it, the values that were given)."""
    architecture, config = FAMILIES[name]
    base = write_family(tmp_path / "base.gguf", architecture, config, random_tensors(config))
    drawn = random_tensors(config, seed=1)
    order = sorted(drawn, key=lambda name: EXPERT.sub(".experts.", name), reverse=True)  # another one than the base's
    given = {name: drawn[name] for name in order}
    path = tmp_path / "new.gguf"
    spec = spec_from_file(base, open_model(base).config, None)
    write_gguf(path, spec, list(given), iter(given.values()), dtype)
    return base, path, given


@pytest.mark.parametrize("name", FAMILIES)
def test_all_but_the_weights_is_the_bases(tmp_path: Path, name: str) -> None:
    base, path, given = _written(tmp_path, name, "float32")
    old, new = open_model(base), open_model(path)
    tokenizer = {**old.tokenizer, "template_name": f"{path}: tokenizer.chat_template"}
    assert (new.config, new.tokenizer) == (old.config, tokenizer)
    assert new.tensors.keys() == given.keys()
    rounding = 2.5e-7 if FAMILIES[name][0] in ONE_MORE else 0  # 1 is added and taken away
    for tensor, values in given.items():
        np.testing.assert_allclose(new.tensors[tensor].read(), values, rtol=0, atol=rounding, err_msg=tensor)
    before, after = (parse_header(each).metadata for each in (base, path))
    assert {key: after[key] for key in before} == before
    assert after.keys() - before.keys() == {"general.file_type"}
    assert GGUFReader(path).fields["GGUF.version"].parts  # the gguf package takes it too


@pytest.mark.parametrize(
    ("dtype", "kind", "file_type"),
    [("float16", Kind.F16, 1), ("bfloat16", Kind.BF16, 32), ("q8_0", Kind.Q8_0, 7), ("q4_0", Kind.Q4_0, 2)],
)
def test_matrices_are_rounded_as_the_gguf_package_rounds(
    tmp_path: Path, dtype: str, kind: Kind, file_type: int
) -> None:
    _, path, given = _written(tmp_path, "qwen2", dtype)
    header = parse_header(path)
    assert header.metadata["general.file_type"] == file_type
    assert {info.type for info in header.tensors} == {kind, Kind.F32}
    for name, entry in open_model(path).tensors.items():
        values = given[name]
        if values.ndim == 2:
            stored = quantize(values, kind)
            values = stored.view(ml_dtypes.bfloat16) if kind == Kind.BF16 else dequantize(stored, kind)
        np.testing.assert_array_equal(np.asarray(entry.read(), np.float32).reshape(-1), np.float32(values).reshape(-1))


def test_a_runs_own_chat_template_takes_the_place_of_the_bases(tmp_path: Path) -> None:
    architecture, config = FAMILIES["llama"]
    base = write_family(tmp_path / "base.gguf", architecture, config, random_tensors(config))
    spec = spec_from_file(base, open_model(base).config, "{{ messages }}")
    assert [key.value for key in spec.keys if key.name == "tokenizer.chat_template"] == ["{{ messages }}"]
