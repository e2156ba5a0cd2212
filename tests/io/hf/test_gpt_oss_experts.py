"""Tests the entries of gpt-oss' experts: matrices and codes of each expert, their bytes in the file, and errors."""

from pathlib import Path

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize
from safetensors.numpy import save_file

from qlora_jax.io.hf.gpt_oss_experts import as_ggml, expert_by_expert
from qlora_jax.io.hf.reader import read_header
from qlora_jax.model_source import TensorEntry

EXPERTS, K, F = 3, 64, 32
STEM = "model.layers.1.mlp.experts"
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def _entries(folder: Path, **tensors: np.ndarray) -> dict[str, TensorEntry]:
    save_file({f"{STEM}.{name}": values for name, values in tensors.items()}, folder / "t.safetensors")
    return {entry.name: entry for entry in read_header(folder / "t.safetensors")}


def _random(*shape: int) -> np.ndarray:
    return np.random.default_rng([*shape]).normal(0, 1, shape).astype(np.float32)


def _codes(*shape: int) -> tuple[np.ndarray, np.ndarray]:
    """Random (blocks [..., G, 16], scales [..., G])."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (*shape, 16), np.uint8), rng.integers(100, 140, shape, np.uint8)


def test_gate_and_up_take_turns(tmp_path):
    gate_up, bias = _random(EXPERTS, K, 2 * F), _random(EXPERTS, 2 * F)
    down = _random(EXPERTS, F, K)
    entries = _entries(tmp_path, gate_up_proj=gate_up, gate_up_proj_bias=bias, down_proj=down)
    tensors = expert_by_expert(tmp_path, entries, EXPERTS)
    assert len(tensors) == EXPERTS * 5
    for expert in range(EXPERTS):
        for start, part in enumerate(("gate_proj", "up_proj")):
            weight, its_bias = (tensors[f"{STEM}.{expert}.{part}.{leaf}"] for leaf in ("weight", "bias"))
            assert (weight.shape, its_bias.shape) == ((F, K), (F,))
            np.testing.assert_array_equal(weight.read(), gate_up[expert, :, start::2].T)
            np.testing.assert_array_equal(weight.read_rows(3, 7), gate_up[expert, :, start::2].T[3:7])
            np.testing.assert_array_equal(its_bias.read_rows(2, 9), bias[expert, start::2][2:9])
        np.testing.assert_array_equal(tensors[f"{STEM}.{expert}.down_proj.weight"].read(), down[expert].T)


def test_codes_of_each_expert(tmp_path):
    blocks, scales = _codes(EXPERTS, 2 * F, K // 32)
    entries = _entries(tmp_path, gate_up_proj_blocks=blocks, gate_up_proj_scales=scales)
    tensors = expert_by_expert(tmp_path, entries, EXPERTS)
    values = E2M1[np.stack([blocks & 15, blocks >> 4], -1)].reshape(EXPERTS, 2 * F, K // 32, 32)
    dense = np.ldexp(values, scales.astype(np.int32)[..., None] - 127).reshape(EXPERTS, 2 * F, K)
    for expert in range(EXPERTS):
        for start, part in enumerate(("gate_proj", "up_proj")):
            entry = tensors[f"{STEM}.{expert}.{part}.weight"]
            assert (entry.shape, entry.file_type, entry.nbytes) == ((F, K), "MXFP4", F * K // 32 * 17)
            np.testing.assert_array_equal(entry.read_rows(3, 7), dense[expert, start::2][3:7])
            assert entry.read_stored is not None
            stored = entry.read_stored(3, 7)
            assert (stored.ggml_type, stored.shape, stored.codes.shape) == ("MXFP4", (4, K), (4, K // 32 * 17))


def test_the_bytes_of_some_rows_are_those_of_the_file(tmp_path):
    blocks, scales = _codes(EXPERTS, 2 * F, K // 32)
    entries = _entries(tmp_path, gate_up_proj_blocks=blocks, gate_up_proj_scales=scales)
    tensors = expert_by_expert(tmp_path, entries, EXPERTS)
    ranges = tensors[f"{STEM}.2.up_proj.weight"].ranges_of(3, 7)
    read = []
    for path, offset, nbytes in ranges:
        read.append(path.read_bytes()[offset : offset + nbytes])
    assert read == [each[2, 6:14].tobytes() for each in (blocks, scales)]


def test_ggml_quantizes_the_values_to_the_same_codes():
    blocks, scales = _codes(4, 2)
    blocks[..., 0] = 0x77  # the largest value, so that the scale is the one that the quantizer chooses
    codes = as_ggml(blocks, scales)
    values = np.ldexp(
        E2M1[np.stack([blocks & 15, blocks >> 4], -1)].reshape(4, 2, 32), scales[..., None].astype(int) - 127
    )
    again = quantize(values.reshape(4, 64).astype(np.float32), GGMLQuantizationType.MXFP4)
    minus_zero = (codes & 15 == 8) | (codes >> 4 == 8)  # which the quantizer writes as zero
    np.testing.assert_array_equal(again[~minus_zero], codes[~minus_zero])
    assert minus_zero.mean() < 0.2


BLOCKS, SCALES = _codes(EXPERTS, 2 * F, K // 32)


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        (
            {"gate_up_proj": _random(EXPERTS, K, 3)},
            r"gate_up_proj: found 3 outputs per expert, expected an even number",
        ),
        ({"down_proj": _random(EXPERTS, K)}, r"down_proj: found shape \[3, 64\], expected 3 axes"),
        ({"down_proj": _random(4, F, K)}, r"down_proj: found shape \[4, 32, 64\], .* the first of 3 experts"),
        ({"down_proj": _random(EXPERTS, 0, K)}, r"down_proj: found shape \[3, 0, 64\], .* none of them 0"),
        ({"down_proj_bias": SCALES[..., 0].copy()}, r"down_proj_bias: found bytes \(U8\), expected floating point"),
        ({"down_proj_blocks": BLOCKS}, r"down_proj_blocks: found only U8, expected bytes .* and .*down_proj_scales"),
        ({"down_proj_scales": SCALES}, r"down_proj_scales: found only U8"),
        (
            {"down_proj_blocks": BLOCKS, "down_proj_scales": SCALES[:, 1:]},
            r"down_proj_blocks: found shape \[3, 64, 2, 16\], expected \[3, 63, 2, 16\]",
        ),
        (
            {"down_proj_blocks": BLOCKS, "down_proj_scales": SCALES, "down_proj": _random(EXPERTS, K, F)},
            r"down_proj_blocks: found .*experts.down_proj too",
        ),
    ],
)
def test_other_forms_are_refused_by_name(tmp_path, tensors, problem):
    with pytest.raises(ValueError, match=problem):
        expert_by_expert(tmp_path, _entries(tmp_path, **tensors), EXPERTS)
