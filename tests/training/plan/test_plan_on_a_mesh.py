"""Plans for several cards: one card's share, more cards as a change, and the choice of mesh.fsdp=auto."""

import json

import pytest

from pallas_kernels import aot
from pallas_kernels.aot.overlap import hidden_share, read_gathers
from qlora_jax import plan as command
from qlora_jax.config import ConfigError, LoraArgs, OptimArgs
from qlora_jax.config.parse import from_dict
from qlora_jax.models.catalog import PUBLISHED
from qlora_jax.models.config import WeightFormat
from qlora_jax.models.families import model_config
from qlora_jax.sharding import absent_mesh
from qlora_jax.training.cost import communication, memory_use
from qlora_jax.training.cost.memory_use import activation_bytes
from qlora_jax.training.plan import run_plan
from qlora_jax.training.plan.fit_search import first_fitting, fits, make_plan
from qlora_jax.training.plan.run_plan import larger_meshes, planned_rows, step_configs, usable_meshes
from qlora_jax.training.plan.settings import PlanArgs
from qlora_jax.training.plan.step_memory import (
    Temporaries,
    estimated_requirements,
)
from qlora_jax.training.plan.target import plan_target
from qlora_jax.training.plan.text import as_json, verdict
from qlora_jax.training.step_spec import StepSpec
from tests.io.tiny_models import tiny_config
from tests.marks import EXHAUSTIVE
from tests.training.cost.test_communication import check_exchanges
from tests.training.mesh_models import CUT_VOCABULARY, mesh_config

GIB = 2**30
needs_compiler = pytest.mark.skipif(aot.problem() is not None, reason=str(aot.problem()))


def real(name: str, sizes, rows: int = 1, length: int = 2048, remat: str = "full", **changes) -> StepSpec:
    """A step with `rows` per card; everything that can be is cut, and nothing is paged."""
    settings = dict(weights=WeightFormat(platform="gpu"), lora=LoraArgs(rank=16), optim=OptimArgs(), remat=remat)
    batch = (1, rows * sizes[0] * sizes[1], length)
    model = model_config(PUBLISHED[name])
    mesh = None if sizes == (1, 1) else absent_mesh(*sizes)
    return StepSpec(model=model, batch=batch, mesh=mesh, **settings | changes)


def pretend(config: StepSpec):
    """Pretends to compile: the saved activations and one GiB."""

    def compile_step(step: StepSpec) -> Temporaries:
        changed = config.replace(batch=step.batch, remat=step.remat, mesh=step.mesh)
        return Temporaries(gradients=GIB + sum(activation_bytes(changed.sizes).values()), update=0)

    return compile_step


def test_more_cards_are_proposed_where_no_setting_helps():
    asked = real("llama-3-70b", (1, 1))
    plan = make_plan(asked, 22 * GIB, pretend(asked), larger=[absent_mesh(1, n) for n in (2, 4, 8)])
    assert not plan.fits and plan.change is None
    change = plan.more_devices
    assert change.options == {"mesh.fsdp": 4, "train.micro_batch_size": 4, "train.accumulation": 1}
    assert change.requirements.source == "compiled" and change.requirements.total <= plan.limit
    lines = "\n".join(verdict(plan))
    assert "fits on more devices: 4 devices: --mesh.fsdp 4 --train.micro_batch_size 4" in lines
    assert "no single setting" not in lines
    assert as_json(plan)["more_devices"]["need"]["mesh"] == {"data": 1, "fsdp": 4}


def test_more_cards_keep_the_rows_of_an_optimizer_step():
    asked = real("llama-3-8b", (1, 1)).replace(batch=(16, 1, 2048), remat="none")
    plan = make_plan(asked, 12 * GIB, pretend(asked), larger=[absent_mesh(1, 4)])
    assert plan.more_devices.options == {
        "mesh.fsdp": 4,
        "train.remat": "names",
        "train.micro_batch_size": 4,
        "train.accumulation": 4,
    }


def test_a_plan_on_a_mesh_says_what_crosses():
    asked = real("llama-3-8b", (1, 2))
    plan = make_plan(asked, 100 * GIB, pretend(asked))
    (line,) = [line for line in verdict(plan) if "receives" in line]
    weights = communication.exchanges(plan.requested.config.sizes)["weights"].received
    assert line.startswith("each device receives") and "weights" in line
    assert plan.requested.received["weights"] == weights == as_json(plan)["asked"]["received"]["weights"]
    assert plan.largest.config.batch[1] % 2 == 0


def test_auto_takes_the_fewest_devices_that_fit_and_compiles_only_if_the_estimate_leaves_it_open():
    settings = [real("llama-3-70b", (1, n)).replace(batch=(1, 8, 2048)) for n in (1, 2, 4, 8)]
    needs = [estimated_requirements(setting) for setting in settings]
    assert [need.total for need in needs] == sorted((need.total for need in needs), reverse=True)
    asked = []

    def compiler(step):
        asked.append(step.mesh)
        return Temporaries(gradients=10**12, update=0)

    def chosen(limit: int, compile_step) -> int:
        step = first_fitting(settings, lambda _: limit, lambda step: fits(step, limit, compile_step))
        return settings.index(step)

    limit = needs[1].total + 1
    assert chosen(limit, None) == 1
    assert chosen(limit, compiler) == 2 and asked == [settings[1].mesh]
    assert chosen(1, compiler) == 3 and len(asked) == 1
    assert chosen(10 * needs[0].total, compiler) == 0 and len(asked) == 1


def test_each_mesh_has_its_own_limit_and_the_last_is_not_tried():
    """The devices of a CPU share the machine's memory."""
    settings = [real("llama-3-70b", (1, n)).replace(batch=(1, 8, 2048)) for n in (1, 2, 4)]
    machine = 2 * estimated_requirements(settings[0]).total
    tried = []
    shared = first_fitting(settings, lambda step: machine // 64 // step.devices, lambda step: tried.append(step))
    assert shared is settings[2] and not tried
    chosen = first_fitting(settings, lambda step: machine // step.devices, lambda step: tried.append(step) or True)
    assert chosen is settings[0] and tried == [settings[0]]


def plan_of(folder, capsys, *given: str) -> dict:
    (folder / "config.json").write_text(json.dumps(tiny_config()))
    command.main(["--model", str(folder), "--data.max_length", "64", "--lora.rank", "16", "--json", *given])
    return json.loads(capsys.readouterr().out)


def test_the_command_plans_one_devices_share(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run_plan, "compiler_for", lambda target: (None, None))
    given = ["--card", "cpu", "--train.micro_batch_size", "4"]
    one, two = (plan_of(tmp_path, capsys, *given, *mesh) for mesh in ([], ["--mesh.fsdp", "2"]))
    assert "mesh" not in one["asked"] and two["asked"]["mesh"] == {"data": 1, "fsdp": 2}
    assert two["asked"]["device"]["constants"] < one["asked"]["device"]["constants"]
    assert two["asked"]["received"]["weights"] > 0 and two["more_devices"] is None
    assert two["limit"] == one["limit"] // 2  # CPU devices share the machine's memory


def test_rows_that_the_cards_cannot_share_are_refused(tmp_path, capsys):
    with pytest.raises(ConfigError, match=r"train\.micro_batch_size: found 3, expected a multiple of 8"):
        plan_of(tmp_path, capsys, "--card", "h100", "--mesh.fsdp", "8", "--train.micro_batch_size", "3")


def test_meshes_that_cut_no_weight_are_refused_with_values_that_do(tmp_path, capsys):
    seventh, half = (real("smollm2-135m", (2, n)) for n in (7, 2))
    assert usable_meshes([seventh, half]) == [half]
    with pytest.raises(ConfigError, match=r"found 7, .* of 2, 3, 4, 6, 8, 12, 16, or mesh\.fsdp=1 and mesh\.data=14 "):
        usable_meshes([seventh])
    with pytest.raises(ConfigError, match=r"mesh\.fsdp: found 7, .*or mesh\.fsdp=1 and mesh\.data=7 "):
        plan_of(tmp_path, capsys, "--card", "h100", "--mesh.fsdp", "7", "--train.micro_batch_size", "7")


def test_meshes_that_cut_some_weights_alone_are_refused_with_the_widths_of_the_others(tmp_path, capsys):
    """6 divides the 128,256 rows of the tables of Llama-3-8B, and none of its widths; with other problems, at once."""
    sixth, eighth = (real("llama-3-8b", (1, n)) for n in (6, 8))
    assert usable_meshes([sixth, eighth]) == [eighth]
    widths = r"q_proj \(4,096 x 4,096\), k_proj \(1,024 x 4,096\), .*gate_proj \(14,336 x 4,096\)"
    with pytest.raises(ConfigError, match=rf"found 6, which does not divide {widths}.* one of 2, 4, 8, 16, or "):
        usable_meshes([sixth])
    with pytest.raises(ConfigError) as error:
        plan_of(tmp_path, capsys, "--card", "h100", "--mesh.fsdp", "3", "--train.micro_batch_size", "4")
    keys = [problem.partition(":")[0] for problem in error.value.problems]
    assert keys == ["train.micro_batch_size", "mesh.fsdp"]


def test_auto_may_use_as_many_cards_as_there_are():
    args = from_dict(PlanArgs, {"model": {"path": "llama-3-8b"}, "cards": 8, "train": {"micro_batch_size": 4}})
    target = plan_target("h100", None)
    configs = step_configs(args, target, planned_rows(args)[0])
    assert [config.devices for config in configs] == [1, 2, 4]
    assert [mesh.size for mesh in larger_meshes(configs[1], target)] == [4, 8]


# Compiled for cards


def check_compiled(config: StepSpec, card: str) -> tuple[float, list[float]]:
    """The compiled gradients take and exchange the formulas' bytes; returns GiB per card, and hidden shares.

    The GiB have the optimizer's state. The shares are those of gathers behind products, forward and backward, in %.
    """
    step, counted = config, config.sizes
    program = step.gradients()
    compiled = aot.compile_for(
        card, program.function, *program.args, **program.kwargs, compiler_options=step.compiler_options
    )
    assert compiled.memory.device.arguments == memory_use.argument_bytes(counted)
    check_exchanges(config, compiled.text)
    shares = [hidden_share(read_gathers(compiled.text), backward=backward).percent for backward in (False, True)]
    return (compiled.memory.device.total + memory_use.optimizer_bytes(counted)) / GIB, shares


@needs_compiler
@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_small_step_is_compiled_for_two_cards():
    small = real("smollm2-135m", (1, 2), length=256).replace(model=model_config(mesh_config(CUT_VOCABULARY)))
    check_compiled(small, "h100")
    update, counted = small.update(), small.sizes
    memory = aot.compile_for("h100", update.function, *update.args, **update.kwargs).memory.device
    lora, state = memory_use.lora_bytes(counted), memory_use.optimizer_bytes(counted)
    assert memory.arguments == 2 * lora + state and memory.aliases == lora + state


@needs_compiler
@pytest.mark.parametrize(
    ("name", "card", "sizes", "length", "remat", "most", "hidden"),
    [
        pytest.param(*case, marks=EXHAUSTIVE)
        for case in [
            ("llama-3-8b", "h100", (1, 8), 2048, "full", 4.0, 90),
            ("llama-3-8b", "h100", (2, 4), 2048, "full", 5.0, 90),
            ("llama-3-8b", "l40s", (1, 8), 2048, "full", 4.0, 90),
            ("llama-3-8b", "rtx4090", (1, 2), 2048, "full", 6.0, 90),
            # XLA starts fewer gathers ahead, the less memory is free: none here
            ("llama-2-70b", "rtx4090", (1, 2), 2048, "full", 22.4, 0),
            ("llama-2-70b", "rtx3090", (1, 2), 2048, "full", 22.4, 0),
            ("llama-3.1-405b", "h100", (1, 4), 2048, "full", 66.0, 89),
            ("llama-3.1-405b", "h100", (1, 8), 2048, "full", 40.0, 89),
            ("llama-3.1-405b", "l40s", (1, 8), 2048, "full", 40.0, 18),
        ]
    ],
)
def test_large_models_keep_promises_of_memory_and_of_hidden_gathers(name, card, sizes, length, remat, most, hidden):
    used, shares = check_compiled(real(name, sizes, length=length, remat=remat), card)
    assert used <= most and min(shares) >= hidden, (used, shares)
