"""A small compiled program, a trace of it, and a step whose arithmetic is counted."""

from qlora_jax.config import LoraArgs
from qlora_jax.models.config import WeightFormat
from qlora_jax.models.families import model_config
from qlora_jax.training.cost.step_shape import StepShape
from scripts.bench.profile.parts import Event
from tests.io.tiny_models import tiny_config

HLO = """HloModule jit_gradients, entry_computation_layout={(f32[4]{0})->f32[4]{0}}

%body.1 (arg.2: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %arg.2 = (s32[], bf16[4,8]{1,0}) parameter(0)
  %ynn_fusion.3 = bf16[4,8]{1,0} fusion(%arg.2), metadata={op_name="jit(gradients)/while/body/jvp()/frozen/dot_general"}
  %add_convert_fusion.4 = bf16[4,8]{1,0} fusion(%ynn_fusion.3), kind=kLoop, metadata={stack_frame_id=10}
  ROOT %tuple.5 = (s32[], bf16[4,8]{1,0}) tuple(%arg.2, %add_convert_fusion.4)
}

ENTRY %main.9 (x: f32[4]) -> f32[4] {
  %while.7 = (s32[], bf16[4,8]{1,0}) while(%x), body=%body.1, metadata={op_name="jit(gradients)/transpose(jvp())/while"}
  ROOT %copy.8 = f32[4]{0} copy(%x)
}
"""


def step_of(scale):
    """Returns events: a loop over an overlapping product and addition, the update, and an event of another program."""
    events = [
        ("gradients", "while.7", 0, 100),
        ("gradients", "ynn_fusion.3", 0, 40),
        ("gradients", "add_convert_fusion.4", 20, 40),
        ("gradients", "ynn_fusion.3", 60, 100),
        ("optimizer", "copy.8", 100, 110),
        ("", "copy.8", 0, 1000),
    ]
    return [Event(program, name, start * scale, end * scale) for program, name, start, end in events]


def counted(remat="names"):
    lora = LoraArgs(rank=4, target_modules=["q_proj", "down_proj"])
    weights = WeightFormat(platform="cpu")
    return StepShape(model=model_config(tiny_config()), weights=weights, lora=lora, batch=(1, 2, 16), remat=remat)
