"""TRL's reward functions give the same through our processes as by a direct call; ours equal theirs."""

import importlib.util
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from qlora_jax.config.rewards import RewardArgs
from qlora_jax.rewards.functions import Replies, RewardFunctions
from tests.rewards.test_functions import FILE as PERSONS
from tests.rewards.test_functions import replies as functions_replies

ROOT = Path(__file__).resolve().parents[2]
ORACLE = os.environ.get("QLORA_ORACLE_PYTHON", ".oracle/bin/python")
CONTENTS = [
    r"<think>because</think> It is \boxed{\frac{1}{2}}",
    r"<think>a<think>b</think> so \boxed{0.5}",
    r"so it is $$\frac{2}{4}$$.",
    r"\boxed{7 \text{ cm}} and later \boxed{8}",
    "no formula",
    "one one one two two two one one one two",
    "<think>x</think>",
]
ANSWERS = [r"\frac{1}{2}", "$0.5$", r"$\frac{1}{2}$", r"$7$", "$3$", "not a formula at all", r"$\{1, 2\}$"]
IDS = [[*range(5 * row)] + [1, 2] * row for row in range(len(CONTENTS))]
# The direct calls of TRL, in the environment that has it.
DIRECT = """
import json, sys
from trl.rewards import get_repetition_penalty_reward, get_soft_overlong_punishment, think_format_reward
completions, ids = json.load(sys.stdin)
print(json.dumps([
    think_format_reward(completions=completions),
    get_repetition_penalty_reward(2, -1.0)(completion_ids=ids),
    get_soft_overlong_punishment(30, 12)(completion_ids=ids),
]))
"""
# The files of TRL's functions, without the rest of TRL, which requires torch.
FILE = """
import importlib.util, sys, types

def _load(name):
    spec = importlib.util.spec_from_file_location(f"trl.rewards.{name}", f"FOLDER/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

for name in ("trl", "trl.rewards"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = []
sys.modules["trl.import_utils"] = types.SimpleNamespace(is_math_verify_available=lambda: True)
think_format_reward = _load("format_rewards").think_format_reward
repetition = _load("other_rewards").get_repetition_penalty_reward(2, -1.0)
overlong = _load("other_rewards").get_soft_overlong_punishment(30, 12)
"""
MATH = "accuracy_reward = _load('accuracy_rewards').accuracy_reward\n"


def replies() -> Replies:
    completions = [[{"role": "assistant", "content": text}] for text in CONTENTS]
    return Replies(
        prompts=[[{"role": "user", "content": "?"}]] * len(CONTENTS),
        completions=completions,
        completion_ids=IDS,
        columns={"solution": ANSWERS, "answer": ANSWERS},
        labels=["p.jsonl:1"] * len(CONTENTS),
    )


@pytest.fixture
def file(tmp_path) -> str:
    if not Path(ORACLE).exists():
        pytest.skip("the oracle is missing: bash scripts/setup_oracle.sh")
    folder = next(Path(ORACLE).parents[1].glob("lib/python3*/site-packages/trl/rewards"))
    path = tmp_path / "trl_rewards.py"
    path.write_text(FILE.replace("FOLDER", str(folder)))
    return str(path)


def test_functions_of_trl_give_its_values(file):
    given = replies()
    direct = subprocess.run(
        [ORACLE, "-c", DIRECT],
        input=json.dumps([given.completions, given.completion_ids]),
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": ""},
    )
    names = ("think_format_reward", "repetition", "overlong")
    args = RewardArgs(functions=["length"], max_completion_len=30, soft_punish_cache=12)
    with RewardFunctions(args, [f"{file}:{name}" for name in names]) as functions:
        table = functions.score(given)
    expected = np.array(json.loads(direct.stdout)).T
    assert len(np.unique(expected[:, 0])) == 2 and len(np.unique(expected[:, 2])) > 2
    np.testing.assert_array_equal(table.rewards_NF[:, 1:], expected)
    np.testing.assert_array_equal(table.rewards_NF[:, 0], expected[:, 2])


@pytest.mark.slow  # sympy takes seconds to import
def test_math_equals_trl(file):
    if importlib.util.find_spec("math_verify") is None:
        pytest.skip("math-verify is missing: pip install 'qlora-jax[math]'")
    with open(file, "a") as added:
        added.write(MATH)
    with RewardFunctions(RewardArgs(functions=["math"], workers=1), [f"{file}:accuracy_reward"]) as functions:
        table = functions.score(replies())
    np.testing.assert_array_equal(table.rewards_NF[:, 0], table.rewards_NF[:, 1])
    np.testing.assert_array_equal(table.rewards_NF[:5, 0], [1, 1, 0, 0, 0])


@pytest.mark.slow  # torch takes seconds to import
def test_functions_of_a_person_give_the_values_of_trls_trainer(oracle, tmp_path):
    path, names = tmp_path / "rewards.py", ("length", "some", "later", "summed", "logs", "raises")
    path.write_text(f"{PERSONS}\ndef some(completions, answer, **kwargs): return has_answer(completions, answer)\n")
    given = functions_replies("a", "xyz", "b", "bb", answer=["a", "", "c", "b"])
    arguments = {name: getattr(given, name) for name in ("prompts", "completions", "completion_ids", "columns")}
    expected = oracle(
        ROOT / "tests/oracle/trl_rewards.py",
        file=str(path),
        names=names,
        step=given.step,
        steps=given.steps,
        **arguments,
    )
    with RewardFunctions(RewardArgs(), [f"{path}:{name}" for name in names]) as functions:
        table = functions.score(given)
    assert np.isnan(expected["rewards"]).sum() == 1
    np.testing.assert_array_equal(table.rewards_NF.astype(np.float32), expected["rewards"])
    np.testing.assert_array_equal([*table.metrics.values()], expected["metrics"])
