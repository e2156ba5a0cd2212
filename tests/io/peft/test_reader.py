"""A PEFT adapter is read as it was written; all problems of a folder are reported at once."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qlora_jax.config import LoraArgs
from qlora_jax.io.peft.reader import base_model_of, read_adapter
from qlora_jax.io.peft.start_adapter import read_start_adapter
from qlora_jax.io.peft.writer import in_peft_format, write_adapter
from qlora_jax.methods.method import method_of
from qlora_jax.methods.peft_form import check_fits
from qlora_jax.models.families import model_config
from tests.io.tiny_models import tiny_config

MODEL = model_config(tiny_config())
ARGS = LoraArgs(rank=4, alpha=8.0, dropout=0.1, target_modules=["down_proj", "q_proj"], rank_pattern={"down_proj": 2})


def random_lora(seed: int = 0) -> dict[str, dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    shapes = {"self_attn.q_proj": ((2, 64, 4), (2, 4, 64)), "mlp.down_proj": ((2, 128, 2), (2, 2, 64))}
    return {
        f"model.layers.{name}": {"lora_a": rng.random(a, np.float32), "lora_b": rng.random(b, np.float32)}
        for name, (a, b) in shapes.items()
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config, tensors = in_peft_format(random_lora(), ARGS, MODEL, "a/base")
    write_adapter(tmp_path, tensors, config)
    return tmp_path


def test_what_was_written_returns(folder: Path):
    adapter = read_adapter(folder, MODEL)
    assert adapter.args == ARGS and adapter.base == "a/base"
    lora = random_lora()
    assert adapter.lora.keys() == lora.keys()
    for name, matrices in lora.items():
        for matrix, values in matrices.items():
            np.testing.assert_array_equal(adapter.lora[name][matrix], values, strict=True)


SOME_LAYERS = {
    "one setting": (
        {"model.layers.self_attn.q_proj": (1,), "model.layers.mlp.down_proj": (1,)},
        {"layers_to_transform": [1]},
    ),
    "names": (
        {"model.layers.mlp.down_proj": (0,)},
        {"target_modules": ["q_proj", "model.layers.0.mlp.down_proj"]},
    ),
}


@pytest.mark.parametrize(("layers", "settings"), SOME_LAYERS.values(), ids=SOME_LAYERS)
def test_an_adapter_on_some_layers_returns(tmp_path: Path, layers: dict, settings: dict):
    lora = {
        name: {leaf: array[list(layers.get(name, range(2)))] for leaf, array in leaves.items()}
        for name, leaves in random_lora().items()
    }
    args = dataclasses.replace(ARGS, **settings)
    config, tensors = in_peft_format(lora, args, MODEL, "a/base")
    write_adapter(tmp_path, tensors, config)
    adapter = read_adapter(tmp_path, MODEL)
    assert adapter.args == args
    assert adapter.lora.keys() == lora.keys()
    for name, matrices in lora.items():
        for matrix, values in matrices.items():
            np.testing.assert_array_equal(adapter.lora[name][matrix], values, strict=True)


def _with(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (dict(peft_type="ADALORA"), ["peft_type: found 'ADALORA', expected 'LORA' or 'IA3' or 'OFT' or 'VERA' or"]),
        (dict(oft_block_size=8, use_qalora=True), ["oft_block_size: 8 is not", "use_qalora: True is not supported"]),
        (
            dict(modules_to_save=["lm_head", "norm"], bias="all"),
            ["modules_to_save: norm is neither", "bias: found 'all'"],
        ),
        (dict(trainable_token_indices={"embed_tokens": [1], "lm_head": [2]}), ["different tokens for head and"]),
        (dict(layers_to_transform=[0], use_dora=True), ["layers_to_transform: [0] is not supported"]),
        (dict(init_lora_weights="pissa"), ["init_lora_weights: 'pissa' changes the base"]),
    ],
)
def test_settings_that_are_not_supported(folder: Path, changes: dict, parts: list[str]):
    _with(folder, **changes)
    with pytest.raises(ValueError) as caught:
        read_adapter(folder, MODEL)
    assert all(part in str(caught.value) for part in parts)


def test_adapters_per_expert_are_one_line(folder: Path):
    """transformers 4 has a linear layer per expert, so PEFT saved an adapter of each."""
    path = folder / "adapter_model.safetensors"
    experts = {
        f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.gate_proj.lora_A.weight": np.ones((2, 64), "f4")
        for layer in range(2)
        for expert in range(64)
    }
    save_file(load_file(path) | experts, path)
    with pytest.raises(ValueError) as caught:
        read_adapter(folder, MODEL)
    assert str(caught.value).splitlines()[1:] == [
        "  model.layers.*.mlp.experts.*.gate_proj.lora_A.weight: an adapter per expert, as of transformers 4. Load it "
        "with PEFT under transformers 5 and save it again"
    ]


def test_many_problems_are_counted(tmp_path: Path):
    with pytest.raises(ValueError, match="and 50 more") as caught:
        check_fits(tmp_path, ["a problem"] * 150)
    assert len(str(caught.value).splitlines()) == 102


def test_tensors_that_do_not_fit_are_told_at_once(folder: Path):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    prefix = "base_model.model.model.layers"
    del tensors[f"{prefix}.1.self_attn.q_proj.lora_A.weight"]
    tensors[f"{prefix}.0.mlp.down_proj.lora_B.weight"] = np.ones((63, 2), np.float32)
    tensors[f"{prefix}.0.mlp.w_pack.lora_A.weight"] = np.ones((2, 64), np.float32)
    tensors["base_model.model.lm_head.weight"] = np.ones((2, 64), np.float32)
    save_file(tensors, path)
    with pytest.raises(ValueError) as caught:
        read_adapter(folder, MODEL)
    for part in (
        "model.layers.1.self_attn.q_proj.lora_A.weight: missing",
        "0.mlp.down_proj.lora_B.weight: shape [63, 2], expected [64, 2]",
        "model.layers.*.mlp.w_pack.lora_A.weight: not a linear layer",
        "base_model.model.lm_head.weight: shape [2, 64], expected [32 or more, 64]",
    ):
        assert part in str(caught.value)


def test_a_pickle_is_refused(folder: Path):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ValueError, match="a pickle, which is not read because it can run any code"):
        read_adapter(folder, MODEL)


def test_training_goes_on_from_an_adapter_with_its_own_settings_alone(folder: Path):
    start = read_start_adapter(folder, MODEL, LoraArgs(rank=4, alpha=8.0, rank_pattern={"down_proj": 2}), ())
    assert start.keys() == random_lora().keys()
    with pytest.raises(ValueError, match=r"(?s)lora.rank: found 16, expected 4.*lora.alpha: found 32.0, expected 8.0"):
        read_start_adapter(folder, MODEL, LoraArgs(), ())


TIED = model_config(tiny_config(tie_word_embeddings=True))
EMBEDDING, HEAD = "base_model.model.model.embed_tokens", "base_model.model.lm_head"
DELTA = "token_adapter.trainable_tokens_delta"
LONG, OTHER = np.ones((34, 64), np.float32), np.zeros((34, 64), np.float32)


@pytest.mark.parametrize(
    ("model", "tensors", "part"),
    [
        (MODEL, {f"{EMBEDDING}.{DELTA}": LONG[:2]}, f"lm_head.{DELTA} is missing"),
        (TIED, {f"{EMBEDDING}.{DELTA}": LONG[:3]}, "shape [3, 64], expected [2, 64]"),
        (MODEL, {f"{EMBEDDING}.weight": LONG}, "one of embedding and head is longer than the base's"),
        (MODEL, {f"{EMBEDDING}.weight": LONG, f"{HEAD}.weight": LONG[:33]}, "have different lengths"),
        (TIED, {f"{EMBEDDING}.weight": LONG, f"{HEAD}.weight": OTHER}, "two tables differ"),
    ],
)
def test_tables_that_do_not_fit(folder: Path, model, tensors: dict[str, np.ndarray], part: str):
    path = folder / "adapter_model.safetensors"
    save_file(load_file(path) | tensors, path)
    if any(DELTA in name for name in tensors):
        _with(folder, trainable_token_indices=[32, 33])
    with pytest.raises(ValueError) as caught:
        read_adapter(folder, model)
    assert part in str(caught.value)


def test_training_goes_on_with_the_same_new_tokens_and_no_whole_tables(folder: Path):
    args = LoraArgs(rank=4, alpha=8.0, rank_pattern={"down_proj": 2})
    path = folder / "adapter_model.safetensors"
    plain = load_file(path)
    save_file(plain | {f"{EMBEDDING}.{DELTA}": LONG[:2]}, path)
    _with(folder, trainable_token_indices=[32, 33])
    rows = read_start_adapter(folder, TIED, args, (32, 33))["model.embed_tokens"]["rows"]
    np.testing.assert_array_equal(rows, LONG[:2])
    with pytest.raises(ValueError, match=r"model.new_tokens \(found \[32, 33\], expected \[32\]"):
        read_start_adapter(folder, TIED, args, (32,))
    save_file(plain | {f"{EMBEDDING}.weight": LONG[:32]}, path)
    _with(folder, trainable_token_indices=None)
    with pytest.raises(ValueError, match=r"contains all of model.embed_tokens. Add them to lora.modules_to_save"):
        read_start_adapter(folder, TIED, args, ())
    whole = read_start_adapter(folder, TIED, dataclasses.replace(args, modules_to_save=["embed_tokens"]), ())
    np.testing.assert_array_equal(whole["model.embed_tokens"]["weight"], LONG[:32])


HOSTILE = [True, 0, -1, 1.5, math.nan, 2**31, 10**400, "", "x", [], [None], ["x", 3], {}, {"a": 1}, {"(": 4}]
HOSTILE += [{"(?=q)": 4}, {"q_proj": [1]}, dict.fromkeys(map(str, range(10_001)), 1)]
KEYS = ["peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"]
KEYS += ["base_model_name_or_path", "revision", "bias", "init_lora_weights", "modules_to_save", "target_modules"]


@pytest.mark.parametrize("key", [*KEYS, "trainable_token_indices", "layers_to_transform"])
def test_a_setting_of_another_type_is_read_or_refused(folder: Path, key: str):
    sound, refused = (folder / "adapter_config.json").read_text(), 0
    for value in HOSTILE:
        _with(folder, **{key: value})
        try:
            read_adapter(folder, MODEL)
            base_model_of(folder)
        except ValueError as error:
            assert str(folder) in str(error) and len(str(error)) < 20_000
            refused += 1
        (folder / "adapter_config.json").write_text(sound)
    assert (refused == 0) == (key == "target_modules")  # PEFT's targets show in the tensors


def test_every_setting_of_another_type_is_named(folder: Path):
    _with(folder, r="4", lora_alpha=None, rank_pattern={"down_proj": "2"}, trainable_token_indices={"a": [1, "2"]})
    with pytest.raises(ValueError) as caught:
        read_adapter(folder, MODEL)
    assert str(caught.value).splitlines()[1:] == [
        "  trainable_token_indices.a.1: found '2', expected a whole number",
        "  r: found '4', expected a whole number",
        "  lora_alpha: found None, expected a number",
        "  rank_pattern.down_proj: found '2', expected a whole number",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(rank_pattern={"(": 4}), r"rank_pattern: '\(': not a regular expression: missing \)"),
        (dict(alpha_pattern={"(?!q)x": 4}), r"alpha_pattern: '\(\?!q\)x': .* linear time: a negative lookahead"),
        (dict(trainable_token_indices=[5, 2**30]), f"trainable_token_indices: found {2**30}, expected ids of the base"),
    ],
)
def test_settings_that_would_hang_or_fill_the_memory(folder: Path, changes: dict, message: str):
    _with(folder, **changes)
    with pytest.raises(ValueError, match=message):
        read_adapter(folder, MODEL)


OFT_ARGS = LoraArgs(method="oft", oft_block_size=16, num_cayley_neumann_terms=7, target_modules=["q_proj"])
VERA_ARGS = LoraArgs(method="vera", rank=3, dropout=0.1, projection_prng_key=4, target_modules=["down_proj"])
Q_PROJ, DOWN_PROJ = "model.layers.self_attn.q_proj", "model.layers.mlp.down_proj"


def _written(folder: Path, args: LoraArgs) -> dict[str, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    if args.method == "oft":
        lora = {Q_PROJ: {"oft_r": rng.random((2, 4, 120), np.float32)}}
    else:
        lora = {DOWN_PROJ: {"lambda_b": rng.random((2, 64), np.float32), "lambda_d": rng.random((2, 3), np.float32)}}
    config, tensors = in_peft_format(lora, args, MODEL, "a/base")
    write_adapter(folder, tensors, config)
    return lora


@pytest.mark.parametrize("args", [OFT_ARGS, VERA_ARGS], ids=["oft", "vera"])
def test_rotations_and_vectors_return(tmp_path: Path, args: LoraArgs):
    lora = _written(tmp_path, args)
    adapter = read_adapter(tmp_path, MODEL)
    assert adapter.args == args and not adapter.frozen and adapter.lora.keys() == lora.keys()
    for name, leaves in lora.items():
        for leaf, values in leaves.items():
            np.testing.assert_array_equal(adapter.lora[name][leaf], values, strict=True)
    assert read_start_adapter(tmp_path, MODEL, args, ()).keys() == lora.keys()
    other = dataclasses.replace(
        args, **{"oft": dict(oft_block_size=8), "vera": dict(projection_prng_key=5)}[args.method]
    )
    with pytest.raises(ValueError, match=r"settings differ from the adapter's.*\n  lora\.(oft_block|projection_prng)"):
        read_start_adapter(tmp_path, MODEL, other, ())


@pytest.mark.parametrize(
    ("args", "changes", "parts"),
    [
        (OFT_ARGS, dict(coft=True), ["coft: True is not supported"]),
        (OFT_ARGS, dict(module_dropout=0.1), ["module_dropout: 0.1 is not supported"]),
        (OFT_ARGS, dict(r=4), ["r, oft_block_size: found 4 and 16, expected one of them to be 0"]),
        (OFT_ARGS, dict(peft_version="0.17.1"), ["use_cayley_neumann: its series was another one before PEFT 0.18"]),
        (
            OFT_ARGS,
            dict(oft_block_size=48),
            ["lora.oft_block_size: found 48, but model.layers.self_attn.q_proj has 64"],
        ),
        (VERA_ARGS, dict(r=0), ["r: found 0, expected at least 1"]),
        (
            VERA_ARGS,
            dict(r=5),
            [
                "down_proj: rank 3, expected r=5",
                "vera_A: shape [3, 128], expected at least [5, 128], of rank 5",
                "vera_B",
            ],
        ),
    ],
)
def test_settings_of_rotations_and_vectors_that_are_not_supported(tmp_path: Path, args, changes, parts):
    _written(tmp_path, args)
    _with(tmp_path, **changes)
    with pytest.raises(ValueError) as caught:
        read_adapter(tmp_path, MODEL)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_frozen_matrices_of_an_adapter_are_its_own_or_those_of_its_seed(tmp_path: Path):
    _written(tmp_path, VERA_ARGS)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"base_model.vera_B": 2 * tensors["base_model.vera_B"]}, path)
    own, drawn = read_adapter(tmp_path, MODEL).frozen, method_of("vera").frozen_arrays(MODEL, VERA_ARGS)
    np.testing.assert_array_equal(own["vera_B"], 2 * drawn["vera_B"])
    with pytest.raises(ValueError, match="vera_A and vera_B are not those of projection_prng_key 4"):
        read_start_adapter(tmp_path, MODEL, VERA_ARGS, ())
    save_file({name: values for name, values in tensors.items() if "vera_B" not in name}, path)
    with pytest.raises(ValueError, match=r"base_model.vera_B is missing"):
        read_adapter(tmp_path, MODEL)
    save_file({name: values for name, values in tensors.items() if name.count("vera_") and "layers" in name}, path)
    with pytest.raises(ValueError, match=r"(?s)vera_A is missing.*vera_B is missing"):
        read_adapter(tmp_path, MODEL)
    _with(tmp_path, save_projection=False)
    assert not read_adapter(tmp_path, MODEL).frozen
