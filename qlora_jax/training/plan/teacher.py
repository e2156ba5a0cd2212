"""The memory of a teacher in the plan of `qlora-jax plan`: before any weight is read."""

import dataclasses

from qlora_jax.config import Config, ConfigError
from qlora_jax.config.distillation import distillation_problems, is_endpoint
from qlora_jax.config.objectives import OBJECTIVES
from qlora_jax.io.pretrained import is_finetuned, open_finetuned
from qlora_jax.models.decoder import bytes_of
from qlora_jax.training.plan.records import PlannedTeacher
from qlora_jax.training.plan.target import PlanTarget, model_features, planned_weights
from qlora_jax.training.teacher.sources import teacher_args


def plan_teacher(config: Config, target: PlanTarget) -> PlannedTeacher | None:
    """Returns the teacher of a run before any file is opened; None for an objective without one.

    Raises:
      ValueError: the teacher is not a model, or is missing; or its settings contradict each other.
    """
    declared, teacher = OBJECTIVES[config.objective], config.distillation.teacher
    if not declared.distillation:
        return None
    if problems := distillation_problems(config.distillation, config.objective):
        raise ConfigError(problems)
    stays = declared.rows == "prompt"
    if is_endpoint(teacher):
        return PlannedTeacher(0, stays)
    args = teacher_args(config)
    if teacher is not None and is_finetuned(teacher):
        args = dataclasses.replace(open_finetuned(teacher).args, compute_dtype=config.model.compute_dtype)
    features = model_features(args.path)
    return PlannedTeacher(bytes_of(features, planned_weights(args, features, *target.device)), stays)
