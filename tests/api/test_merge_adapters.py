"""A merged adapter computes base + merged changes; checkpoints are averaged; wrong settings are listed."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import qlora_jax as q
from qlora_jax.adapter_merge import main
from qlora_jax.config import ConfigError
from qlora_jax.io.pretrained import open_finetuned
from qlora_jax.models.tensor_names import layer_name
from tests.api.conftest import QUICK, Project
from tests.e2e.project import write_model
from tests.io.random_adapters import Changes, changes_in, weighted, write_random_adapter

IDS = np.random.default_rng(0).integers(0, 250, (2, 24))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


@pytest.fixture
def folders(base: Path) -> list[Path]:
    """Two adapters of other ranks, scalings, targets and layers."""
    some = q.LoRA(rank=2, use_rslora=True, target_modules=["q_proj", "up_proj"], layers_to_transform=[1])
    return [
        write_random_adapter(base.parent / "first", base, q.LoRA(rank=4), 0),
        write_random_adapter(base.parent / "second", base, some, 1),
    ]


def dense_model(base: Path, folder: Path, changes: Changes) -> Path:
    """Writes the base with changes added to its weights."""
    shutil.copytree(base, folder)
    weights = load_file(base / "model.safetensors")
    for name, change in changes.items():
        for layer, change_KN in enumerate(change):
            weights[f"{layer_name(name, layer)}.weight"] += change_KN.T.astype("f4")
    save_file(weights, folder / "model.safetensors")
    return folder


def logits(path: Path) -> np.ndarray:
    model, _ = q.load(str(path), quant_type="none", compute_dtype="float32")
    return np.asarray(q.logits(model, IDS))


def test_a_merge_computes_base_and_changes(base: Path, folders: list[Path], tmp_path: Path):
    result = q.merge_adapters(folders, tmp_path / "merged", weights=[0.7, -1.1])
    changes = weighted([changes_in(folder, base) for folder in folders], [0.7, -1.1])
    dense = logits(dense_model(base, tmp_path / "dense", changes))
    np.testing.assert_allclose(logits(tmp_path / "merged"), dense, rtol=0, atol=1e-4)
    assert np.abs(dense - logits(base)).max() > 0.1
    assert result.difference is not None and result.difference.rms == 0 < result.difference.adapter_rms
    assert "linear merge of 0.7 * first + -1.1 * second: " in str(result)
    assert "rank 6, alpha 6: it keeps all of the Frobenius norm" in str(result)


def test_a_folder_that_computes_something_else_is_removed(
    folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    base, written, merge = 0.0, 10.0, 1.0
    logits = iter([base, written, merge])
    monkeypatch.setattr("qlora_jax.api.merge_adapters.prompt_logits", lambda *given: np.full((4, 5), next(logits)))
    with pytest.raises(ValueError, match=r"wrong: the written adapter is not the merge: largest difference .* 9 "):
        q.merge_adapters(folders, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


@pytest.mark.slow
def test_a_rank_that_cuts_too_much_is_noted(folders: list[Path], tmp_path: Path):
    result = q.merge_adapters(folders, tmp_path / "cut", method="dare_ties", density=0.3, rank=1)
    assert "rank 1 leaves out more than a quarter of this effect. Give a larger --rank" in str(result)
    assert result.difference is not None and not result.difference.is_small
    again = q.merge_adapters(folders, tmp_path / "again", method="dare_ties", density=0.3, rank=1)
    assert again.difference == result.difference  # the same seed


@pytest.mark.slow
def test_the_mean_of_checkpoints(project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = tmp_path / "run"
    keep = {"train.keep": 3, "train.save_every": 1}
    q.finetune(project.adapted, project.tokenizer, project.rows, output=run, config=keep, **QUICK)
    main(["--run", str(run), "--last", "3", "--output", str(tmp_path / "mean")])
    told = capsys.readouterr().out
    assert "0.333 * run, step 1 + 0.333 * run, step 2 + 0.333 * run, step 3" in told and "on 3 prompts: 0 " in told
    found, expected = changes_in(tmp_path / "mean", project.model_folder), {}
    for step in (1, 2, 3):
        lora = open_finetuned(run, step=step).run.lora  # pyright: ignore[reportOptionalMemberAccess]
        for name, leaves in lora.items():
            product = np.asarray(leaves["lora_a"], "f8") @ np.asarray(leaves["lora_b"], "f8")
            expected[name] = expected.get(name, 0) + product * (32 / 4) / 3
    for name, change in expected.items():
        np.testing.assert_allclose(found[name], change, rtol=0, atol=1e-6, err_msg=name)
    assert isinstance(q.generate_text(*q.load(str(tmp_path / "mean")), "say sun", max_new_tokens=2), str)


WRONG = {
    "counts": (dict(weights=[1.0]), ["weights: found 1 for 2 adapters"]),
    "density": (dict(method="ties", weights=[1.0] * 3), ["weights: found 3", "density: missing, and method=ties"]),
    "linear": (dict(density=0.5), ["density: requires method ties, dare_linear or dare_ties (found linear)"]),
    "bounds": (dict(density=0.0, rank=0), ["density: found 0.0", "rank: found 0"]),
}


@pytest.mark.parametrize(("settings", "parts"), WRONG.values(), ids=WRONG)
def test_settings_that_contradict_each_other(settings: dict, parts: list[str]):
    with pytest.raises(ConfigError) as caught:
        q.merge_adapters(["a", "b"], "merged", **settings)
    assert all(part in str(caught.value) for part in parts)


def test_all_adapters_with_a_problem_are_listed(folders: list[Path], tmp_path: Path):
    other = write_random_adapter(tmp_path / "other", tmp_path / "model", q.LoRA(), 2)
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "ADALORA"}))
    given = [folders[0], tmp_path / "nowhere", other]
    with pytest.raises(ValueError) as caught:
        q.merge_adapters(given, folders[1])
    found = str(caught.value)
    assert f"output: {folders[1]} exists. Give a new folder" in found
    assert f"{tmp_path / 'nowhere'}: not a run folder" in found and "peft_type: found 'ADALORA'" in found
    with pytest.raises(ValueError, match=r"first: --last: found the checkpoints \[\], expected 2\. Reduce it"):
        q.merge_adapters(folders[:1], tmp_path / "new", last=2)
