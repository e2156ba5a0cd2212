"""Plans from settings: the planned step is the run's, and the title names its method."""

import pytest

from qlora_jax.config.parse import from_dict
from qlora_jax.training.cost import memory_use
from qlora_jax.training.plan.run_plan import plan_title, planned_rows, step_configs
from qlora_jax.training.plan.settings import PlanArgs
from qlora_jax.training.plan.target import plan_target
from qlora_jax.training.step_spec import StepSpec


def asked_of_an_h100(**settings) -> tuple[StepSpec, str]:
    """The step that settings ask for, and the title of its plan."""
    args, target = from_dict(PlanArgs, {"model": {"path": "smollm2-135m"}, **settings}), plan_target("h100", None)
    (setting,) = step_configs(args, target, planned_rows(args)[0])
    return setting, plan_title(args, target, setting)


def test_the_planned_step_has_the_noise_and_the_segments_of_the_runs():
    plain, _ = asked_of_an_h100(lora={"dropout": 0.0})
    asked, _ = asked_of_an_h100(
        lora={"dropout": 0.0}, train={"neftune_noise_alpha": 5.0}, data={"packing": True, "max_length": 512}
    )
    assert plain.arrays.key is None and "segments" not in plain.batch_arrays()
    step = asked
    assert step.neftune_noise_alpha == 5.0 and step.arrays.key is not None and "segments" in step.batch_arrays()
    assert memory_use.batch_bytes(asked.sizes) == sum(4 * leaf.size for leaf in step.batch_arrays().values())


@pytest.mark.parametrize("max_length", [62, 63, 128])
@pytest.mark.parametrize(("objective", "sequences"), [("dpo", 2), ("kto", 2), ("embedding", 2), ("sft", 1)])
def test_packs_without_data_hold_whole_rows_of_the_longest_texts(objective, sequences, max_length):
    args = {"objective": objective, "data": {"packing": True, "max_length": max_length}}
    config = from_dict(PlanArgs, {"model": {"path": "smollm2-135m"}, **args})
    (setting,) = step_configs(config, plan_target("h100", None), planned_rows(config)[0])
    if objective == "sft":
        assert setting.batch[2] == max_length
        return
    assert 0 <= setting.batch[2] - sequences * max_length < 64 and setting.batch[2] % 64 == 0
    assert setting.batch_arrays()["present"].shape[-1] % sequences == 0


@pytest.mark.parametrize(
    ("lora", "text"),
    [
        ({"rank": 8}, "smollm2-135m, rank 8, "),
        ({"method": "dora", "rank": 8}, "lora.method=dora, rank 8, "),
        ({"method": "lora_fa", "rank": 8}, "lora.method=lora_fa, rank 8, "),
        ({"method": "vera", "rank": 8}, "lora.method=vera, rank 8, "),
        ({"method": "houlsby", "rank": 8}, "lora.method=houlsby, rank 8, "),
        ({"method": "ia3"}, "lora.method=ia3, 1 x "),
    ],
)
def test_a_plans_title_has_the_method_and_its_rank(lora, text):
    _, title = asked_of_an_h100(lora=lora, train={"micro_batch_size": 1})
    assert text in title
