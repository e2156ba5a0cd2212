"""A base with some layers in 16 bits, as runs, commands and exports load it."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from qlora_jax import evaluate
from qlora_jax.api.export import save_quantized
from qlora_jax.io.export.merged import export_merged
from qlora_jax.io.open_model import open_model
from qlora_jax.io.pretrained import load_base, load_checked, open_base, open_finetuned, weight_settings
from qlora_jax.nn.frozen_weight import MixedStack
from tests.inference.small_run import write_run

pytestmark = pytest.mark.slow
KEEP = ["layers.1.mlp.down_proj", "v_proj"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    write_run(folder, keep_16bit=KEEP)
    return folder


def test_a_run_is_loaded_on_the_base_that_it_was_trained_on(folder, tmp_path):
    opened = open_finetuned(folder / "run")
    base = load_base(opened, opened.args)  # compares the fingerprint
    down = base.model.layers.mlp.down_proj.weight.get_value()
    assert isinstance(down, MixedStack) and down.layers[-1] == (1,)
    values = base.model.layers.self_attn.v_proj.weight.get_value()
    tensors = open_model(folder / "model").tensors
    assert isinstance(values, jax.Array)
    np.testing.assert_array_equal(values[1], tensors["model.layers.1.self_attn.v_proj.weight"].read())
    # Other names for the same layers make the same base; fewer layers make another, which is not compared.
    same = weight_settings(opened, "auto", "auto", ["self_attn.v_proj", "model.layers.1.mlp.down_proj"])
    assert load_checked(opened, same).fingerprint == opened.run.fingerprint
    fewer = weight_settings(opened, "auto", "auto", ["v_proj"])
    assert load_checked(opened, fewer).fingerprint != opened.run.fingerprint
    damaged = dataclasses.replace(opened.run, fingerprint="0" * 64 + "-strips")
    with pytest.raises(ValueError, match="is not the base that"):
        load_checked(dataclasses.replace(opened, run=damaged), same)
    # The exporter compares the merged model's logits with those of the run.
    assert export_merged(opened, tmp_path / "merged", "hf", dtype="float32").path.is_dir()


def test_evaluate_keeps_layers_of_a_base(folder, tmp_path):
    (tmp_path / "text").write_text("sun moon " * 20)
    words = ["--model", str(folder / "model"), "--text", str(tmp_path / "text"), "--window", "32"]

    def losses(*more: str) -> list[float]:
        evaluate.main([*words, *more, "--json", str(tmp_path / "scores.json")])
        columns = json.loads((tmp_path / "scores.json").read_text())["tasks"]["text"]["columns"]
        return [columns[name]["loss per token"]["value"] for name in ("unquantized", "quantized")]

    dense, kept = losses("--keep_16bit", ".*_proj")
    assert kept == dense
    _, quantized = losses()
    assert quantized != dense
    with pytest.raises(ValueError, match=r"model\.keep_16bit: 'up_prj' matches none"):
        losses("--keep_16bit", "[up_prj]")


def test_layers_that_the_files_store_in_4_bits_cannot_be_kept(folder, tmp_path):
    save_quantized(str(folder / "model"), tmp_path / "nf4", dtype="float32", keep_16bit=["v_proj"])
    args = dataclasses.replace(open_finetuned(folder / "run").args, path=str(tmp_path / "nf4"))
    opened = open_base(args)
    with pytest.raises(ValueError, match=r"stores mlp.down_proj of layers 1 in 4 bits, so their 16-bit weights"):
        load_base(opened, args)
    allowed = dataclasses.replace(args, keep_16bit=["v_proj"])
    assert load_base(opened, allowed).model.layers.self_attn.v_proj.weight.get_value().ndim == 3
