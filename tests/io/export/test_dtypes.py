"""The dtype of the base next to an adapter: its weights are those of training, rounded once."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from qlora_jax.api.export import write_export
from qlora_jax.config.exports import EXPORTS, MIXTURES, ExportOptions, dtype_problems
from qlora_jax.config.methods import MERGED_FOLDERS
from qlora_jax.export import main
from qlora_jax.io.gguf.writer import TYPES
from qlora_jax.io.hf.quantized_folder import DTYPES
from qlora_jax.io.open_model import open_model
from qlora_jax.io.pretrained import open_finetuned
from qlora_jax.io.rounding import rounded
from tests.inference.small_run import write_run


def test_every_dtype_can_be_written() -> None:
    assert set(EXPORTS["hf"].dtypes) - {*MERGED_FOLDERS} == set(EXPORTS["peft"].dtypes) == set(DTYPES)
    assert set(EXPORTS["gguf-lora"].dtypes) == set(TYPES)
    assert set(EXPORTS["gguf"].dtypes) == {*TYPES, *MIXTURES}


def test_other_dtypes_are_reported_together() -> None:
    assert dtype_problems("hf", "q8_0", "float16") == [
        "dtype: found q8_0 with --format hf, expected bfloat16, float16, float32, nf4, nvfp4, int4, mxfp4",
        "base_dtype: found float16 with --format hf, expected none, since a merged model has no base",
    ]
    assert dtype_problems("peft", "float16", "q4_0") == [
        "dtype: found float16 with --format peft, expected none, since an adapter keeps its dtype",
        "base_dtype: found q4_0 with --format peft, expected bfloat16, float16, float32",
    ]
    assert dtype_problems("gguf-lora", None, "q4_0") == []


def test_the_base_of_a_peft_adapter_is_rounded_once(tmp_path: Path) -> None:
    opened = open_finetuned(write_run(tmp_path))
    results = {
        dtype: write_export(opened, tmp_path / str(dtype), "peft", ExportOptions(with_base=True, base_dtype=dtype))
        for dtype in (None, "float16", "bfloat16")
    }
    exact = open_model(tmp_path / "None/base").tensors
    for dtype, result in results.items():
        base = tmp_path / str(dtype) / "base"
        expected = np.dtype({"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}.get(str(dtype), np.float32))
        for name, entry in open_model(base).tensors.items():
            np.testing.assert_array_equal(entry.read(), exact[name].read().astype(expected))
        assert json.loads((base / "config.json").read_text())["torch_dtype"] == expected.name
        assert ("the base is rounded from float32" in str(result)) == (dtype is not None)


def test_a_dtype_of_the_base_requires_a_base(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    with pytest.raises(ValueError, match="base_dtype: requires with_base"):
        main(["--run", str(run), "--base_dtype", "float16"])
    assert not (run / "peft").exists()


def test_values_beyond_float16_are_an_error() -> None:
    values = np.array([1.0, -70_000.0], np.float32)
    with pytest.raises(ValueError, match=r"a\.weight: beyond the range of float16 \(found 70,000, .* at most 65,504\)"):
        rounded("a.weight", values, np.dtype(np.float16))
    for sound in ([-65_504.0, 65_504.0, 0.0, -0.0], [-1.0], [1.0], []):
        np.testing.assert_array_equal(rounded("a.weight", np.float32(sound), np.dtype(np.float16)), sound)
    for large in (65_520.0, -65_520.0):  # the next value after 65,504, to which it rounds, is infinite
        with pytest.raises(ValueError, match="beyond the range"):
            rounded("a.weight", np.float32([1.0, large, -1.0]), np.dtype(np.float16))
    assert rounded("a.weight", values, np.dtype(ml_dtypes.bfloat16)).dtype == ml_dtypes.bfloat16
    assert np.isinf(rounded("a.weight", np.float32([np.inf]), np.dtype(np.float16))).all()  # as the model has it
