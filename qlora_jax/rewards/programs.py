"""A ready-made reward: the program in the reply passes its tests, in the sandbox of programs."""

from collections.abc import Sequence

from qlora_jax.rewards.answers import Completion, text_of
from qlora_jax.sandbox.programs import Limits, Program, source_of_chat, source_of_continuation
from qlora_jax.sandbox.runner import run_programs


def programs(
    prompts: Sequence[Completion],
    completions: Sequence[Completion],
    test: Sequence[str],
    entry_point: Sequence[str],
    setup: Sequence[str] | None = None,
    **columns: object,
) -> list[float]:
    """1 if `check(entry_point)` of the column `test` passes, as in HumanEval.

    A plain prompt is the program's beginning. In a chat the reply has the whole function, after the column `setup`.
    """
    found = []
    rows = zip(prompts, completions, test, entry_point, setup or [""] * len(prompts), strict=True)
    for prompt, completion, check, name, before in rows:
        if isinstance(prompt, str):
            before, source = prompt, source_of_continuation(prompt, text_of(completion))
        else:
            source = source_of_chat(before, text_of(completion), name)
        found.append(Program(source=source, entry_point=name, setup=before, test=check))
    return [float(outcome.passed) for outcome in run_programs(found, Limits())]
