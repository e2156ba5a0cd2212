"""Sequence heads on every family: exported, transformers' class for its model type has the same outputs."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.io.export.merged import export_merged
from qlora_jax.io.export.methods import NO_CLASSIFIER, head_refusal
from qlora_jax.io.export.peft import export_peft
from qlora_jax.io.loading.loader import load_model
from qlora_jax.io.open_model import open_model
from qlora_jax.methods.attach import attach_method
from qlora_jax.models.config import WeightFormat
from qlora_jax.models.families import FAMILIES, WRAPPERS, model_config
from qlora_jax.models.partition import ModelParts, combine, partition
from tests.io.tiny_models import tokenizer_json
from tests.parity.test_families_transformers import CONFIGS
from tests.parity.test_sequence_heads import CASES, LORA, SPECIAL, micro_batch, padding_of, write_run

RANDOM, LOSSES = (Path(__file__).parent.parent / f"oracle/{name}.py" for name in ("family_logits", "sequence_losses"))
CASE = CASES["classification"]
# One config of each model type that has a class.
NAMES = {config.get("model_type", "llama"): name for name, config in reversed(CONFIGS.items())}
MATCHED = sorted(name for kind, name in NAMES.items() if kind not in NO_CLASSIFIER)
GROUPS = [MATCHED[start : start + 6] for start in range(0, len(MATCHED), 6)]


def test_families_without_a_class_are_those_of_transformers(oracle):
    found = oracle(Path(__file__).parent.parent / "oracle/classifier_types.py", types=[*FAMILIES, *WRAPPERS])
    assert set(found["without"].tolist()) == {*NO_CLASSIFIER}
    for form in ("peft", "hf"):
        for kind in NO_CLASSIFIER:
            assert f"model_type={kind}). Use the run" in str(head_refusal(CASE.head, form, {"model_type": kind}))
        assert head_refusal(CASE.head, form, {"model_type": "qwen3"}) is None


def headed(folder: Path) -> tuple[ModelParts, str]:
    """(the model with a head and adapters that are not zero, its fingerprint)."""
    source = open_model(folder)
    loaded = load_model(source, model_config(source.config), WeightFormat(quant_type=None, dtype="float32"))
    attach_method(loaded.model, LORA, jax.random.key(0))
    loaded.model.add_sequence_head(CASE.head.spec(), jax.random.key(1), 0.1)
    parts, rng = partition(loaded.model), np.random.default_rng(7)
    lora = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.1, leaf.shape), leaf.dtype), parts.lora)
    return parts.with_lora(lora), loaded.fingerprint


@jax.jit
def outputs_of(parts: ModelParts, micro: dict[str, jax.Array]) -> jax.Array:
    model = combine(parts)
    return CASE.objective.outputs(model, model.hidden(micro["inputs"], segments_BT=micro["segments"]), micro)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("names", GROUPS, ids=" ".join)
def test_every_family_is_loaded_with_its_head(names: list[str], tmp_path: Path, oracle):
    oracle(RANDOM, configs={name: CONFIGS[name] for name in names}, folder=str(tmp_path), tokens=np.ones((1, 2)))
    ours: dict[str, np.ndarray] = {}
    given: dict[str, dict[str, Any]] = {}
    rows = CASE.texts[0]
    micro = micro_batch(CASE, [[row] for row in range(len(rows))], 24, 1)
    for name in names:
        folder = tmp_path / name
        words = json.loads(tokenizer_json()) | {"pre_tokenizer": {"type": "WhitespaceSplit"}}
        (folder / "tokenizer.json").write_text(json.dumps(words))
        special = SPECIAL | {"pad_token": "<unk>", "tokenizer_class": "PreTrainedTokenizerFast"}
        (folder / "tokenizer_config.json").write_text(json.dumps(special))
        parts, fingerprint = headed(folder)
        ours[name] = np.asarray(outputs_of(parts, micro)).reshape(len(rows), -1)
        run = write_run(tmp_path / f"{name}-run", folder, fingerprint, parts, CASE.head)
        export_peft(run, tmp_path / f"{name}-run/peft")
        export_merged(run, tmp_path / f"{name}-run/hf", "hf", dtype="float32")
        labels = CASE.values["labels"][:, 0].astype(int).tolist()
        given[name] = {"objective": "classification", "outputs": 3, "rows": rows, "labels": labels}
        adapter = tmp_path / f"{name}-run/peft"
        given[name] |= {"folder": str(folder), "adapter": str(adapter), **padding_of(adapter)}
        given[name] |= {"merged": str(tmp_path / f"{name}-run/hf")}
    expected = oracle(LOSSES, cases=given)
    for name in names:
        for kind in ("outputs", "merged"):
            np.testing.assert_allclose(
                ours[name], expected[f"{name}/{kind}"], rtol=1e-4, atol=1e-4, err_msg=f"{name} {kind}"
            )
