"""A folder in NVFP4 that is written here: transformers and our reader have the weights of training; and a whole run."""

import io
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from rich.console import Console

from qlora_jax import export, quantize
from qlora_jax.config import Config
from qlora_jax.io.loading.loader import load_model
from qlora_jax.io.open_model import open_model
from qlora_jax.io.tensor_map import slots_of
from qlora_jax.models.config import STORED, WeightFormat
from qlora_jax.models.families import model_config
from qlora_jax.nn.frozen_weight import dense_weight
from qlora_jax.quant.nvfp4 import nvfp4_blocks_of
from qlora_jax.training.run import train
from tests.e2e.project import project, stop_after
from tests.ggml_codes import by_formula
from tests.io.tiny_models import random_weights, tiny_config, write_folder
from tests.io.tiny_tokenizers import byte_level

ORACLE = Path(__file__).parent.parent / "oracle/compressed_tensors_weights.py"
CONFIG = tiny_config()


@pytest.mark.slow
def test_a_written_folder_has_the_weights_of_training(tmp_path: Path, oracle) -> None:
    weights = random_weights(CONFIG)
    dense = write_folder(tmp_path / "dense", CONFIG, weights, 1, **{"tokenizer.json": byte_level()})
    arguments = ["--quant_type", "nvfp4", "--dtype", "float32", "--keep_16bit", "[layers.1.mlp.up_proj]"]
    quantize.main(["--model", str(dense), "--output", str(tmp_path / "nvfp4"), *arguments])
    theirs = oracle(ORACLE, cases={"nvfp4": str(tmp_path / "nvfp4")})
    ours = open_model(tmp_path / "nvfp4").tensors
    assert ours.keys() == weights.keys()
    for name, values in weights.items():
        kept = "_proj" not in name or name.endswith("layers.1.mlp.up_proj.weight")
        expected = values if kept else by_formula(nvfp4_blocks_of(values, "NVFP4_64_INV"), "NVFP4_64_INV")
        np.testing.assert_array_equal(ours[name].read(), expected, err_msg=name)
        rounded = values if kept else expected.astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(theirs[f"nvfp4/{name}"], rounded, err_msg=name)
    source, form = open_model(dense), WeightFormat(quant_type="nvfp4", dtype="float32", dense=(("mlp.up_proj", (1,)),))
    made = load_model(source, model_config(source.config), form)
    source = open_model(tmp_path / "nvfp4")
    read = load_model(source, model_config(source.config), WeightFormat(quant_type=STORED, dtype="float32"))
    for one, other in zip(slots_of(made.model), slots_of(read.model), strict=True):
        for index in range(len(one.names)):
            np.testing.assert_array_equal(*(dense_weight(each.part(index), "float32") for each in (one, other)))
    with pytest.raises(ValueError, match="already in NVFP4, and weights are never quantized twice"):
        quantize.main(["--model", str(tmp_path / "nvfp4"), "--output", str(tmp_path / "x"), "--quant_type", "nvfp4"])


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_run_is_resumed_and_merged_into_the_model_it_was_quantized_from(tmp_path: Path) -> None:
    config: Config = project(
        tmp_path,
        model=dict(quant_type="nvfp4"),
        lora=dict(dropout=0.0),
        train=dict(steps=2, save_every=1, eval_every=0),
        data=dict(eval_fraction=0.0, buckets=1),
    )
    printed, run = io.StringIO(), Path(config.output)
    settings: dict[str, Any] = dict(oversized=False, console=Console(file=printed, width=400))
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, config, 1)
        assert not train(config, run, resume=False, **settings).finished
    assert "nvfp4 in blocks of 16, e4m3 scales; " in printed.getvalue()
    assert train(config, run, resume=True, **settings).finished
    for base in ([], ["--base", config.model.path]):
        output = ["--output", str(tmp_path / f"merged{len(base)}")]
        export.main(["--run", str(run), "--format", "hf", "--dtype", "float32", *base, *output])
    merged = [open_model(tmp_path / f"merged{count}").tensors for count in (0, 2)]
    name = "model.layers.0.mlp.up_proj.weight"
    assert not np.array_equal(merged[0][name].read(), merged[1][name].read())
    assert "quantization_config" not in json.loads((tmp_path / "merged0/config.json").read_text())
