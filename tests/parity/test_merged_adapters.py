"""Merges of adapters equal peft's `add_weighted_adapter`, where it works on changes of weights and not on factors."""

from pathlib import Path

import numpy as np
import pytest

import qlora_jax as q
from qlora_jax.io.export.adapter_arithmetic import drop, elected_mean, trim, weighted_sum
from qlora_jax.models.tensor_names import layer_name
from tests.e2e.project import write_model
from tests.io.random_adapters import Changes, changes_in, weighted, write_merge, write_random_adapter

SCRIPT = Path(__file__).parent.parent / "oracle/peft_merge_adapters.py"
WEIGHTS = [0.7, 1.3]
ADAPTERS = {
    "first": q.LoRA(rank=4),
    "second": q.LoRA(rank=4, alpha=12.0, target_modules=["q_proj", "k_proj", "down_proj"]),
}
# ours -> peft's, which calls the sum of changes `cat` or `svd`
CASES = {
    "cat": (dict(), dict(combination_type="cat")),
    "svd": (dict(rank=3), dict(combination_type="svd", svd_rank=3)),
    "ties": (dict(method="ties", density=0.4, rank=32), dict(combination_type="ties_svd", density=0.4, svd_rank=32)),
    "ties of a rank": (
        dict(method="ties", density=0.4, rank=5),
        dict(combination_type="ties_svd", density=0.4, svd_rank=5),
    ),
    "everything": (
        dict(method="dare_ties", density=1.0, rank=32),
        dict(combination_type="dare_ties_svd", density=1.0, svd_rank=32),
    ),
}


@pytest.mark.slow
def test_changes_and_logits_are_those_of_peft(tmp_path: Path, oracle) -> None:
    base = write_model(tmp_path / "model")
    folders = [write_random_adapter(tmp_path / name, base, args, len(name)) for name, args in ADAPTERS.items()]
    merged = {case: tmp_path / "merged" / case for case in CASES}
    for case, (ours, _) in CASES.items():
        write_merge(merged[case], folders, WEIGHTS, **ours)
    rng = np.random.default_rng(0)
    tokens, changes = rng.integers(0, 250, (2, 20)), rng.normal(size=(3, 24, 16)).astype("f4")
    weights, density = [0.5, 1.0, -2.0], 0.35
    masks = np.random.default_rng(7).random(changes.shape, np.float32) < density
    common = dict(adapters=[*ADAPTERS], weights=WEIGHTS)
    cases = {case: common | theirs for case, (_, theirs) in CASES.items()}
    cases["factors"] = common | dict(combination_type="linear")
    found = oracle(
        SCRIPT,
        base=str(base),
        adapters={folder.name: str(folder) for folder in folders},
        cases=cases,
        merged={case: str(folder) for case, folder in merged.items()},
        tokens=tokens,
        changes=changes,
        masks=masks.astype("f4"),
        elements={name: [name, weights, density] for name in ("ties", "dare_linear", "dare_ties")},
    )
    for case in CASES:
        compare(changes_in(merged[case], base), found, case)
        np.testing.assert_allclose(found[f"merged/{case}"], found[f"{case}/logits"], rtol=0, atol=1e-4, err_msg=case)
    dropped = drop(changes, density, np.random.default_rng(7))
    expected = {
        "ties": elected_mean(trim(changes, density, rng), np.asarray(weights, "f4")),
        "dare_linear": weighted_sum(dropped, np.asarray(weights, "f4")),
        "dare_ties": elected_mean(dropped, np.asarray(weights, "f4")),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(values, found[f"elements/{name}"], rtol=0, atol=1e-5, err_msg=name)

    # peft's `linear` adds factors, so that its change is not the sum of changes.
    whole = weighted([changes_in(folder, base) for folder in folders], WEIGHTS)
    name = "model.layers.self_attn.q_proj"
    factors = found[f"factors/{layer_name(name, 0)}"].T
    assert np.linalg.norm(factors - whole[name][0]) > 0.3 * np.linalg.norm(whole[name][0])


def compare(ours: Changes, theirs: dict[str, np.ndarray], case: str) -> None:
    modules = 0
    for name, change in ours.items():
        for layer, change_KN in enumerate(change):
            expected_NK = theirs[f"{case}/{layer_name(name, layer)}"]
            np.testing.assert_allclose(change_KN.T, expected_NK, rtol=0, atol=1e-5, err_msg=f"{case} {name}")
            modules += 1
    assert modules == sum(key.startswith(f"{case}/model.") for key in theirs)
