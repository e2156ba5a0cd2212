"""Models quantized to NVFP4 while they are loaded, and damaged codes of NVFP4 and FP8."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from pallas_kernels.formats.ggml_tensor import GgmlTensor
from qlora_jax import quantize
from qlora_jax.config import ModelArgs
from qlora_jax.io.loading.loader import Loaded, load_model
from qlora_jax.io.open_model import open_model
from qlora_jax.io.tensor_map import slots_of
from qlora_jax.models.config import STORED, WeightFormat
from qlora_jax.models.families import model_config
from qlora_jax.models.precision import weight_format
from qlora_jax.nn.frozen_weight import dense_weight
from qlora_jax.quant.nvfp4 import nvfp4_blocks_of
from qlora_jax.sharding import make_mesh
from tests.ggml_codes import by_formula
from tests.io.float_folders import FLOAT_FORMS, Fp8, Nvfp4
from tests.io.integer_folders import write_integer_folder
from tests.io.tiny_models import random_weights, tiny_config, write_folder
from tests.io.tiny_tokenizers import byte_level

CONFIG = tiny_config()
WEIGHTS = random_weights(CONFIG)
FORMAT = WeightFormat(quant_type="nvfp4", dtype="float32")


def _load(path: Path, weights: WeightFormat = FORMAT, **kwargs: Any) -> Loaded:
    source = open_model(path)
    return load_model(source, model_config(source.config), weights, **kwargs)


def test_every_layer_is_rounded_alone_here_and_on_a_mesh(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, CONFIG, WEIGHTS)
    kept = dataclasses.replace(FORMAT, dense=(("mlp.up_proj", (1,)),))
    loaded, on_mesh = _load(folder, kept), _load(folder, kept, mesh=make_mesh(2, 4))
    assert on_mesh.fingerprint == loaded.fingerprint != _load(folder).fingerprint
    found = {}
    for slot, other in zip(slots_of(loaded.model), slots_of(on_mesh.model), strict=True):
        jax.tree.map(np.testing.assert_array_equal, slot.leaf, other.leaf)
        for index, name in enumerate(slot.names):
            if isinstance(part := slot.part(index), GgmlTensor):
                assert part.ggml_type == "NVFP4_64_INV"
                row = index if len(part.codes) == 2 else 0
                values = by_formula(nvfp4_blocks_of(WEIGHTS[name], part.ggml_type), part.ggml_type)
                np.testing.assert_array_equal(dense_weight(part.layer(row), "float32"), values, err_msg=name)
                found[name] = part
    assert found.keys() == {name for name in WEIGHTS if "_proj" in name} - {"model.layers.1.mlp.up_proj.weight"}


def test_codes_of_a_file_stay_as_they_are(tmp_path: Path) -> None:
    dense = write_integer_folder(tmp_path, FLOAT_FORMS["compressed, nvfp4"], CONFIG, WEIGHTS)
    for weights in (FORMAT, dataclasses.replace(FORMAT, quant_type=STORED)):
        stack = _load(tmp_path, weights).model.model.layers.mlp.down_proj.weight.get_value()
        for layer in range(2):
            expected = dense[f"model.layers.{layer}.mlp.down_proj.weight"]
            np.testing.assert_array_equal(dense_weight(stack.layer(layer), "float32"), expected)


def test_models_without_whole_blocks_are_refused() -> None:
    config = model_config(tiny_config(intermediate_size=136))
    with pytest.raises(
        ValueError, match=r"found 'nvfp4', but linear layers have 136 inputs \(expected multiples of 32"
    ):
        weight_format(ModelArgs(path="model", quant_type="nvfp4"), config)


@pytest.mark.slow
def test_weights_of_bitsandbytes_are_not_quantized_twice(tmp_path: Path) -> None:
    dense = write_folder(tmp_path / "dense", CONFIG, WEIGHTS, 1, **{"tokenizer.json": byte_level()})
    quantize.main(["--model", str(dense), "--output", str(tmp_path / "nf4")])
    with pytest.raises(ValueError, match=r"already quantized, .* \(found quant_type=nf4, expected NVFP4_64_INV\)"):
        _load(tmp_path / "nf4")


@pytest.mark.parametrize("form", ["compressed, nvfp4", "modelopt, nvfp4", "deepseek", "compressed, fp8 of rows"])
def test_codes_and_scales_that_are_not_finite_are_refused(form: str, tmp_path: Path) -> None:
    def damaged(weight: Nvfp4 | Fp8) -> Any:
        bytes_ = (weight.scales if isinstance(weight, Nvfp4) else weight.codes).view(np.uint8).copy()
        bytes_[-1, -1] = 0xFF
        values = bytes_.view((weight.scales if isinstance(weight, Nvfp4) else weight.codes).dtype)
        return weight._replace(**{"scales" if isinstance(weight, Nvfp4) else "codes": values})

    chosen = FLOAT_FORMS[form]
    write_integer_folder(tmp_path, chosen._replace(pack=lambda weight: chosen.pack(damaged(weight))), CONFIG, WEIGHTS)
    with pytest.raises(ValueError, match=r"down_proj.weight are not finite \((NVFP4|FP8)_"):
        _load(tmp_path, dataclasses.replace(FORMAT, quant_type=STORED))
    with pytest.raises(ValueError, match=r"elements of model\.layers\.0\.mlp\.down_proj\.weight are not finite"):
        _load(tmp_path, WeightFormat(quant_type="nf4", dtype="float32"))
