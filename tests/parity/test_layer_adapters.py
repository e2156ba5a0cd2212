"""LayerNorm tuning equals peft; BitFit and bottleneck adapters equal plain torch, in logits, gradients and files."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from qlora_jax.config import LoraArgs
from qlora_jax.export import main
from qlora_jax.io.hf.model_writer import write_dense_folder
from qlora_jax.io.peft.embeddings import module_name
from qlora_jax.io.pretrained import apply_adapter, load_base, open_pretrained, weight_settings
from qlora_jax.io.tensor_map import slots_of
from qlora_jax.methods.norms import norm_targets
from qlora_jax.models.families import model_config
from qlora_jax.models.partition import ModelParts, combine
from qlora_jax.models.tensor_names import layer_name
from tests.io.gguf_families import FAMILIES, random_tensors
from tests.io.tiny_models import tokenizer_json, write_folder
from tests.marks import some_in_ci
from tests.parity.test_peft import _write_run

pytestmark = pytest.mark.slow
ORACLES = Path(__file__).parent.parent / "oracle"
TOKENS = np.random.default_rng(0).integers(1, 32, (2, 19)).astype(np.int32)
COTANGENT = np.random.default_rng(1).standard_normal((2, 19, 32)).astype(np.float32)
CONFIGS = {name: config for name, (_, config) in FAMILIES.items()}
BITFIT = ("phi2", "qwen2", "gptneox")  # biases of all, and of a head, which is frozen; of some linears; of all
# Norms after, of 1 + weight; a parallel residual, whose MLP and attention read one norm; norms before.
ADAPTERS = (
    ("gemma2", LoraArgs(method="houlsby", rank=6)),
    ("phi2", LoraArgs(method="pfeiffer", rank=6, bottleneck_activation="relu")),
    ("llama", LoraArgs(method="houlsby", rank=6, bottleneck_activation="silu")),
    ("gptneox", LoraArgs(method="houlsby", rank=6, bottleneck_activation="relu")),
)


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def _model(folder: Path, config: dict[str, Any]) -> Path:
    return write_folder(folder, config, random_tensors(config), **{"tokenizer.json": tokenizer_json()})


def _run(run: Path) -> ModelParts:
    opened = open_pretrained(run=str(run))
    assert opened.run is not None
    return apply_adapter(load_base(opened, opened.args), opened.run)


def _gradients(parts: ModelParts) -> tuple[np.ndarray, dict[str, dict[str, np.ndarray]]]:
    """(logits, gradients by our names) over the base in 4 bits."""

    @jax.jit
    def logits(lora):
        model = combine(parts.with_lora(lora))
        return model.head.logits(model.hidden(jnp.asarray(TOKENS), remat="names")).reshape(COTANGENT.shape)

    value, vjp = jax.vjp(logits, parts.lora)
    return np.asarray(value), jax.tree.map(np.asarray, vjp(jnp.asarray(COTANGENT))[0])


def _close(found: np.ndarray, ours: np.ndarray, what: str) -> None:
    scale = np.abs(found).max()
    assert scale > 0, what
    np.testing.assert_allclose(ours / scale, found / scale, atol=2e-5, err_msg=what)


def _write_base(folder: Path, run: Path) -> None:
    """The dequantized base of a run, for transformers."""
    opened = open_pretrained(run=str(run))
    slots = slots_of(load_base(opened, opened.args))
    f32 = np.dtype("float32")
    folder.mkdir()
    write_dense_folder(folder, slots, opened.source.config, compute_dtype=f32, dtype=f32, adapters={})


def _by_layer(grads: dict[str, dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Gradients of bottlenecks by MODULE/LAYER/LEAF in torch's orientation."""
    return {
        f"{name.rpartition('.')[2]}/{layer}/{leaf}": value.T
        for name, leaves in grads.items()
        for leaf, values in leaves.items()
        for layer, value in enumerate(values)
    }


def _bias_gradients(grads: dict[str, dict[str, np.ndarray]], config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Gradients of biases by transformers' names."""
    features, named = model_config(config), {}
    for name, leaves in grads.items():
        stack = leaves["bias"] if ".layers." in name else leaves["bias"][None]
        named |= {f"{module_name(layer_name(name, i), features)}.bias": value for i, value in enumerate(stack)}
    return named


Case = tuple[dict[str, Any], dict[str, np.ndarray], np.ndarray, dict[str, np.ndarray]]


def _bitfit_case(folder: Path, config: dict[str, Any]) -> Case:
    """(the oracle's case, its arrays, our logits, our gradients), for the merged model."""
    _write_run(folder / "run", _model(folder / "model", config), LoraArgs(method="bitfit"))
    main(["--run", str(folder / "run"), "--format", "hf", "--dtype", "float32"])
    logits, grads = _gradients(_run(folder / "run"))
    return {"folder": str(folder / "run/hf")}, {}, logits, _bias_gradients(grads, config)


def _bottleneck_case(folder: Path, config: dict[str, Any], args: LoraArgs) -> Case:
    """(the oracle's case, its arrays, our logits, our gradients), over the dequantized base."""
    _write_run(folder / "run", _model(folder / "model", config), args)
    parts = _run(folder / "run")
    _write_base(folder / "dense", folder / "run")
    arrays = {
        f"{module.rpartition('.')[2]}/{leaf}": np.asarray(values).swapaxes(1, -1)
        for module, leaves in parts.lora.items()
        for leaf, values in leaves.items()
    }
    logits, grads = _gradients(parts)
    modules = dict.fromkeys(
        {"houlsby": ("self_attn", "mlp"), "pfeiffer": ("mlp",)}[args.method], args.bottleneck_activation
    )
    return {"folder": str(folder / "dense"), "modules": modules}, arrays, logits, _by_layer(grads)


@pytest.mark.parametrize(
    ("bitfit", "adapters"), some_in_ci([(BITFIT[:1], ADAPTERS[:2]), (BITFIT[1:], ADAPTERS[2:])], lambda i: i == 0)
)
def test_bitfit_and_bottlenecks_equal_torch(
    tmp_path: Path, oracle, bitfit: tuple[str, ...], adapters: tuple[tuple[str, LoraArgs], ...]
) -> None:
    ours = {f"{name} bitfit": _bitfit_case(_folder(tmp_path / f"{name} bitfit"), CONFIGS[name]) for name in bitfit}
    ours |= {name: _bottleneck_case(_folder(tmp_path / name), CONFIGS[name], args) for name, args in adapters}
    cases = {name: case for name, (case, *_) in ours.items()}
    arrays = {f"{name}/{key}": values for name, (_, own, *_) in ours.items() for key, values in own.items()}
    found = oracle(ORACLES / "layer_adapters.py", cases=cases, tokens=TOKENS, cotangent=COTANGENT, **arrays)
    for name, (_, _, logits, grads) in ours.items():
        _close(found[f"{name}/logits"], logits, name)
        prefix = f"{name}/grad/"
        assert {key.removeprefix(prefix) for key in found if key.startswith(prefix)} == grads.keys()
        for key, grad in grads.items():
            _close(found[prefix + key], grad, f"{name} {key}")


# By family: the target modules, None for peft's default, and ours for the same norms.
MADE_BY_PEFT = {
    "gemma2": (None, "auto"),
    "phi2": (None, "auto"),
    "gptneox": (["input_layernorm", "final_layer_norm"], ["input_layernorm", "final_layer_norm"]),
    "qwen3": (["q_norm", "k_norm", "norm"], ["k_norm", "norm", "q_norm"]),
}
DEFAULTS = {"llama": "llama", "gemma": "gemma", "gemma2": "gemma2", "gemma3": "gemma3_text", "phi2": "phi"}


@pytest.mark.parametrize("names", some_in_ci([(("gemma2", "qwen3"),), (("phi2", "gptneox"),)], lambda i: i == 0))
def test_norms_are_those_of_peft(tmp_path: Path, oracle, names: tuple[str, ...]) -> None:
    """Adapters that peft saved compute the same here; exported again, they have the same names, values and settings."""
    bases = {name: _model(tmp_path / f"{name}-model", CONFIGS[name]) for name in names}
    cases = {name: [str(bases[name]), str(tmp_path / name), MADE_BY_PEFT[name][0]] for name in names}
    found = oracle(ORACLES / "peft_save_norms.py", cases=cases, tokens=TOKENS)
    for name in names:
        opened = open_pretrained(run=str(tmp_path / name))
        assert opened.run is not None
        expected = LoraArgs(method="ln_tuning", target_modules=MADE_BY_PEFT[name][1])
        assert norm_targets(opened.features, opened.run.lora_args) == norm_targets(opened.features, expected)
        model = combine(apply_adapter(load_base(opened, weight_settings(opened, "none", "float32")), opened.run))
        logits = jax.jit(lambda model: model.head.logits(model.hidden(jnp.asarray(TOKENS))))(model)
        _close(found[name], np.asarray(logits).reshape(found[name].shape), name)
        main(["--run", str(tmp_path / name), "--output", str(tmp_path / f"{name}-again")])
        _assert_same_adapters(tmp_path / name, tmp_path / f"{name}-again", bases[name])
    defaults = json.loads(str(found["defaults"]))
    for name, model_type in DEFAULTS.items():
        targets = norm_targets(model_config(CONFIGS[name]), LoraArgs(method="ln_tuning"))
        assert {target.rpartition(".")[2] for target in targets} == set(defaults[model_type])


def _assert_same_adapters(saved: Path, again: Path, base: Path) -> None:
    """The second folder has the tensors of the first, and of its settings those that matter."""
    theirs, ours = (load_file(folder / "adapter_model.safetensors") for folder in (saved, again))
    assert theirs.keys() == ours.keys()
    for key, values in theirs.items():
        np.testing.assert_array_equal(ours[key], values, strict=True)
    theirs, ours = (json.loads((folder / "adapter_config.json").read_text()) for folder in (saved, again))
    assert set(ours.pop("target_modules")) == set(theirs["target_modules"])
    assert Path(ours.pop("base_model_name_or_path")) == base
    assert {key: theirs[key] for key in ours} == ours


def test_a_model_without_biases_has_nothing_for_bitfit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lora.method=bitfit: the model has no bias .* Set lora.method=ln_tuning"):
        _write_run(tmp_path / "run", _model(tmp_path / "model", CONFIGS["llama"]), LoraArgs(method="bitfit"))
