"""Merged adapters have the sums of changes, on the union of modules and layers; problems are listed together."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qlora_jax.config import LoraArgs
from qlora_jax.io.export.merged_adapter import merge_problems
from qlora_jax.io.initial_file import InitialAdapter
from qlora_jax.io.peft.start_adapter import read_start_adapter
from qlora_jax.io.pretrained import OpenedModel, open_finetuned
from qlora_jax.objectives.head_objective import TrainedHead
from tests.e2e.project import write_model
from tests.io.gguf_families import FAMILIES, random_tensors
from tests.io.random_adapters import (
    assert_close,
    changes_in,
    features_of,
    weighted,
    write_merge,
    write_random_adapter,
)
from tests.io.tiny_models import tokenizer_json, write_folder

ADAPTERS = {  # several ranks, scalings, targets and layers
    "a": LoraArgs(rank=4),
    "b": LoraArgs(rank=8, alpha=4.0, target_modules=["q_proj", "down_proj"], alpha_pattern={"q_proj": 12.0}),
    "c": LoraArgs(rank=2, use_rslora=True, target_modules=["q_proj", "up_proj"], layers_to_transform=[1]),
}
WEIGHTS = [0.7, -0.4, 1.1]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("merge") / "model")


@pytest.fixture(scope="module")
def folders(base: Path) -> list[Path]:
    return [
        write_random_adapter(base.parent / name, base, args, seed) for seed, (name, args) in enumerate(ADAPTERS.items())
    ]


def best(changes: np.ndarray, rank: int) -> np.ndarray:
    u, s, vh = np.linalg.svd(changes, full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ vh[..., :rank, :]


def test_a_sum_has_all_changes(base: Path, folders: list[Path], tmp_path: Path):
    merged = write_merge(tmp_path / "sum", folders, WEIGHTS)
    expected = weighted([changes_in(folder, base) for folder in folders], WEIGHTS)
    assert_close(changes_in(tmp_path / "sum", base), expected, 1e-6)
    args = merged.run.lora_args
    assert merged.kept == 1 and (args.rank, args.alpha, args.alpha_pattern) == (14, 14.0, {})
    assert args.rank_pattern[r"mlp\.up_proj"] == 6 and args.rank_pattern[r"mlp\.gate_proj"] == 4


def test_a_smaller_rank_keeps_the_largest_singular_values(base: Path, folders: list[Path], tmp_path: Path):
    """Training starts from the result, with one rank and alpha for all modules."""
    merged = write_merge(tmp_path / "cut", folders[:2], [0.5, 0.5], rank=3)
    whole = weighted([changes_in(folder, base) for folder in folders[:2]], [0.5, 0.5])
    expected = {name: best(change, 3) for name, change in whole.items()}
    assert_close(changes_in(tmp_path / "cut", base), expected, 1e-6)
    kept, all_of_it = (sum(np.sum(np.square(each)) for each in one.values()) for one in (expected, whole))
    assert merged.kept == pytest.approx(np.sqrt(kept / all_of_it), rel=1e-5) and merged.kept < 0.95
    args = LoraArgs(rank=3, alpha=3.0, start=str(tmp_path / "cut"))
    assert read_start_adapter(tmp_path / "cut", features_of(base), args, ()).keys() == expected.keys()


def test_ties_at_full_rank_has_the_elements_that_are_kept(base: Path, folders: list[Path], tmp_path: Path):
    merged = write_merge(tmp_path / "ties", folders, [1.0, 1.0, 1.0], method="ties", density=0.3, rank=128)
    name = "model.layers.self_attn.o_proj"  # only in one adapter, so it is trimmed and not averaged
    change = changes_in(folders[0], base)[name]
    sizes = np.sort(np.abs(change).reshape(2, -1))
    limits = sizes[:, -int(0.3 * sizes.shape[1])].reshape(2, 1, 1)
    expected = np.where(np.abs(change) >= limits, change, 0)
    np.testing.assert_allclose(changes_in(tmp_path / "ties", base)[name], expected, rtol=0, atol=1e-6)
    assert merged.kept == pytest.approx(1, abs=1e-6)


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate"]


@pytest.mark.parametrize("rank", [None, pytest.param(2, marks=pytest.mark.slow)])
def test_adapters_on_experts(tmp_path: Path, rank: int | None):
    """One adapter has a pair of matrices for each expert, the other a pair that all experts of a layer share."""
    config = FAMILIES["mixtral"][1]
    base = write_folder(tmp_path / "model", config, random_tensors(config))
    (base / "tokenizer.json").write_text(tokenizer_json())
    own = write_random_adapter(tmp_path / "own", base, LoraArgs(rank=2, target_parameters=EXPERTS), 0)
    one_module = ["layers.1.mlp.experts.down_proj"]
    other = LoraArgs(rank=3, share_experts=True, target_modules=["o_proj"], target_parameters=one_module)
    shared = write_random_adapter(tmp_path / "shared", base, other, 1)
    write_merge(tmp_path / "both", [own, shared], [1.0, 2.0], rank=rank)
    expected = weighted([changes_in(each, base) for each in (own, shared)], [1.0, 2.0])
    if rank is not None:
        expected = {name: best(change, rank) for name, change in expected.items()}
    assert_close(changes_in(tmp_path / "both", base), expected, 1e-6)


REFUSED = {
    "dora": (
        dict(lora_args=LoraArgs(method="dora")),
        ["lora.method=dora is not only", "a trained norm per weight"],
    ),
    "ia3": (dict(lora_args=LoraArgs(method="ia3")), ["lora.method=ia3", "scaling vectors", "--format hf"]),
    "pissa": (
        dict(lora_args=LoraArgs(init="pissa"), initial=InitialAdapter(factors={}, subtracted={})),
        ["lora.init=pissa moved a part of the base's weights into the adapter. Export it with --format peft"],
    ),
    "merged": (dict(lora_args=LoraArgs(merge_into="q4_0")), ["lora.merge_into=q4_0", "Export it"]),
    "head": (dict(head=TrainedHead(objective="regression", described=False)), ["a sequence head cannot be merged"]),
}


@pytest.mark.parametrize(("changes", "parts"), REFUSED.values(), ids=REFUSED)
def test_adapters_that_are_not_products(folders: list[Path], changes: dict, parts: list[str]):
    good = open_finetuned(folders[0])
    assert merge_problems([good, with_run(good, lora_args=LoraArgs(method="lora_fa"))]) == []
    (problem,) = merge_problems([good, with_run(good, **changes)])
    assert all(part in problem for part in parts)


def with_run(opened: OpenedModel, **changes: Any) -> OpenedModel:
    assert opened.run is not None
    return dataclasses.replace(opened, run=dataclasses.replace(opened.run, **changes))


def test_all_problems_of_all_adapters_are_listed(base: Path, folders: list[Path], tmp_path: Path):
    good = open_finetuned(folders[0])
    table = np.zeros((2, 64), "f4")
    rows = with_run(good, lora={"model.embed_tokens": {"rows": table}}, path=Path("rows"), tables={"lm_head": table})
    moved = with_run(open_finetuned(folders[1], base=str(write_model(tmp_path / "other", seed=1))), path=Path("moved"))
    digests = [with_run(good, fingerprint=f"{letter}-strips", path=Path(letter)) for letter in "xy"]
    assert merge_problems([digests[0], digests[0], good]) == []
    found = "\n".join(merge_problems([digests[0], digests[1], rows, moved]))
    assert "y: its base, as it was quantized, is not that of x (found y-strips, expected x-strips)" in found
    assert "found lm_head, model.embed_tokens" in found
    assert f"found {tmp_path / 'other'}, expected {base}" in found
