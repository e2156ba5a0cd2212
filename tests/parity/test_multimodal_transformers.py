"""Text halves of multimodal models against transformers' classes of the whole models, in f32."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from qlora_jax.export import main
from tests.io.tiny_models import tokenizer_json
from tests.parity.test_families_transformers import (
    ALTERNATING,
    CUT,
    GQA,
    LENGTH,
    ORACLE,
    PADDING,
    TOLERANCE,
    VOCAB,
    _loaded,
    errors_of,
)
from tests.parity.test_peft import LORAS, _logits, _write_run

LOGITS = Path(__file__).parent.parent / "oracle/multimodal_logits.py"
TOKENS = np.random.default_rng(0).integers(3, VOCAB, (2, LENGTH)).astype(np.int32)
SIGLIP = dict(model_type="siglip_vision_model", hidden_size=16, intermediate_size=16, num_hidden_layers=1)
SIGLIP |= dict(num_attention_heads=2, image_size=8, patch_size=4)
PIXTRAL = SIGLIP | dict(model_type="pixtral", head_dim=8)
CLIP = SIGLIP | dict(model_type="clip_vision_model", projection_dim=16)
ROPES = dict(
    full_attention=dict(rope_type="linear", factor=4.0, rope_theta=9000.0),
    sliding_attention=dict(rope_type="default", rope_theta=500.0),
)
GEMMA3 = GQA | dict(model_type="gemma3_text", head_dim=16, sliding_window=9, query_pre_attn_scalar=20)
GEMMA3 |= dict(layer_types=ALTERNATING, rope_parameters=ROPES)
MISTRAL = GQA | dict(model_type="mistral", sliding_window=9, head_dim=24, rms_norm_eps=1e-2)
QWEN2 = GQA | dict(model_type="qwen2", use_sliding_window=True, sliding_window=9, max_window_layers=1)
CONFIGS: dict[str, dict[str, Any]] = {
    "gemma3": dict(text_config=GEMMA3, vision_config=SIGLIP, mm_tokens_per_image=4),
    "mistral3": dict(text_config=MISTRAL, vision_config=PIXTRAL, tie_word_embeddings=False),
    "llava_onevision": dict(text_config=QWEN2, vision_config=SIGLIP),
}


def _model_types(configs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: {"model_type": name} | config for name, config in configs.items()}


@pytest.fixture(scope="module")
def folders(oracle, tmp_path_factory) -> tuple[Path, dict[str, np.ndarray]]:
    """A folder of random models that transformers saved, and what it computed of them."""
    folder = tmp_path_factory.mktemp("multimodal")
    settings = {"folder": str(folder), "padding": PADDING, "cut": CUT}
    return folder, oracle(ORACLE, configs=_model_types(CONFIGS), **settings, tokens=TOKENS)


@pytest.mark.slow
def test_text_halves(folders):
    folder, expected = folders
    errors = {}
    for name in CONFIGS:
        errors |= errors_of(name, _loaded(folder / name), expected, TOKENS)
    assert max(errors.values()) < TOLERANCE, {name: error for name, error in errors.items() if error >= TOLERANCE}


def _exported_run(folder: Path, tmp_path: Path, name: str) -> tuple[Path, Any, Any]:
    """Exports a run on a multimodal folder in every form; returns (the run, its model, its base)."""
    (folder / name / "tokenizer.json").write_text(tokenizer_json())
    (folder / name / "preprocessor_config.json").write_text('{"image_size": 8}')
    run = tmp_path / name
    with_adapter, base = _write_run(run, folder / name, LORAS["patterns"])
    main(["--run", str(run), "--format", "peft", "--with_base"])
    main(["--run", str(run), "--format", "hf", "--dtype", "float32"])
    return run, with_adapter, base


@pytest.mark.slow
def test_adapters_and_merged_models_are_of_the_whole_model(folders, oracle, tmp_path, capsys):
    """The adapter loads on the whole model; merged models and bases keep the other parts to the bit."""
    folder, _ = folders
    ours, paths, adapters = {}, {}, {}
    for name in ("gemma3", "mistral3"):
        run, with_adapter, base = _exported_run(folder, tmp_path, name)
        ours |= {f"{name}/base": _logits(base, TOKENS), f"{name}/adapted": _logits(with_adapter, TOKENS)}
        ours[f"{name}/merged"] = ours[f"{name}/adapted"]
        paths |= {f"{name}/merged": str(run / "hf"), f"{name}/base": str(run / "peft/base")}
        adapters[f"{name}/adapted"] = [str(run / "peft/base"), str(run / "peft")]
        original = load_file(folder / name / "model.safetensors")
        parts = {key: array for key, array in original.items() if not key.startswith("language_model.")}
        for written in (run / "hf", run / "peft/base"):
            found = load_file(written / "model.safetensors")
            assert found.keys() == original.keys() and len(parts) > 10
            for key, array in parts.items():
                np.testing.assert_array_equal(found[key], array, err_msg=key)
            assert (written / "preprocessor_config.json").read_text() == '{"image_size": 8}'
    found = oracle(LOGITS, folders=paths, adapters=adapters, tokens=TOKENS)
    for name, logits in ours.items():
        np.testing.assert_allclose(found[name], logits, atol=1e-4 * np.abs(logits).max(), err_msg=name)
    for name in adapters:
        assert np.abs(ours[name] - ours[name.replace("adapted", "base")]).max() > 0.01
        modules = json.loads(str(found[f"{name}/modules"]))
        assert len(modules) == 9 and all(".language_model.layers." in module for module in modules)
        assert json.loads(str(found[f"{name}/unused"])) == []
    told = capsys.readouterr().out
    assert "beside the text half, copied unchanged: vision_tower (" in told and ", multi_modal_projector (" in told
    assert "PEFT loads the adapter on the whole model, and leaves these parts as they are: vision_tower (" in told
