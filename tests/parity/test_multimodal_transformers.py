"""Text halves of multimodal models against transformers' classes of the whole models, in f32."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from qlora_jax import quantize
from qlora_jax.config import LoraArgs
from qlora_jax.export import main
from qlora_jax.io.pretrained import load_base, open_pretrained, weight_settings
from qlora_jax.models.families.multimodal import OTHER_PARTS, SIZE_NAMES, SIZES
from tests.io.tiny_models import tokenizer_json
from tests.marks import some_in_ci
from tests.parity.test_families_transformers import (
    ALTERNATING,
    CUT,
    GQA,
    LENGTH,
    ORACLE,
    PADDING,
    TOLERANCE,
    VOCAB,
    YARN,
    _loaded,
    errors_of,
)
from tests.parity.test_peft import LORAS, _logits, _write_run

PROCESSOR = '{"image_size": 8}'
LOGITS = Path(__file__).parent.parent / "oracle/multimodal_logits.py"
TOKENS = np.random.default_rng(0).integers(3, VOCAB, (2, LENGTH)).astype(np.int32)
SIGLIP = dict(model_type="siglip_vision_model", hidden_size=16, intermediate_size=16, num_hidden_layers=1)
SIGLIP |= dict(num_attention_heads=2, image_size=8, patch_size=4)
PIXTRAL = SIGLIP | dict(model_type="pixtral", head_dim=8)
CLIP = SIGLIP | dict(model_type="clip_vision_model", projection_dim=16)
INTERNVL = SIGLIP | dict(model_type="internvl_vision", image_size=[8, 8], patch_size=[4, 4])
ROPES = dict(
    full_attention=dict(rope_type="linear", factor=4.0, rope_theta=9000.0),
    sliding_attention=dict(rope_type="default", rope_theta=500.0),
)
GEMMA3 = GQA | dict(model_type="gemma3_text", head_dim=16, sliding_window=9, query_pre_attn_scalar=20)
GEMMA3 |= dict(layer_types=ALTERNATING, rope_parameters=ROPES)
MISTRAL = GQA | dict(model_type="mistral", sliding_window=9, head_dim=24, rms_norm_eps=1e-2)
MINISTRAL3 = GQA | dict(model_type="ministral3", head_dim=24, sliding_window=9)
MINISTRAL3 |= dict(rope_parameters=dict(YARN, rope_type="yarn", rope_theta=5000.0, llama_4_scaling_beta=0.7))
QWEN2 = GQA | dict(model_type="qwen2", use_sliding_window=True, sliding_window=9, max_window_layers=1)
QWEN_TOWER = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, patch_size=4, out_hidden_size=64)
QWEN3_TOWER = QWEN_TOWER | dict(num_position_embeddings=16, deepstack_visual_indexes=[0])
QWEN2_TOWER = dict(depth=1, embed_dim=16, hidden_size=64, mlp_ratio=2, num_heads=2, patch_size=4)
GLM_TOWER = QWEN_TOWER | dict(image_size=8)
SECTIONS = dict(rope_type="default", rope_theta=5000.0, mrope_section=[2, 3, 3])
QWEN2_VL = QWEN2 | dict(rope_parameters=SECTIONS, max_window_layers=2)
QWEN3_VL = GQA | dict(head_dim=16, attention_bias=True, rope_parameters=SECTIONS | dict(mrope_interleaved=True))
# With text positions, a section has no effect, so sections of any order give the same.
EXPERTS = dict(moe_intermediate_size=24, num_experts_per_tok=2)
QWEN3_VL_MOE = QWEN3_VL | EXPERTS | dict(model_type="qwen3_vl_moe_text", num_experts=6, mlp_only_layers=[1])
QWEN3_VL_MOE |= dict(intermediate_size=128)  # the dense layer has whole blocks for bitsandbytes
GLM4V = GQA | dict(model_type="glm4v_text")
GLM4V |= dict(rope_parameters=SECTIONS | dict(partial_rotary_factor=0.5, mrope_section=[1, 1, 2]))
GLM4V_MOE = GLM4V | EXPERTS | dict(model_type="glm4v_moe_text", n_routed_experts=8, n_group=4, topk_group=2)
GLM4V_MOE |= dict(routed_scaling_factor=1.7, first_k_dense_replace=1, n_shared_experts=2)
QWEN3_MOE = GQA | EXPERTS | dict(model_type="qwen3_moe", num_experts=8, norm_topk_prob=True, head_dim=24)
MIXTRAL = GQA | dict(model_type="mixtral", num_local_experts=4, num_experts_per_tok=2, sliding_window=9)
GPT_OSS = GQA | dict(model_type="gpt_oss", num_local_experts=4, num_experts_per_tok=2, head_dim=16, sliding_window=9)
GPT_OSS |= dict(layer_types=ALTERNATING, rope_parameters=dict(rope_type="default", rope_theta=5000.0))
CONFIGS: dict[str, dict[str, Any]] = {
    "gemma3": dict(text_config=GEMMA3, vision_config=SIGLIP, mm_tokens_per_image=4),
    "mistral3": dict(text_config=MISTRAL, vision_config=PIXTRAL, tie_word_embeddings=False),
    "mistral3, ministral3": dict(text_config=MINISTRAL3, vision_config=PIXTRAL, tie_word_embeddings=False),
    "llava_onevision": dict(text_config=QWEN2, vision_config=SIGLIP),
    "llava_next": dict(text_config=GQA | dict(model_type="llama", attention_bias=True), vision_config=CLIP),
    "llava": dict(text_config=MISTRAL, vision_config=CLIP),
    "vipllava": dict(text_config=GQA | dict(model_type="llama", intermediate_size=128), vision_config=CLIP),
    "internvl": dict(text_config=GQA | dict(model_type="qwen3", head_dim=16), vision_config=INTERNVL),
    "qwen2_vl": dict(text_config=QWEN2_VL | dict(model_type="qwen2_vl_text"), vision_config=QWEN2_TOWER),
    "qwen2_5_vl": dict(text_config=QWEN2_VL | dict(model_type="qwen2_5_vl_text"), vision_config=QWEN_TOWER),
    "qwen3_vl": dict(text_config=QWEN3_VL | dict(model_type="qwen3_vl_text"), vision_config=QWEN3_TOWER),
    "qwen3_vl_moe": dict(text_config=QWEN3_VL_MOE, vision_config=QWEN3_TOWER),
    "glm4v": dict(text_config=GLM4V, vision_config=GLM_TOWER),
    "glm4v_moe": dict(text_config=GLM4V_MOE, vision_config=GLM_TOWER),
    "internvl, qwen3_moe": dict(text_config=QWEN3_MOE, vision_config=INTERNVL),
    "internvl, gpt_oss": dict(text_config=GPT_OSS, vision_config=INTERNVL),
    "llava, mixtral": dict(text_config=MIXTRAL, vision_config=CLIP),
}


IN_CI = ("gemma3",)  # the others before a release
NAMES = some_in_ci([(name,) for name in CONFIGS], lambda index: list(CONFIGS)[index] in IN_CI)
MIXTURES = ("qwen3_vl_moe", "glm4v_moe", "internvl, qwen3_moe", "internvl, gpt_oss", "llava, mixtral")
EXPERT_LORA = LoraArgs(
    rank=4,
    alpha=8.0,
    target_modules=["q_proj", "v_proj"],
    target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
)


def _selected(request: pytest.FixtureRequest) -> list[str]:
    """Returns the names of the configs that the selected tests of this module use, each as its parameter `name`."""
    cases = (getattr(item, "callspec", None) for item in request.session.items if item.path == request.path)
    used = {case.params["name"] for case in cases if case is not None and "name" in case.params}
    return [name for name in CONFIGS if name in used]


@pytest.fixture(scope="module")
def folders(oracle, request, tmp_path_factory) -> tuple[Path, dict[str, np.ndarray]]:
    """A folder of random models that transformers saved, and what it computed of them."""
    folder, names = tmp_path_factory.mktemp("multimodal"), _selected(request)
    configs = {name: {"model_type": name.partition(",")[0]} | CONFIGS[name] for name in names}
    settings = {"folder": str(folder), "padding": PADDING, "cut": CUT}
    expected = oracle(ORACLE, configs=configs, **settings, tokens=TOKENS)
    for name in names:
        (folder / name / "tokenizer.json").write_text(tokenizer_json())
        (folder / name / "preprocessor_config.json").write_text(PROCESSOR)
    return folder, expected


@pytest.mark.parametrize("name", NAMES)
def test_text_halves(folders, name: str) -> None:
    folder, expected = folders
    errors = errors_of(name, _loaded(folder / name), expected, TOKENS)
    assert max(errors.values()) < TOLERANCE, errors


def _check_other_parts(written: Path, original: Path) -> None:
    """Checks that a written folder has the original's names and processor, and its tower to the bit."""
    found, expected = load_file(written / "model.safetensors"), load_file(original / "model.safetensors")
    parts = {key: array for key, array in expected.items() if key.removeprefix("model.").startswith(OTHER_PARTS)}
    assert found.keys() == expected.keys() and len(parts) > 10
    for key, array in parts.items():
        np.testing.assert_array_equal(found[key], array, err_msg=key, strict=True)
    assert (written / "preprocessor_config.json").read_text() == PROCESSOR


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("name", CONFIGS)
def test_exports_are_of_the_whole_model(folders, oracle, tmp_path, capsys, name: str) -> None:
    """The adapter loads on the whole model, and a merged model and a base keep its other parts to the bit."""
    folder, run = folders[0] / name, tmp_path / "run"
    with_adapter, base = _write_run(run, folder, EXPERT_LORA if name in MIXTURES else LORAS["patterns"])
    main(["--run", str(run), "--format", "peft", "--with_base"])
    main(["--run", str(run), "--format", "hf", "--dtype", "float32"])
    for written in (run / "hf", run / "peft/base"):
        _check_other_parts(written, folder)
    adapters = {"adapted": [str(run / "peft/base"), str(run / "peft")]}
    found = oracle(
        LOGITS, folders={"merged": str(run / "hf"), "base": str(run / "peft/base")}, adapters=adapters, tokens=TOKENS
    )
    adapted, plain = _logits(with_adapter, TOKENS), _logits(base, TOKENS)
    assert np.abs(adapted - plain).max() > 0.01
    for case, logits in {"merged": adapted, "adapted": adapted, "base": plain}.items():
        np.testing.assert_allclose(found[case], logits, atol=1e-4 * np.abs(logits).max(), err_msg=case)
    modules = json.loads(str(found["adapted/modules"]))
    assert len(modules) >= 9 and all(".language_model.layers." in module for module in modules)
    assert json.loads(str(found["adapted/unused"])) == []
    told = capsys.readouterr().out
    assert "beside the text half, copied unchanged: " in told and any(f"{part} (" in told for part in OTHER_PARTS)
    assert "PEFT loads the adapter on the whole model, and leaves these parts as they are: " in told


METHODS = {
    "ia3": LoraArgs(method="ia3"),
    "vera": LoraArgs(method="vera", rank=4, target_modules=["q_proj", "up_proj"]),
    "ln_tuning": LoraArgs(method="ln_tuning"),
    "dora": LoraArgs(method="dora", rank=4, alpha=8.0),
    "oft": LoraArgs(method="oft", oft_block_size=8),
}


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("name", IN_CI)
def test_every_method_loads_on_the_whole_model(folders, oracle, tmp_path, name: str) -> None:
    ours, adapters = {}, {}
    for method, lora in METHODS.items():
        run = tmp_path / method
        ours[method] = _logits(_write_run(run, folders[0] / name, lora)[0], TOKENS)
        main(["--run", str(run), "--format", "peft", "--with_base"])
        adapters[method] = [str(run / "peft/base"), str(run / "peft")]
    found = oracle(LOGITS, folders={}, adapters=adapters, tokens=TOKENS)
    for method, logits in ours.items():
        np.testing.assert_allclose(found[method], logits, atol=1e-4 * np.abs(logits).max(), err_msg=method)
        assert all(".language_model." in module for module in json.loads(str(found[f"{method}/modules"]))), method


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["vipllava", "qwen3_vl_moe"])
def test_four_bits_of_bitsandbytes(folders, oracle, tmp_path, name: str) -> None:
    """A 4-bit folder is the whole model, and transformers computes from it what we do."""
    # bitsandbytes' dequantization on a CPU is wrong for rows that are not whole blocks of 64.
    folder, output = folders[0] / name, tmp_path / "nf4"
    quantize.main(["--model", str(folder), "--output", str(output), "--dtype", "float32"])
    opened = open_pretrained(model=str(output))
    kind = "stored" if name in MIXTURES else "nf4"  # else experts, which the folder has in 16 bits, are quantized
    logits = _logits(load_base(opened, weight_settings(opened, kind, "float32")), TOKENS)
    found = oracle(LOGITS, folders={"nf4": str(output)}, adapters={}, tokens=TOKENS)
    np.testing.assert_allclose(found["nf4"], logits, atol=1e-4 * np.abs(logits).max())
    original, written = load_file(folder / "model.safetensors"), load_file(output / "model.safetensors")
    for key in original:
        if key.removeprefix("model.").startswith(OTHER_PARTS):
            np.testing.assert_array_equal(written[key], original[key], err_msg=key, strict=True)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_sizes_that_a_config_omits_are_those_of_transformers(oracle) -> None:
    found = oracle(LOGITS.with_name("config_defaults.py"), model_types=list(SIZES), names=list(SIZE_NAMES))
    assert json.loads(str(found["defaults"])) == {name: list(sizes) for name, sizes in SIZES.items()}
