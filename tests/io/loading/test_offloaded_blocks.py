"""Experts of a GGUF file in host memory, with other types of blocks in other layers."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from qlora_jax.io.loading.loader import Loaded, load_model
from qlora_jax.io.open_model import open_model
from qlora_jax.models.config import STORED, WeightFormat
from qlora_jax.models.families import model_config
from qlora_jax.models.partition import host_paths, partition
from tests.io.gguf_families import FAMILIES, random_tensors, write_family

KINDS = {"gate": (Kind.Q4_0, Kind.Q8_0), "up": (Kind.Q4_0, Kind.Q4_0), "down": (Kind.Q8_0, Kind.Q5_0)}


@pytest.mark.slow
def test_a_file_of_several_types_is_the_same_in_host_memory(tmp_path: Path) -> None:
    path, weights = _mixed_file(tmp_path), WeightFormat(quant_type=STORED, dtype="float32")
    here, away = (_load(path, dataclasses.replace(weights, experts_on_host=each)) for each in (False, True))
    assert here.fingerprint == away.fingerprint
    assert len(host_paths(partition(away.model))) == len(KINDS)
    tokens_BT = jnp.arange(12).reshape(2, 6)
    expected = here.model.hidden(tokens_BT)
    assert np.isfinite(expected).all()
    np.testing.assert_array_equal(away.model.hidden(tokens_BT), expected, strict=True)


@pytest.mark.slow
def test_a_projection_partly_in_16_bits_is_refused(tmp_path: Path) -> None:
    weights = WeightFormat(quant_type=STORED, dtype="float32", experts_on_host=True)
    with pytest.raises(
        ValueError, match=r"offload needs codes in all layers of a .*mlp.experts.gate_proj: Q8_0, dense"
    ):
        _load(_mixed_file(tmp_path, gate=(Kind.F16, Kind.Q8_0)), weights)


def _mixed_file(folder: Path, **changes: tuple[Kind, Kind]) -> Path:
    architecture, config = FAMILIES["qwen3moe"]
    kinds = {
        f"blk.{layer}.ffn_{name}_exps.weight": kind
        for name, of_layers in (KINDS | changes).items()
        for layer, kind in enumerate(of_layers)
    }
    return write_family(folder / "mixed.gguf", architecture, config, random_tensors(config), kinds=kinds)


def _load(path: Path, weights: WeightFormat) -> Loaded:
    source = open_model(path)
    return load_model(source, model_config(source.config), weights)
