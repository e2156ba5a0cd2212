"""Compiling for a plan: says what is compiled and how long it takes, and compiles no step twice."""

import time
from collections.abc import Callable

from qlora_jax.training.plan.requirements import CompileStep, Temporaries
from qlora_jax.training.step_spec import StepSpec

USUAL = "each usually takes 10 to 60 seconds"


class ReportedCompiler:
    """Compiles steps, remembers them, and reports each before it is compiled.

    Args:
      compile_step: compiles a step.
      report: called with a line of text.
      most: the most steps that will be compiled.
    """

    def __init__(self, compile_step: CompileStep, report: Callable[[str], None], most: int):
        self._compile, self._report, self._most = compile_step, report, most
        self._known: list[tuple[StepSpec, Temporaries]] = []
        self._last = USUAL

    def __call__(self, step: StepSpec) -> Temporaries:
        """Returns the temporaries of a compiled step."""
        for known, found in self._known:
            if known is step:
                return found
        rows, length = step.batch[1:]
        number = f"program {len(self._known) + 1} of at most {self._most}"
        self._report(f"compiling a step of {rows} x {length} tokens, remat {step.remat} ({number}; {self._last})")
        began = time.perf_counter()
        found = self._compile(step)
        self._last = f"the last took {time.perf_counter() - began:.0f} seconds"
        self._known.append((step, found))
        return found
