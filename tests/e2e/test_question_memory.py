"""A plan's memory for questions is that of their largest program; a run whose questions do not fit is rejected."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from pallas_kernels import aot
from qlora_jax.evaluation import loglikelihood
from qlora_jax.evaluation.tasks import letters
from qlora_jax.inference.engine import engine
from qlora_jax.sharding import part_bytes
from qlora_jax.training.plan import run_plan
from qlora_jax.training.run import dry_run
from tests.e2e.project import project
from tests.e2e.test_questions import asking
from tests.e2e.tiny_runs import session_of
from tests.marks import first_always

PROGRAMS = [
    (loglikelihood, "score_tokens"),
    (letters, "_letter_logits"),
    (engine, "advance"),
]


def planned(config) -> str:
    out = io.StringIO()
    dry_run(config, Path(config.output), resume=False, oversized=False, console=Console(file=out, width=250))
    return out.getvalue()


class Watched:
    """A jitted function, and what each call that was made of it takes beside the model: inputs, results, scratch."""

    def __init__(self, function, taken):
        self._function, self._taken = function, taken

    def __call__(self, *args, **kwargs):
        memory = aot.read_memory(self._function.lower(*args, **kwargs).compile().memory_analysis()).device
        inputs = part_bytes(args[1:])
        self._taken.append(inputs + memory.temporaries + memory.outputs - memory.aliases)
        return self._function(*args, **kwargs)


@pytest.mark.parametrize("lora", first_always([{}, {"dtype": "bfloat16"}, {"method": "dora"}]))
def test_the_need_is_the_most_that_any_call_takes(tmp_path, monkeypatch, lora):
    session = session_of(asking(tmp_path, lora=lora))
    abstract = session.run.gradients.parts
    parts = session.parts
    for task in session.run.inputs.questions.tasks:
        programs, taken = list(task.lower(abstract)), []
        with monkeypatch.context() as patch:
            for module, name in PROGRAMS:
                patch.setattr(module, name, Watched(getattr(module, name), taken))
            task.score(parts, lambda done: None, loglikelihood.NO_CACHE)
        made = 0
        if task.name == "answers":  # values computed once for all calls
            cast = engine.prepare_for_decoding(parts)
            kept = {id(leaf) for leaf in _leaves(parts)}
            made = sum(leaf.nbytes for leaf in _leaves(cast) if id(leaf) not in kept)
        most = max(_taken(program) for program in programs)
        assert most == pytest.approx(max(taken) + made, rel=0.02)


def _leaves(parts):
    import jax

    return jax.tree.leaves(parts)


def _taken(program) -> int:
    memory = aot.read_memory(program.lowered.compile().memory_analysis()).device
    return program.live_bytes + memory.temporaries + memory.outputs - memory.aliases


@pytest.mark.slow
def test_a_plan_tells_what_questions_need_and_refuses_what_does_not_fit(tmp_path, monkeypatch):
    config = asking(tmp_path, train=dict(accumulation=1, micro_batch_size=1))
    printed = planned(config)
    assert "questions  " in printed and ", peak in questions." in printed
    asked = run_plan.RunPlan.question_bytes.fget
    seen = []
    watched = property(lambda plan: seen.append(asked(plan)) or seen[-1])
    monkeypatch.setattr(run_plan.RunPlan, "question_bytes", watched)
    planned(config)
    monkeypatch.setattr(run_plan, "device_bytes", lambda memory: (seen[0] - 1, "a small device"))
    with pytest.raises(ValueError, match=r"questions need .* peak in questions\..*Shorten these questions"):
        planned(config)


def test_a_run_without_questions_tells_nothing_of_them(tmp_path):
    assert "questions  " not in planned(project(tmp_path))
