"""Reports of the steps that a plan compiles."""

from qlora_jax.training.plan import step_memory
from qlora_jax.training.plan.step_memory import ReportedCompiler
from tests.training.plan.steps import TINY, Compiler


def test_each_step_is_reported_before_it_is_compiled_and_compiled_once(monkeypatch):
    seconds = iter((0.0, 27.4, 30.0, 31.0))
    monkeypatch.setattr(step_memory.time, "perf_counter", lambda: next(seconds))
    lines, inner = [], Compiler()
    compiler = ReportedCompiler(inner, lines.append, most=3)
    first, second = TINY, TINY.resized(2, 256)
    found = [compiler(step) for step in (first, second, first)]
    assert found[0] == found[2] != found[1] and len(inner.asked) == 2
    assert lines == [
        "compiling a step of 4 x 512 tokens, remat names (program 1 of at most 3; each usually takes 10 to 60 seconds)",
        "compiling a step of 2 x 256 tokens, remat names (program 2 of at most 3; the last took 27 seconds)",
    ]
