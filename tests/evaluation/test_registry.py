"""A new kind of question is one class and one line in the registry."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from qlora_jax.config import QuestionArgs
from qlora_jax.evaluation.compared_models import check_same_inputs
from qlora_jax.evaluation.loglikelihood import ScoredIds, lower_scoring, score_rows
from qlora_jax.evaluation.registry import TASKS, build_tasks
from qlora_jax.evaluation.score import ScoredModel, score_models
from qlora_jax.evaluation.task import PreparedTask, ProgressCallback, Task, TaskContext
from qlora_jax.inference.lowering import LoweredProgram
from qlora_jax.inference.result_cache import ResultCache
from qlora_jax.measures.metrics import Comparison, Metric, share, share_change
from qlora_jax.models.partition import ModelParts
from qlora_jax.progress_reporter import ProgressReporter
from tests.inference.tiny import byte_tokenizer, tiny_parts


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpellingTask:
    """Share of words whose last letter the model predicts."""

    title: str
    words: Sequence[ScoredIds]
    name: str = "spelling"

    @property
    def size(self) -> int:
        return len(self.words)

    @property
    def inputs(self) -> Sequence[Sequence[object]]:
        return self.words

    def score(self, parts: ModelParts, progress: ProgressCallback, cache: ResultCache) -> np.ndarray:
        return score_rows(parts, self.words, progress, cache).exact

    def metrics(self, scores: np.ndarray) -> list[Metric]:
        return [share("spelled right", scores)]

    def compare(self, before: np.ndarray, after: np.ndarray) -> list[Comparison]:
        return [share_change("spelled right", before, after)]

    def lower(self, parts: ModelParts) -> Iterator[LoweredProgram]:
        return lower_scoring(parts, self.words)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpellingArgs(QuestionArgs):
    spelling: str | None = None


def build(settings: SpellingArgs, context: TaskContext) -> SpellingTask:
    assert settings.spelling is not None
    rows = [context.tokenizer.encode(word) for word in Path(settings.spelling).read_text().split()]
    words = [(np.array(ids, np.int32), np.arange(len(ids)) == len(ids) - 1) for ids in rows]
    return SpellingTask(title=f"{settings.spelling}: {len(words)} words", words=words)


@pytest.fixture
def task(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(TASKS, "spelling", build)
    (tmp_path / "words.txt").write_text("sun moon rain wind")
    context = TaskContext(tokenizer=byte_tokenizer(), max_positions=100)
    (task,) = build_tasks(SpellingArgs(spelling=str(tmp_path / "words.txt")), context)
    assert isinstance(task, SpellingTask)
    return task


def test_a_registered_task_is_built_scored_and_compared(task):
    models = {"a": tiny_parts(0), "b": tiny_parts(1)}
    tasks, labels = {name: [task] for name in models}, {name: name.upper() for name in models}
    scored = (ScoredModel(name, parts) for name, parts in models.items())
    evaluation = score_models(scored, tasks, labels, cache_folder=None, reporter=ProgressReporter())
    result = evaluation.tasks["spelling"]
    expected = {name: score_rows(parts, task.words).exact.mean() for name, parts in models.items()}
    assert {name: metrics["spelled right"].value for name, metrics in result.metrics.items()} == expected
    (change,) = result.comparisons["a", "b"]
    assert change.difference == expected["b"] - expected["a"] and change.p is not None
    assert all(words in str(evaluation) for words in ("4 words", "spelled right", "A to B"))
    assert isinstance(task, Task) and not isinstance(task, PreparedTask)


def test_its_memory_is_known_before_weights_are_loaded(task):
    (program,) = task.lower(tiny_parts())
    assert program.live_bytes > 0 and program.lowered.compile() is not None


def test_it_is_comparable_with_itself_alone(task):
    tokenizers = (byte_tokenizer(), byte_tokenizer())
    check_same_inputs([task], [task], ("a", "b"), tokenizers)
    other = dataclasses.replace(task, words=task.words[:3])
    with pytest.raises(
        ValueError, match=r"a and b: not comparable(?s:.*)spelling: .* in 1 of 4; the first is number 4"
    ):
        check_same_inputs([task], [other], ("a", "b"), tokenizers)


def test_without_a_setting_there_is_no_task(task):
    assert build_tasks(SpellingArgs(), TaskContext(tokenizer=byte_tokenizer(), max_positions=100)) == []
