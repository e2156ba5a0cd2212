"""The task `programs`: functions to write, scored by running the replies with tests, like HumanEval."""

import dataclasses
import json
import math
import typing
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Float64, Int64

from qlora_jax.config import QUESTION_KINDS, QuestionArgs
from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.evaluation.task import ProgressCallback, TaskContext
from qlora_jax.evaluation.task_file import check_reply_lengths, read_each, read_task_rows, values_of, wrong_value
from qlora_jax.inference.lowering import LoweredProgram
from qlora_jax.inference.prompts import Prompter, stop_ids
from qlora_jax.inference.replies import lower_replies, sampled_replies
from qlora_jax.inference.result_cache import ResultCache
from qlora_jax.inference.sampling_params import Sampling
from qlora_jax.measures.metrics import Comparison, Metric, RowValues, share, share_change
from qlora_jax.measures.statistics import mean_change_interval, mean_interval
from qlora_jax.models.partition import ModelParts
from qlora_jax.sandbox.programs import Limits, Program, Reason, source_of_chat, source_of_continuation
from qlora_jax.sandbox.runner import run_programs, seal_problem

REASONS: tuple[Reason, ...] = typing.get_args(Reason)
QUESTION = "Complete this function. Reply with the complete function in one block of Python code.\n\n```python\n{}```"
_BATCH = 64  # programs that are run, and whose outcomes are cached, together


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """A function to write.

    Attributes:
      ids: ids of the prompt.
      prompt: the source up to the body of the function.
      entry_point: the function's name.
      test: source of `check(candidate)`.
    """

    ids: Sequence[int]
    prompt: str
    entry_point: str
    test: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramScores:
    """Outcomes of the replies to each problem.

    Fields:
      outcomes: index in REASONS of each reply.
      cut_off: number of programs that ended because of max_new_tokens, or because the model has no position left;
        text after the end of a program does not count.
    """

    outcomes: Int64[np.ndarray, "problems samples"]
    cut_off: int

    def pass_at(self, k: int) -> Float64[np.ndarray, " problems"]:
        """The estimate of pass@k of each problem."""
        passed = (self.outcomes == REASONS.index("passed")).sum(axis=1)
        return np.array([pass_at_k(self.outcomes.shape[1], int(count), k) for count in passed])


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramsTask:
    """Chance that one of k replies passes its tests; see evaluation/task.py for the members.

    Attributes:
      samples: replies to each prompt.
      pass_at: the values of k.
      sealed: False if programs are limited but not sealed (sandbox/runner.py).
    """

    title: str
    problems: Sequence[Problem]
    tokenizer: Tokenizer
    samples: int
    pass_at: Sequence[int]
    sampling: Sampling
    max_new_tokens: int
    stop_ids: Collection[int]
    limits: Limits
    sealed: bool
    name: str = "programs"

    @property
    def size(self) -> int:
        """The number of problems."""
        return len(self.problems)

    @property
    def inputs(self) -> Sequence[Sequence[object]]:
        """Each problem's prompt, function and tests, and the settings of its replies and of their limits."""
        shared = [self.samples, self.sampling, self.max_new_tokens, sorted(self.stop_ids), self.limits, self.sealed]
        return [[[*one.ids], one.prompt, one.entry_point, one.test, *shared] for one in self.problems]

    def score(self, parts: ModelParts, progress: ProgressCallback, cache: ResultCache) -> ProgramScores:
        """Generates one model's replies and runs them with their tests."""
        replies = sampled_replies(
            parts,
            [problem.ids for problem in self.problems],
            samples=self.samples,
            sampling=self.sampling,
            max_new_tokens=self.max_new_tokens,
            stop_ids=self.stop_ids,
            progress=progress,
            cache=cache,
        )
        written = [
            (problem, self.tokenizer.decode(reply.ids), reply.end)
            for problem, of_problem in zip(self.problems, replies, strict=True)
            for reply in of_problem
        ]
        programs = [self._program(problem, text) for problem, text, _ in written]
        outcomes = np.concatenate(
            [self._run(programs[start : start + _BATCH], cache) for start in range(0, len(programs), _BATCH)]
        )
        cut_off = sum(end != "stop" and self._is_unfinished(problem, text) for problem, text, end in written)
        return ProgramScores(outcomes=outcomes.reshape(-1, self.samples), cut_off=cut_off)

    def metrics(self, scores: ProgramScores) -> list[Metric]:
        """pass@k, and the numbers of replies that failed in each way, and that were cut off."""
        failed = {
            "failed: a test is not met": ["wrong"],
            "failed: an error": ["error"],
            "failed: a limit, or ended early": ["time", "memory", "ended"],
        }
        counts = {reason: int((scores.outcomes == index).sum()) for index, reason in enumerate(REASONS)}
        return [
            *(self._pass_at(scores, k) for k in self.pass_at),
            *(Metric(name, "count", sum(counts[one] for one in reasons)) for name, reasons in failed.items()),
            Metric(f"programs cut off ({self.max_new_tokens} tokens)", "count", scores.cut_off),
        ]

    def compare(self, before: ProgramScores, after: ProgramScores) -> list[Comparison]:
        """The changes of pass@k."""
        return [self._pass_at_change(before, after, k) for k in self.pass_at]

    def row_values(self, scores: ProgramScores) -> dict[str, RowValues]:
        """The problems' parts of the measures in `MEASURES`."""
        return {"pass@1": RowValues(scores.pass_at(1), np.ones(len(scores.outcomes)))}

    def lower(self, parts: ModelParts) -> Iterator[LoweredProgram]:
        """Lowers the programs of the largest batch."""
        prompts = [problem.ids for problem in self.problems]
        return lower_replies(parts, prompts, self.max_new_tokens, self.samples)

    def _pass_at(self, scores: ProgramScores, k: int) -> Metric:
        values = scores.pass_at(k)
        if self.samples == 1:
            return share(f"pass@{k}", values == 1)
        return Metric(f"pass@{k}", "share", float(values.mean()), mean_interval(values))

    def _pass_at_change(self, before: ProgramScores, after: ProgramScores, k: int) -> Comparison:
        old, new = before.pass_at(k), after.pass_at(k)
        if self.samples == 1:
            return share_change(f"pass@{k}", old == 1, new == 1)
        return Comparison(f"pass@{k}", "share", float(new.mean() - old.mean()), mean_change_interval(new - old))

    def _program(self, problem: Problem, reply: str) -> Program:
        if self.tokenizer.chat_template is None:
            source = source_of_continuation(problem.prompt, reply)
        else:
            source = source_of_chat(problem.prompt, reply, problem.entry_point)
        return Program(source=source, entry_point=problem.entry_point, setup=problem.prompt, test=problem.test)

    def _is_unfinished(self, problem: Problem, reply: str) -> bool:
        """Returns True if more text after the reply would belong to its program."""
        return self._program(problem, reply) != self._program(problem, f"{reply}more")

    def _run(self, programs: Sequence[Program], cache: ResultCache) -> Int64[np.ndarray, " programs"]:
        def run() -> list[np.ndarray]:
            outcomes = run_programs(programs, self.limits, sealed=self.sealed)
            return [np.array([REASONS.index(outcome.reason) for outcome in outcomes], np.int64)]

        (found,) = cache.get_or_compute(["programs", json.dumps(programs), self.limits, self.sealed], run)
        return found


def build(settings: QuestionArgs, context: TaskContext) -> ProgramsTask:
    """Reads rows with the columns prompt, test and entry_point, as in HumanEval.

    Raises:
      ValueError: this system cannot seal a process, or rows are not problems or are too long; the message lists them.
    """
    path, tokenizer, sealed = settings.programs, context.tokenizer, settings.program_isolation == "sealed"
    assert path is not None
    if sealed:
        _check_can_seal(path)
    prompter = Prompter(tokenizer=tokenizer, chat=tokenizer.chat_template is not None, system=None)
    rows = read_task_rows(path, "programs", settings.file_columns, settings.max_rows)
    problems = read_each(path, rows, lambda row: _read_problem(row.data, prompter))
    ids, samples = [problem.ids for problem in problems], settings.program_samples
    check_reply_lengths(path, rows, ids, settings.max_new_tokens, context.max_positions)
    replies = "greedy replies" if samples == 1 and not settings.program_temperature else f"{samples} replies each"
    return ProgramsTask(
        title=f"{path}: {len(rows)} programs, {replies}{'' if sealed else ', not isolated'}",
        problems=problems,
        tokenizer=tokenizer,
        samples=samples,
        pass_at=settings.pass_at,
        sampling=Sampling(
            temperature=settings.program_temperature, top_p=settings.program_top_p, seed=settings.program_seed
        ),
        max_new_tokens=settings.max_new_tokens,
        stop_ids=stop_ids(tokenizer, context.stop_ids, chat=prompter.chat),
        limits=Limits(settings.program_seconds, settings.program_memory << 20, 5 * settings.program_seconds + 5),
        sealed=sealed,
    )


def _check_can_seal(path: str) -> None:
    """Raises ValueError if this system cannot seal a process."""
    if problem := seal_problem():
        raise ValueError(
            f"program_isolation: {path} asks for programs, and this system cannot seal their processes: {problem}. Run "
            "on Linux 5.13 or newer, or set program_isolation=none if you trust the model with your own permissions"
        )


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Returns the unbiased estimate of the chance that one of k replies passes (Chen et al. 2021).

    It is the share of the subsets of k of the samples that have one that passed: 1 - C(n - c, k) / C(n, k).
    """
    return 1 - math.comb(samples - passed, k) / math.comb(samples, k)


def _read_problem(columns: Mapping[str, object], prompter: Prompter) -> Problem:
    names = QUESTION_KINDS["programs"].columns
    texts = dict(zip(names, values_of(columns, names), strict=True))
    for name, text in texts.items():
        if not isinstance(text, str) or not text.strip():
            raise wrong_value(name, text, "a text")
    prompt, test, entry_point = map(str, texts.values())
    for name, source in {"prompt": prompt, "test": test}.items():
        try:
            with warnings.catch_warnings(action="ignore"):
                compile(str(source), name, "exec")
        except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
            raise ValueError(f"{name}: not Python ({error}). Correct it") from None
    messages = [{"role": "user", "content": QUESTION.format(prompt)}]
    ids = prompter.conversation(messages) if prompter.chat else prompter.text(prompt)
    return Problem(ids=ids, prompt=prompt, entry_point=entry_point, test=test)
