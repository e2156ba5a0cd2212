"""Adapters on mixtures of experts, exported and loaded by peft, and made by peft and read here: the same logits."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qlora_jax.config import LoraArgs
from qlora_jax.export import main
from qlora_jax.io.hf.fused_experts import name_in_files
from qlora_jax.io.pretrained import apply_adapter, load_base, open_pretrained, weight_settings
from qlora_jax.models.partition import combine
from tests.io.gguf_families import FAMILIES, random_tensors
from tests.io.tiny_models import tokenizer_json, write_folder
from tests.marks import some_in_ci
from tests.parity.test_peft import SCRIPT, _logits, _write_run

SAVE = SCRIPT.with_name("peft_save_adapters.py")
PARAMETER_SETTINGS = SCRIPT.with_name("peft_parameter_settings.py")
GATE_UP, DOWN, ROUTER = "mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate"
RUNS = {
    "mixtral": LoraArgs(
        rank=4,
        alpha=8.0,
        target_modules=["q_proj"],
        target_parameters=[GATE_UP, DOWN, ROUTER],
        rank_pattern={"experts.down_proj": 2, "gate": 3},
        alpha_pattern={"mlp.gate": 5.0},
    ),
    # Modules whose names peft takes for experts, and another scaling.
    "qwen2moe": LoraArgs(rank=4, alpha=8.0, use_rslora=True, rank_pattern={"up_proj": 9}, target_parameters=[DOWN]),
    "qwen3moe": LoraArgs(rank=4, alpha=8.0, target_modules=[], target_parameters=[f"model.layers.1.{GATE_UP}"]),
    # Fused experts in which gate and up take turns.
    "gptoss": LoraArgs(rank=4, alpha=8.0, target_modules=["q_proj"], target_parameters=[GATE_UP, DOWN, "mlp.router"]),
    # A dense layer before sparse ones, and one adapter for all experts.
    "glm4moe": LoraArgs(rank=4, alpha=8.0, target_parameters=[GATE_UP, DOWN], share_experts=True),
}
TOKENS = np.random.default_rng(0).integers(0, 32, (2, 19)).astype(np.int32)


def _folder(path: Path, name: str) -> Path:
    config = FAMILIES[name][1]
    tensors = {name_in_files(config, tensor): values for tensor, values in random_tensors(config).items()}
    return write_folder(path, config, tensors, **{"tokenizer.json": tokenizer_json()})


@pytest.mark.parametrize("names", some_in_ci([(["mixtral"],), (list(RUNS)[1:],)], lambda i: i == 0))
def test_exported_adapters(tmp_path: Path, oracle, names: list[str]) -> None:
    """peft computes our logits with the export over the base of training; and we read the export back."""
    ours, again, cases = {}, {}, {}
    for name in names:
        run, args = tmp_path / name, RUNS[name]
        adapted, base = _write_run(run, _folder(tmp_path / f"{name}-model", name), args)
        main(["--run", str(run), "--format", "peft", "--with_base"])
        cases[name] = [str(run / "peft/base"), str(run / "peft")]
        ours |= {f"{name}/base": _logits(base, TOKENS), f"{name}/adapted": _logits(adapted, TOKENS)}
        again[name] = _logits(_dense(run / "peft"), TOKENS)
    found = oracle(SCRIPT, cases=cases, tokens=TOKENS)
    assert found.keys() == ours.keys()
    for name, logits in ours.items():
        np.testing.assert_allclose(found[name], logits, atol=1e-4 * np.abs(logits).max(), err_msg=name)
    for name, logits in again.items():
        theirs = found[f"{name}/adapted"]
        np.testing.assert_allclose(theirs, logits, atol=1e-4 * np.abs(logits).max(), err_msg=name)
        assert np.abs(theirs - found[f"{name}/base"]).max() > 3e-3 * np.abs(theirs).max()


def _dense(adapter: Path) -> Any:
    """The model with an adapter over a base in f32."""
    opened = open_pretrained(run=str(adapter))
    base = load_base(opened, weight_settings(opened, "none", "float32"))
    assert opened.run is not None
    return combine(apply_adapter(base, opened.run))


MADE_BY_PEFT = {
    "both": ("qwen3moe", dict(target_modules=["q_proj", "v_proj"], target_parameters=[GATE_UP, DOWN])),
    "the inner one": ("mixtral", dict(target_modules=[], target_parameters=[GATE_UP], rank_pattern={GATE_UP: 3})),
    "router": ("olmoe", dict(target_modules=["o_proj"], target_parameters=[f"{ROUTER}.weight", DOWN])),
    "shared experts": ("glm4moe", dict(target_modules=[], target_parameters=["mlp.shared_experts.up_proj.weight"])),
    "one layer": ("glm4moe", dict(target_modules=["k_proj"], target_parameters=[f"model.layers.2.{DOWN}"])),
}


@pytest.mark.slow
@pytest.mark.exhaustive
def test_adapters_of_peft(tmp_path: Path, oracle) -> None:
    cases = {}
    for name, (family, settings) in MADE_BY_PEFT.items():
        base = _folder(tmp_path / f"{name}-model", family)
        cases[name] = [str(base), str(tmp_path / name), settings | dict(r=4, lora_alpha=10)]
    found = oracle(SAVE, cases=cases, tokens=TOKENS)
    for name, theirs in found.items():
        logits = _logits(_dense(tmp_path / name), TOKENS)
        np.testing.assert_allclose(logits, theirs, atol=1e-4 * np.abs(theirs).max(), err_msg=name)


@pytest.mark.slow
def test_dora_of_modules_that_peft_takes_for_experts_is_refused(tmp_path: Path) -> None:
    args = LoraArgs(rank=4, method="dora", target_modules=["q_proj", "up_proj"])
    _write_run(tmp_path / "run", _folder(tmp_path / "model", "qwen2moe"), args)
    with pytest.raises(ValueError, match=r"PEFT has no DoRA for these modules.*mlp\.shared_expert\.up_proj"):
        main(["--run", str(tmp_path / "run"), "--format", "peft"])


@pytest.mark.slow
def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    args = LoraArgs(rank=4, target_modules=["q_proj"], target_parameters=[GATE_UP])
    _write_run(tmp_path / "run", _folder(tmp_path / "model", "mixtral"), args)
    main(["--run", str(tmp_path / "run"), "--format", "peft"])
    path = tmp_path / "run/peft/adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"target_parameters": [GATE_UP, DOWN]}))
    with pytest.raises(ValueError, match=r"0\.mlp\.experts\.base_layer\.lora_A\.weight: missing, but the adapter's"):
        open_pretrained(run=str(path.parent))


SETTINGS = {
    "nothing": {},
    "dropout": {"lora_dropout": 0.1},
    "dora": {"use_dora": True},
    "bias": {"lora_bias": True},
    **{init: {"init_lora_weights": init} for init in ("pissa", "loftq", "olora")},
}


@pytest.mark.slow
@pytest.mark.exhaustive
def test_settings_that_peft_has_for_parameters(oracle) -> None:
    """Experts have no start from their weights in peft, so lora.init is refused with lora.target_parameters."""
    config = FAMILIES["mixtral"][1]
    found = json.loads(
        str(oracle(PARAMETER_SETTINGS, config=config, targets=[GATE_UP, DOWN], settings=SETTINGS)["found"])
    )
    for target, outcomes in found.items():
        assert [name for name, built in outcomes.items() if built] == ["nothing"], (target, outcomes)
