"""Losses, LoRA gradients, advantages and metrics of policy gradients equal TRL's trainers in f32.

Dimension key: P prompts, G replies to each, F reward functions.
"""

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from qlora_jax.config import Config, DataArgs, LoraArgs, ModelArgs, PolicyArgs, RolloutArgs
from qlora_jax.io.loading.loader import load_model
from qlora_jax.io.open_model import open_model
from qlora_jax.io.peft.writer import in_peft_format, write_adapter
from qlora_jax.methods.attach import attach_method
from qlora_jax.models.config import WeightFormat
from qlora_jax.models.families import model_config
from qlora_jax.models.partition import Lora, ModelParts, combine, partition, place_parts
from qlora_jax.objectives.make_objective import make_objective
from qlora_jax.objectives.objective import read_by_outputs
from qlora_jax.objectives.policy_gradient import PolicyGradient, PolicyOutputs
from qlora_jax.rollouts.advantages import group_advantages, token_scale
from qlora_jax.sharding import ROWS, make_mesh, named
from qlora_jax.training.metrics.step_metrics import step_metrics
from qlora_jax.training.step import evaluation_outputs, gradients, row_outputs
from tests.io.tiny_models import random_weights, tiny_config, tokenizer_json, write_folder
from tests.marks import EXHAUSTIVE
from tests.training.policy_rows import EOS, policy_arrays, random_replies

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parent.parent / "oracle/trl_policies.py"
LORA = LoraArgs(rank=4, alpha=8.0, target_modules=["q_proj", "v_proj", "down_proj"])
TOLERANCE = 1e-5
PROMPTS, REPLIES = random_replies(4, 3, vocabulary=32)
REPLY_COUNT, LONGEST = 3, 16
WEIGHTS = [0.5, 2.0]
NAN = float("nan")
# Group 1 has equal sums, group 2 only one reply with a reward.
REWARDS = [
    *([1, 0], [0, 0.7], [NAN, 1], [2, 0], [0, 0.5], [2, 0]),
    *([NAN, NAN], [NAN, NAN], [1, 1], [0, 1], [1, 1], [3, NAN]),
]
CORRECTIONS = {
    "vllm_importance_sampling_mode": "importance_correction",
    "vllm_importance_sampling_clip_max": "correction_max",
}


OURS = dataclasses.asdict(PolicyArgs()) | dataclasses.asdict(RolloutArgs())
OWN_NAMES = {"importance_correction", "correction_max", "steps_per_generation", "max_redraws"}
SAMPLING = ("num_generations", "max_completion_length", "temperature", "top_p", "top_k", "min_p")
TRL_NAMES = [*(name for name in dataclasses.asdict(PolicyArgs()) if name not in OWN_NAMES), *SAMPLING]


class Case(NamedTuple):
    """Settings of a trainer of TRL, and its micro-batches."""

    settings: dict[str, Any]
    micro_batches: int = 2
    trainer: str = "grpo"

    @property
    def corrected(self) -> bool:
        return "vllm_importance_sampling_mode" in self.settings

    def policy(self) -> PolicyArgs:
        named = {CORRECTIONS.get(name, name): value for name, value in self.settings.items() if name != "temperature"}
        return PolicyArgs(**named)


STALE = {"num_iterations": 2}
CLIPPED = STALE | {"epsilon": 0.1, "epsilon_high": 0.15}
CASES = {
    "dapo": Case({}),
    "grpo": Case({"loss_type": "grpo"}, 1),
    "bnpo": Case({"loss_type": "bnpo"}),
    "dr_grpo": Case({"loss_type": "dr_grpo", "scale_rewards": "none"}),
    "cispo": Case({"loss_type": "cispo", "epsilon_high": 1.2} | STALE, 1),
    "clipped": Case(CLIPPED, 1),
    "delta": Case(CLIPPED | {"delta": 1.5, "loss_type": "grpo"}),
    "gspo": Case(CLIPPED | {"loss_type": "grpo", "importance_sampling_level": "sequence"}, 1),
    "dapo of sequences": Case(CLIPPED | {"importance_sampling_level": "sequence", "delta": 1.4}),
    "cispo of sequences": Case(
        {"loss_type": "cispo", "epsilon_high": 1.05, "importance_sampling_level": "sequence"} | STALE
    ),
    "kl": Case({"beta": 0.3}, 1),
    "kl of stale replies": Case(CLIPPED | {"beta": 0.3, "scale_rewards": "batch"}, 1),
    "kl of sequences": Case(CLIPPED | {"beta": 0.3, "importance_sampling_level": "sequence"}),
    "kl without correction": Case(STALE | {"beta": 0.3, "use_bias_correction_kl": False, "loss_type": "bnpo"}),
    "cut dapo": Case({"mask_truncated_completions": True}),
    "cut grpo": Case(CLIPPED | {"mask_truncated_completions": True, "loss_type": "grpo", "beta": 0.1}, 1),
    "cut bnpo": Case(STALE | {"mask_truncated_completions": True, "loss_type": "bnpo"}),
    "cut dr_grpo": Case({"mask_truncated_completions": True, "loss_type": "dr_grpo"}),
    "cut sequences": Case(CLIPPED | {"mask_truncated_completions": True, "importance_sampling_level": "sequence"}, 1),
    "temperature": Case(STALE | {"temperature": 0.7, "beta": 0.2}),
    "token_truncate": Case(
        STALE | {"vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_max": 1.1}, 1
    ),
    "sequence_mask": Case(
        STALE
        | {"vllm_importance_sampling_mode": "sequence_mask", "vllm_importance_sampling_clip_max": 1.3, "beta": 0.1}
    ),
}  # fmt: skip
RLOO = Case({"beta": 0.0, "temperature": 0.8, "reward_weights": WEIGHTS, "max_completion_length": LONGEST}, 1, "rloo")
# Prompts of micro-batches and rows, of packs, and with gaps for eight devices.
FORMS = {
    "padded": [[[0], [1]], [[2], [3]]],
    "packed": [[[1, 0]], [[3, 2]]],
    "one micro-batch": [[[0], [1], [2], [3]]],
    "mesh": [[[2], [3], [0], [1], [-1], [-1], [-1], [-1]]],
}
STEPS = [("gspo", "mesh"), ("kl of stale replies", "packed")]  # in CI


@functools.cache
def float32_parts(folder: Path) -> ModelParts:
    source = open_model(folder)
    model = load_model(source, model_config(source.config), WeightFormat(quant_type=None, dtype="float32")).model
    attach_method(model, LORA, jax.random.key(0))
    return partition(model)


def random_lora(parts: ModelParts, seed: int, near: Lora | None = None) -> Lora:
    rng = np.random.default_rng(seed)
    drawn = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.15, leaf.shape), leaf.dtype), parts.lora)
    return drawn if near is None else jax.tree.map(lambda own, other: other + 0.3 * own, drawn, near)


def _in_peft_format(folder: Path, lora: Lora):
    features = model_config(open_model(folder).config)
    named_leaves = {features.hugging_face_name(name): jax.tree.map(np.asarray, leaves) for name, leaves in lora.items()}
    return in_peft_format(named_leaves, LORA, features, str(folder))


def write_start(folder: Path, base: Path, lora: Lora) -> str:
    config, tensors = _in_peft_format(base, lora)
    folder.mkdir()
    write_adapter(folder, tensors, config)
    return str(folder)


def _config(policy: PolicyArgs, temperature: float) -> Config:
    rollouts = RolloutArgs(num_generations=REPLY_COUNT, max_completion_length=LONGEST, temperature=temperature)
    data = DataArgs(train="t")
    return Config(model=ModelArgs(path="m"), data=data, output="o", objective="grpo", policy=policy, rollouts=rollouts)


def _objective(case: Case) -> PolicyGradient:
    made = make_objective(_config(case.policy(), case.settings.get("temperature", 1.0)))
    assert isinstance(made, PolicyGradient)
    return made


def _is_trained(policy: PolicyArgs) -> np.ndarray:
    """True for each reply [P, G] that trains."""
    ended = np.array([[reply[-1] == EOS for reply in group] for group in REPLIES])
    return ended if policy.mask_truncated_completions else np.ones_like(ended)


def _sampler(old: Sequence[Sequence[Sequence[float]]]) -> list[list[list[float]]]:
    """log p of a sampler that rounds otherwise."""
    rng = np.random.default_rng(4)
    return [[(np.array(one) + rng.normal(0, 0.15, len(one))).tolist() for one in group] for group in old]


def _arrays(
    case: Case, form: str, logps: dict[str, list[list[list[float]]]], advantages: np.ndarray
) -> dict[str, np.ndarray]:
    """The batch of all prompts in a form of FORMS."""
    policy, objective = case.policy(), _objective(case)
    trained, chosen = _is_trained(policy), FORMS["padded" if form == "packed" else form]
    lengths = np.array([[len(reply) for reply in group] for group in REPLIES]) * trained
    indices = np.array(chosen).reshape(len(chosen), -1)  # [A, prompts]
    is_reply = np.repeat(indices >= 0, REPLY_COUNT, axis=1)
    placed = np.where(is_reply, lengths[indices].reshape(is_reply.shape), 0)
    of_form = token_scale(policy.loss_type, placed[None], is_reply[None], max_completion_length=LONGEST)[0]
    scale = np.zeros(lengths.shape)
    for micro, own in zip(indices, of_form, strict=True):
        there = micro >= 0
        scale[micro[there]] = own.reshape(-1, REPLY_COUNT)[there]
    return policy_arrays(
        PROMPTS,
        REPLIES,
        FORMS[form],
        advantages=advantages.reshape(-1, REPLY_COUNT),
        token_scale=scale,
        trained=trained,
        of_tokens={name: logps[name] for name in objective.token_values},
        length=64 if form != "packed" else 128,
        packed=form == "packed",
    )


def _logps(parts: ModelParts, temperature: float) -> list[list[list[float]]]:
    """log p of each reply's tokens."""
    whole = np.ones((len(PROMPTS), REPLY_COUNT))
    values = {"advantages": whole, "token_scale": whole, "of_tokens": {}}
    arrays = policy_arrays(PROMPTS, REPLIES, FORMS["one micro-batch"], trained=whole > 0, **values)  # pyright: ignore
    objective = PolicyGradient(sequences_per_row=REPLY_COUNT, temperature=temperature)
    one = {name: array[0] for name, array in arrays.items() if name not in objective.values}
    found = evaluation_outputs(parts, one, objective=objective)
    logps, sequences = np.asarray(found.logps_BT, np.float64), one["sequences"]
    return [[logps[row, sequences[row] == at].tolist() for at in range(REPLY_COUNT)] for row in range(len(PROMPTS))]


def _stored(base: Path, temperature: float) -> dict[str, list[list[list[float]]]]:
    parts = float32_parts(base)
    of_old = _logps(parts.with_lora(random_lora(parts, 1)), temperature)
    reference = _logps(parts, temperature)  # B is 0 at the start
    return {
        "old_logps": of_old,
        "reference_logps": reference,
        "sampler_logps": _sampler(_logps(parts.with_lora(random_lora(parts, 1)), 1.0)),
    }


def _advantages(policy: PolicyArgs) -> np.ndarray:
    rewards = np.array(REWARDS, np.float64)
    weights = np.array(WEIGHTS)
    settings = {"num_generations": REPLY_COUNT, "scale_rewards": policy.scale_rewards, "weights_F": weights}
    return group_advantages(rewards, **settings).advantages_N


def check_gradients(
    grads: Lora, found: dict[str, np.ndarray], name: str, base: Path, where: str, factor: float = 1.0
) -> None:
    ours = _in_peft_format(base, grads)[1]
    theirs = {key.partition("/grad/")[2]: value for key, value in found.items() if key.startswith(f"{name}/grad/")}
    theirs = {key: value * factor for key, value in theirs.items() if ".ref." not in key}
    assert ours.keys() == theirs.keys()
    largest = max(np.abs(value).max() for value in theirs.values())
    assert largest > 1e-5, where
    for key, value in theirs.items():
        np.testing.assert_allclose(ours[key], value, atol=TOLERANCE * largest, err_msg=f"{where}: {key}")


def _policy_parts(base: Path) -> ModelParts:
    parts = float32_parts(base)
    return parts.with_lora(random_lora(parts, 2, near=random_lora(parts, 1)))


def _by_step(parts: ModelParts, arrays: dict[str, np.ndarray], objective: PolicyGradient, form: str):
    """Returns the gradients and the loss of the compiled step."""
    if form != "mesh":
        return gradients(parts, arrays, None, remat="names", objective=objective)
    mesh = make_mesh(2, 4)
    spread = jax.device_put(arrays, named(mesh, P(None, ROWS)))
    return gradients(place_parts(parts, mesh), spread, None, remat="names", objective=objective, mesh=mesh)


@functools.partial(jax.jit, static_argnames="temperature")
def _scores(parts: ModelParts, micro: dict[str, jax.Array], temperature: float) -> PolicyOutputs:
    return row_outputs(PolicyGradient(temperature=temperature), combine(parts), micro, remat="none", keys_B=None)


@functools.partial(jax.jit, static_argnames="temperature")
def _pulled_back(parts: ModelParts, micro: dict[str, jax.Array], d_logps_BT: jax.Array, temperature: float) -> Lora:
    def logps(lora: Lora) -> jax.Array:
        return _scores(parts.with_lora(lora), micro, temperature).logps_BT

    return jax.vjp(logps, parts.lora)[1](d_logps_BT)[0]


def _by_parts(parts: ModelParts, arrays: dict[str, np.ndarray], objective: PolicyGradient) -> tuple[Lora, float]:
    """Returns gradients and loss by the chain rule, so that all losses share one compiled model."""
    total, grads = 0.0, jax.tree.map(jnp.zeros_like, parts.lora)
    for index in range(len(arrays["inputs"])):
        micro = {name: jnp.asarray(array[index]) for name, array in arrays.items()}
        read = read_by_outputs(micro, objective)
        outputs = _scores(parts, read, objective.temperature)

        def loss(logps_BT: jax.Array, micro=micro, outputs=outputs) -> jax.Array:
            losses_B = objective.row_losses(dataclasses.replace(outputs, logps_BT=logps_BT), micro, {})
            return jnp.sum(losses_B) / objective.count({"present": jnp.asarray(arrays["present"])})

        value, d_logps_BT = jax.value_and_grad(loss)(outputs.logps_BT)
        own = _pulled_back(parts, read, d_logps_BT, objective.temperature)
        total, grads = total + float(value), jax.tree.map(jnp.add, grads, own)
    return grads, total


def _check(name: str, base: Path, found: dict[str, np.ndarray], grads: Lora, loss: float, where: str) -> None:
    np.testing.assert_allclose(loss, found[f"{name}/loss"], rtol=TOLERANCE, atol=1e-6, err_msg=where)
    check_gradients(grads, found, name, base, where)


@pytest.fixture(scope="module")
def trl(tmp_path_factory: pytest.TempPathFactory, oracle) -> tuple[Path, dict[str, np.ndarray]]:
    """The base model, and TRL's results of all cases."""
    config, folder = tiny_config(), tmp_path_factory.mktemp("policies")
    base = write_folder(folder / "base", config, random_weights(config), 1, **{"tokenizer.json": tokenizer_json()})
    parts = float32_parts(base)
    old = random_lora(parts, 1)
    whole = {"reward_weights": WEIGHTS, "max_completion_length": LONGEST}
    cases = {
        name: [
            case.trainer,
            case.settings | whole | {"gradient_accumulation_steps": case.micro_batches},
            case.corrected,
        ]
        for name, case in (CASES | {"rloo": RLOO}).items()
    }
    found = oracle(
        SCRIPT,
        base=str(base),
        tokenizer=str(base / "tokenizer.json"),
        start=write_start(folder / "start", base, parts.lora),
        old=write_start(folder / "old", base, old),
        policy=write_start(folder / "policy", base, random_lora(parts, 2, near=old)),
        prompts=PROMPTS,
        replies=REPLIES,
        rewards=REWARDS,
        sampler=[one for group in _stored(base, 1.0)["sampler_logps"] for one in group],
        cases=cases,
        names=TRL_NAMES,
    )
    return base, found


def test_defaults_are_those_of_trl(trl: tuple[Path, dict[str, np.ndarray]]):
    expected = json.loads(str(trl[1]["defaults"]))
    assert {name: OURS[name] for name in expected} == expected | {"min_p": 0.0}  # null, which means the same


@pytest.mark.parametrize("name", CASES)
def test_losses_and_advantages_equal_trl(name: str, trl: tuple[Path, dict[str, np.ndarray]]):
    base, found = trl
    policy, objective = CASES[name].policy(), _objective(CASES[name])
    advantages = _advantages(policy)
    # Where rewards are equal, TRL's advantages are rounding errors of f32 divided by 1e-4.
    np.testing.assert_allclose(advantages, found[f"{name}/advantages"], rtol=1e-5, atol=1e-3)
    form = "packed" if CASES[name].micro_batches == 2 else "one micro-batch"
    arrays = _arrays(CASES[name], form, _stored(base, objective.temperature), found[f"{name}/advantages"])
    _check(name, base, found, *_by_parts(_policy_parts(base), arrays, objective), name)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.micro_batches == 1])
def test_metrics_equal_trl(name: str, trl: tuple[Path, dict[str, np.ndarray]]):
    base, found = trl
    objective = _objective(CASES[name])
    arrays = _arrays(CASES[name], "one micro-batch", _stored(base, objective.temperature), found[f"{name}/advantages"])
    micro = {key: jnp.asarray(array[0]) for key, array in read_by_outputs(arrays, objective).items()}
    outputs = jax.tree.map(lambda leaf: leaf[None], _scores(_policy_parts(base), micro, objective.temperature))
    ours = step_metrics(objective, outputs, arrays)
    theirs = {key.replace("/", "_"): value for key, value in json.loads(str(found[f"{name}/metrics"])).items()}
    assert ours.keys() - theirs.keys() == {"sampling_logp_difference_mean", "sampling_logp_difference_max"}
    for key, value in theirs.items():
        np.testing.assert_allclose(ours[key], value, rtol=TOLERANCE, atol=2e-6, err_msg=f"{name}: {key}")
    if "num_iterations" not in CASES[name].settings:
        assert ours["clip_ratio_region_mean"] == 0
    elif "loss_type" not in CASES[name].settings:
        assert min(ours["clip_ratio_low_mean"], ours["clip_ratio_high_mean"]) > 0.02


@pytest.mark.parametrize(
    ("name", "form"),
    [
        *STEPS,
        *[
            pytest.param(name, form, marks=EXHAUSTIVE)
            for name, case in CASES.items()
            for form in FORMS
            if (name, form) not in STEPS
            and (case.policy().loss_type != "bnpo" or len(FORMS[form]) == case.micro_batches)
        ],
    ],
)
def test_steps_equal_trl(name: str, form: str, trl: tuple[Path, dict[str, np.ndarray]]):
    base, found = trl
    objective = _objective(CASES[name])
    arrays = _arrays(CASES[name], form, _stored(base, objective.temperature), found[f"{name}/advantages"])
    grads, loss = _by_step(_policy_parts(base), arrays, objective, form)
    _check(name, base, found, grads, float(loss.total / loss.count), f"{name}, {form}")


def test_rloo_is_dr_grpo_without_deviations(trl: tuple[Path, dict[str, np.ndarray]]):
    """The gradient is RLOO's times (G - 1) / (G L), as config/policy.py says."""
    base, found = trl
    case = Case({"loss_type": "dr_grpo", "scale_rewards": "none", "temperature": RLOO.settings["temperature"]})
    settings = {"num_generations": REPLY_COUNT, "scale_rewards": "none", "weights_F": np.array(WEIGHTS)}
    advantages = group_advantages(np.nan_to_num(REWARDS), **settings).advantages_N
    share = (REPLY_COUNT - 1) / REPLY_COUNT
    np.testing.assert_allclose(advantages, share * found["rloo/advantages"], rtol=1e-6, atol=1e-6)
    objective = _objective(case)
    arrays = _arrays(case, "packed", _stored(base, objective.temperature), advantages)
    grads, _ = _by_parts(_policy_parts(base), arrays, objective)
    check_gradients(grads, found, "rloo", base, "rloo", share / LONGEST)
