"""Tensors of mixtures in files: names, fused experts, layers that are left out."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qlora_jax.io.hf.fused_experts import name_in_class, name_in_files
from qlora_jax.io.open_model import open_model
from qlora_jax.models.catalog import PUBLISHED
from tests.io.tiny_models import write_folder

LAYERS, EXPERTS, WIDTH, INNER = 2, 3, 8, 4
CONFIG = PUBLISHED["mixtral-8x7b"] | {"num_local_experts": EXPERTS}
RNG = np.random.default_rng(0)
GATES, UPS = (RNG.normal(size=(EXPERTS, INNER, WIDTH)).astype(np.float32) for _ in range(2))
DOWNS = RNG.normal(size=(EXPERTS, WIDTH, INNER)).astype(np.float32)
PARTS = {"gate_proj": GATES, "up_proj": UPS, "down_proj": DOWNS}
MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
PREFIX = "model.layers.1.mlp"
FUSED = {
    f"{PREFIX}.experts.gate_up_proj": np.concatenate([GATES, UPS], axis=1),
    f"{PREFIX}.experts.down_proj": DOWNS,
}
BY_EXPERT = {
    f"{PREFIX}.experts.{expert}.{part}.weight": each
    for part, stack in PARTS.items()
    for expert, each in enumerate(stack)
}
OLD_MIXTRAL = {
    f"model.layers.1.block_sparse_moe.experts.{expert}.{MIXTRAL[part]}.weight": each
    for part, stack in PARTS.items()
    for expert, each in enumerate(stack)
} | {"model.layers.1.block_sparse_moe.gate.weight": GATES[0]}


@pytest.mark.parametrize("files", [FUSED, BY_EXPERT, OLD_MIXTRAL], ids=["fused", "by expert", "Mixtral's names"])
def test_every_form_gives_matrices_of_single_experts(tmp_path: Path, files: dict[str, np.ndarray]) -> None:
    source = open_model(write_folder(tmp_path, CONFIG, files))
    router = {name for name in source.tensors if "mlp.gate." in name}
    assert source.tensors.keys() - router == BY_EXPERT.keys()
    for name, expected in BY_EXPERT.items():
        entry = source.tensors[name]
        np.testing.assert_array_equal(entry.read(), expected, strict=True)
        np.testing.assert_array_equal(entry.read_rows(1, 3), expected[1:3], strict=True)
        assert (entry.name, entry.nbytes) == (name, expected.nbytes)
        (stored,) = entry.ranges_of(1, 3)
        with stored.path.open("rb") as file:
            file.seek(stored.offset)
            assert file.read(stored.nbytes) == expected[1:3].tobytes()


@pytest.mark.parametrize("transposed", [True, False], ids=["as published", "as transformers 5 saves"])
def test_fused_experts_of_qwen3_vl_moe(tmp_path: Path, transposed: bool) -> None:
    """Published files have them transposed, gate left of up."""
    config: dict[str, Any] = {**PUBLISHED["qwen3-vl-30b-a3b"]}
    changed = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "hidden_size": WIDTH}
    config["text_config"] = config["text_config"] | changed
    matrices = {"gate_proj": GATES[:, :3], "up_proj": UPS[:, :3], "down_proj": DOWNS[..., :3]}  # no square ones
    stacks = {part: stack.swapaxes(1, 2) if transposed else stack for part, stack in matrices.items()}
    pair = np.concatenate([stacks["gate_proj"], stacks["up_proj"]], axis=2 if transposed else 1)
    experts = "model.language_model.layers.1.mlp.experts"
    files = {f"{experts}.gate_up_proj": pair, f"{experts}.down_proj": stacks["down_proj"]}
    files = {name: np.ascontiguousarray(values) for name, values in files.items()}
    source = open_model(write_folder(tmp_path, config, files))
    assert len(source.tensors) == len(BY_EXPERT)
    for part, stack in matrices.items():
        for expert, expected in enumerate(stack):
            entry = source.tensors[f"{experts}.{expert}.{part}.weight"]
            np.testing.assert_array_equal(entry.read(), expected, strict=True)
            np.testing.assert_array_equal(entry.read_rows(1, 3), expected[1:3], strict=True)
            assert entry.nbytes == expected.nbytes


def test_names_go_both_ways() -> None:
    for config in ({"model_type": "mixtral"}, {"model_type": "qwen3_moe"}):
        for name in (*BY_EXPERT, "model.layers.1.mlp.gate.weight", "model.norm.weight"):
            assert name_in_class(config, name_in_files(config, name)) == name
    assert {name_in_files({"model_type": "mixtral"}, name) for name in BY_EXPERT} < OLD_MIXTRAL.keys()


def test_layers_for_further_tokens_are_left_out(tmp_path: Path) -> None:
    config = PUBLISHED["glm-4.5"] | {"num_hidden_layers": 1, "first_k_dense_replace": 0, "num_nextn_predict_layers": 1}
    config |= {"n_routed_experts": EXPERTS, "num_experts_per_tok": 2}
    # Layer 2 is beyond those that the config announces: the loader reports it.
    kept = {f"model.layers.{layer}.mlp.gate_proj.weight": GATES[0] for layer in (0, 2)}
    source = open_model(write_folder(tmp_path, config, kept | FUSED))
    assert source.tensors.keys() == kept.keys()
    assert source.config == config | {"num_nextn_predict_layers": 0}
    assert source.not_loaded == "model.layers.1 (2 tensors, 1.12 KiB); predicts further tokens"
    without = {key: value for key, value in config.items() if "nextn" not in key}
    assert open_model(write_folder(tmp_path, without, kept | FUSED)).tensors.keys() == kept.keys() | BY_EXPERT.keys()


def test_a_matrix_that_is_stored_twice_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, CONFIG, FUSED | BY_EXPERT)
    with pytest.raises(ValueError, match=rf"9 matrices are stored twice.*such as {PREFIX}.experts.0"):
        open_model(folder)


@pytest.mark.parametrize("odd", [GATES[:, :3], DOWNS[0], GATES[:2], np.zeros((EXPERTS, 0, 8), "f4")])
def test_a_fused_tensor_of_another_shape_stays_whole(tmp_path: Path, odd: np.ndarray) -> None:
    tensors = {f"{PREFIX}.experts.gate_up_proj": np.ascontiguousarray(odd)}
    config = PUBLISHED["qwen3-30b-a3b"] | {"num_experts": EXPERTS, "num_experts_per_tok": 2}
    folder = write_folder(tmp_path, config, tensors)
    assert open_model(folder).tensors.keys() == tensors.keys()


def test_the_number_of_experts_may_be_the_familys_default(tmp_path: Path) -> None:
    tensors = {f"{PREFIX}.experts.down_proj": np.ones((8, 2, 3), "f4")}
    config = {name: value for name, value in CONFIG.items() if name != "num_local_experts"}
    assert len(open_model(write_folder(tmp_path, config, tensors)).tensors) == 8
