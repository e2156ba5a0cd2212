"""PiSSA and LoftQ start as in peft, and peft computes the same from exported adapters."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.config import Config, DataArgs, LoraArgs, ModelArgs, write_config
from qlora_jax.export import main
from qlora_jax.io.initial_file import write_initial
from qlora_jax.io.loading.adapter_init import WeightDecomposer, adapted_tensors
from qlora_jax.io.loading.loader import load_model
from qlora_jax.io.open_model import open_model
from qlora_jax.io.pretrained import apply_adapter, load_base, open_pretrained
from qlora_jax.io.run_folder.checkpoint import CONFIG_FILE, Checkpoints
from qlora_jax.io.tensor_map import slots_of
from qlora_jax.methods.attach import attach_method
from qlora_jax.models.families import model_config
from qlora_jax.models.partition import combine, partition
from qlora_jax.models.precision import weight_format
from qlora_jax.nn.lora import add_delta
from qlora_jax.quant import dequantize
from tests.io.tiny_models import random_weights, tiny_config, tokenizer_json, write_folder
from tests.parity.test_peft import SCRIPT, _logits

pytestmark = pytest.mark.slow
TOKENS = np.random.default_rng(0).integers(0, 32, (2, 19)).astype(np.int32)
PISSA = LoraArgs(rank=6, alpha=9.0, init="pissa", rank_pattern={"up_proj": 3})
LOFTQ = LoraArgs(rank=6, alpha=6.0, init="loftq")


def _model(folder: Path, falls: float = 0.95) -> Path:
    """Singular values that fall, so that the largest ones stand out."""
    config = tiny_config(attention_bias=True)
    weights = random_weights(config)
    for name, weight in weights.items():
        if weight.ndim == 2 and ".layers." in name:
            u, s, vt = np.linalg.svd(weight, full_matrices=False)
            weights[name] = (u * (s * falls ** np.arange(len(s))) @ vt).astype(np.float32)
    return write_folder(folder, config, weights, **{"tokenizer.json": tokenizer_json()})


def _begun(path: Path, spec: LoraArgs, **held):
    """(model with fresh adapters, its InitialAdapter, fingerprint) as a run begins."""
    source, args = open_model(path), ModelArgs(path=str(path), compute_dtype="float32", **held)
    config = model_config(source.config)
    weights = weight_format(args, config)
    decomposer = WeightDecomposer(config, weights, spec, jax.random.key(0))
    loaded = load_model(source, config, weights, transform=decomposer)
    base = slots_of(loaded.model)
    attach_method(loaded.model, spec, jax.random.key(0), decomposer.initial_adapter().factors)
    return loaded, decomposer.initial_adapter(), base


def _weights(base) -> dict[str, np.ndarray]:
    """Dequantized weights of layers by Hugging Face's names."""
    found = {}
    for slot in base:
        for layer, name in enumerate(slot.names if slot.stacked else []):
            leaf = jax.tree.map(lambda stack, layer=layer: stack[layer], slot.leaf)
            found[name] = np.asarray(leaf if isinstance(leaf, jax.Array) else dequantize(leaf, jnp.dtype("float32")))
    return found


def _deltas(model, spec: LoraArgs) -> dict[str, np.ndarray]:
    lora = partition(model).lora
    found = {}
    for name, target in adapted_tensors(model.config, spec).items():
        a, b = (np.asarray(lora[target.name][leaf][target.row]) for leaf in ("lora_a", "lora_b"))
        found[name] = target.scaling * (a @ b).T
    return found


def test_pissa_begins_as_pefts(tmp_path: Path, oracle) -> None:
    path = _model(tmp_path, falls=0.6)
    common = dict(r=6, lora_alpha=9, target_modules="all-linear", rank_pattern={"up_proj": 3})
    cases = {"whole": "pissa", "randomized": "pissa_niter_16"}
    pissa = {name: common | {"init_lora_weights": init} for name, init in cases.items()}
    found = oracle(SCRIPT.with_name("peft_initial.py"), folder=str(path), tokens=TOKENS, pissa=pissa, loftq={})
    for name, niter in (("whole", 0), ("randomized", 16)):
        spec = dataclasses.replace(PISSA, svd_niter=niter)
        loaded, _, base = _begun(path, spec, quant_type="none")
        np.testing.assert_allclose(_logits(loaded.model, TOKENS), found[f"{name}/logits"], atol=1e-4)
        rests, targets = _weights(base), adapted_tensors(loaded.model.config, spec)
        tolerance = 1e-5 if name == "whole" else 1e-4  # random numbers of their own
        for weight, delta in _deltas(loaded.model, spec).items():
            module, scaling = weight.removesuffix(".weight"), targets[weight].scaling
            theirs = scaling * found[f"{name}/{module}.lora_B.weight"] @ found[f"{name}/{module}.lora_A.weight"]
            largest = np.abs(theirs).max()
            np.testing.assert_allclose(delta, theirs, atol=tolerance * largest, err_msg=weight)
            rest = found[f"{name}/{module}.base_layer.weight"]
            np.testing.assert_allclose(rests[weight], rest, atol=tolerance * largest, err_msg=weight)


@pytest.mark.parametrize("iterations", [1, 4])
def test_loftq_begins_as_pefts(tmp_path: Path, oracle, iterations: int) -> None:
    """Compares with peft where alpha is the rank and constants are f32, the only case that peft supports.

    Codes of later iterations may differ where rounding decided.
    """
    path, spec = _model(tmp_path), dataclasses.replace(LOFTQ, loftq_iterations=iterations)
    found = oracle(
        SCRIPT.with_name("peft_initial.py"), folder=str(path), tokens=TOKENS, pissa={}, loftq={"it": [6, iterations]}
    )
    loaded, _, base = _begun(path, spec, double_quant=False)
    rests, source = _weights(base), open_model(path)
    for weight, delta in _deltas(loaded.model, spec).items():
        held, theirs = found[f"it/{weight}"], found[f"it/{weight}/delta"]
        differ = np.mean(np.abs(rests[weight] - held) > 1e-5 * np.abs(held).max())
        assert differ <= (0 if iterations == 1 else 0.01), (weight, differ)
        known = _known_in_f32(source.tensors[weight].read() - rests[weight], spec.rank)
        tolerance = 4 * known if iterations == 1 else 0.1
        np.testing.assert_allclose(delta, theirs, atol=tolerance * np.abs(theirs).max(), err_msg=weight)


def _known_in_f32(matrix: np.ndarray, rank: int) -> float:
    """eps s_1 / (s_rank - s_rank+1): how far rounding turns the first singular vectors (Wedin). Some 1e-5, and the
    deltas of two LAPACKs are about as far from one in f64."""
    s = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    return float(np.finfo(np.float32).eps * s[0] / (s[rank - 1] - s[rank]))


def _write_run(run: Path, path: Path, spec: LoraArgs, **held):
    """A run that has learned something; its model."""
    loaded, initial, _ = _begun(path, spec, **held)
    parts = partition(loaded.model)
    key = jax.random.key(1)
    lora = jax.tree.map(lambda leaf: leaf + 0.05 * jax.random.normal(key, leaf.shape), parts.lora)
    args = ModelArgs(path=str(path), compute_dtype="float32", **held)
    run.mkdir()
    write_config(Config(model=args, lora=spec, data=DataArgs(train="x"), output=str(run)), run / CONFIG_FILE)
    write_initial(run, initial)
    with Checkpoints(run, keep=1) as checkpoints:
        checkpoints.save(7, lora, {"count": np.zeros(1)}, {"fingerprint": loaded.fingerprint})
    return combine(parts.with_lora(lora))


CASES = {
    "pissa": (PISSA, {}),
    "pissa, rslora": (dataclasses.replace(PISSA, use_rslora=True, alpha_pattern={"q_proj": 2.0}), {}),
    "pissa, dora": (dataclasses.replace(PISSA, method="dora"), {}),
    "pissa, 16 bit": (PISSA, dict(quant_type="none")),
    "loftq": (dataclasses.replace(LOFTQ, alpha=12.0), {}),
    "loftq, thrice": (dataclasses.replace(LOFTQ, loftq_iterations=3), {}),
}


def test_what_is_exported_is_what_was_trained(tmp_path: Path, oracle) -> None:
    """The adapter gives the run's logits with its base; over the original model, up to the quantization error."""
    path, ours, folders = _model(tmp_path / "model"), {}, {}
    for name, (spec, held) in CASES.items():
        run = tmp_path / name
        trained = _write_run(run, path, spec, **held)
        opened = open_pretrained(run=str(run))
        assert opened.run is not None
        again = combine(apply_adapter(load_base(opened, opened.args), opened.run))  # refuses another fingerprint
        np.testing.assert_array_equal(_logits(again, TOKENS), _logits(trained, TOKENS))
        main(["--run", str(run), "--output", str(run / "with"), "--with_base"])
        main(["--run", str(run), "--output", str(run / "over")])
        main(
            ["--run", str(run), "--format", "hf", "--dtype", "float32"]
        )  # refuses a merge that is not what was trained
        ours[name] = _logits(trained, TOKENS)
        folders |= {f"{name}/with": [str(run / "with/base"), str(run / "with")]}
        folders |= {f"{name}/over": [str(path), str(run / "over")]}
    found = oracle(SCRIPT, cases=folders, tokens=TOKENS)
    quantized = load_base(open_pretrained(model=str(path)), ModelArgs(path=str(path), compute_dtype="float32"))
    took = _rms(_logits(quantized, TOKENS) - found["loftq/over/base"])
    for name, (_, held) in CASES.items():
        spread = np.abs(ours[name]).max()
        np.testing.assert_allclose(found[f"{name}/with/adapted"], ours[name], atol=2e-5 * spread, err_msg=name)
        over = found[f"{name}/over/adapted"]
        if held:
            np.testing.assert_allclose(over, ours[name], atol=5e-5 * spread, err_msg=name)
        off, learned = _rms(over - ours[name]), _rms(over - found[f"{name}/over/base"])
        assert off < 1.2 * took and off < 0.6 * learned, (name, off, took, learned)


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


def test_a_merge_into_the_original_weights_is_refused(tmp_path: Path) -> None:
    path, run = _model(tmp_path / "model"), tmp_path / "run"
    _write_run(run, path, LOFTQ)
    with pytest.raises(ValueError, match=r"a part of the weights \(lora.init=loftq\), which the original weights"):
        main(["--run", str(run), "--format", "hf", "--base", str(path)])


def test_a_run_without_what_it_began_with_is_refused(tmp_path: Path) -> None:
    path, run = _model(tmp_path / "model"), tmp_path / "run"
    _write_run(run, path, PISSA)
    (run / "initial.safetensors").unlink()
    with pytest.raises(ValueError, match=r"initial.safetensors: missing, and the base of a run with"):
        open_pretrained(run=str(run))


def test_a_split_weight_is_a_delta_and_the_rest(tmp_path: Path) -> None:
    """In 16 bits nothing is lost: rest and adapter sum to the weight."""
    path = _model(tmp_path)
    loaded, _, base = _begun(path, PISSA, quant_type="none")
    deltas, rests = _deltas(loaded.model, PISSA), _weights(base)
    source = open_model(path)
    for name, delta in deltas.items():
        np.testing.assert_allclose(rests[name] + delta, source.tensors[name].read(), atol=1e-6)
    linear = loaded.model.model.layers.mlp.up_proj
    one, weight = linear.adapter.select_layer(1), linear.weight.get_value()[1]
    np.testing.assert_allclose(
        add_delta(weight, one), source.tensors["model.layers.1.mlp.up_proj.weight"].read(), atol=1e-6
    )


@pytest.mark.parametrize("spec", [PISSA, LOFTQ], ids=["pissa", "loftq"])
def test_layers_without_an_adapter_keep_their_weights(tmp_path: Path, spec: LoraArgs) -> None:
    path, spec = _model(tmp_path), dataclasses.replace(spec, layers_to_transform=1)
    loaded, _, base = _begun(path, spec)
    source, args = open_model(path), ModelArgs(path=str(path), compute_dtype="float32")
    config = model_config(source.config)
    plain = _weights(slots_of(load_model(source, config, weight_format(args, config)).model))
    begun, deltas = _weights(base), _deltas(loaded.model, spec)
    assert {name.split(".layers.")[1][0] for name in deltas} == {"1"} and len(deltas) == 7
    for name, weight in plain.items():
        if name not in deltas:
            np.testing.assert_array_equal(begun[name], weight, err_msg=name)
            continue
        exact = source.tensors[name].read()
        off, before = _rms(begun[name] + deltas[name] - exact), _rms(weight - exact)
        # The first iteration of LoftQ quantizes the weight itself, and PiSSA what its largest singular values leave.
        assert np.array_equal(begun[name], weight) == (spec.init == "loftq"), name
        assert off < before, (name, off, before)
