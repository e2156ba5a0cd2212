"""The task `letters`: multiple choice by letter, like MMLU.

The prompt lists the options, and the model's answer is the likeliest letter after it.

Dimension key: B prompts of a batch, T positions, K letters, V vocab.
"""

import dataclasses
import functools
import itertools
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Int32

from qlora_jax.config import QuestionArgs
from qlora_jax.data.readers.files import Row, raise_problems, shorten
from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.evaluation.batches import Batch, batches_by_length, pad_rows
from qlora_jax.evaluation.task import ProgressCallback, TaskContext
from qlora_jax.evaluation.task_file import read_each, read_task_rows
from qlora_jax.evaluation.tasks.question_rows import Question, read_question
from qlora_jax.inference.engine.request import id_problems
from qlora_jax.inference.lowering import LoweredProgram, lower_program
from qlora_jax.inference.mesh_inference import row_shards, run_on_mesh
from qlora_jax.inference.result_cache import NO_CACHE, ResultCache
from qlora_jax.measures.metrics import Comparison, Metric, RowValues, share, share_change, share_of_rows
from qlora_jax.measures.statistics import stratified_bootstrap, stratified_paired_bootstrap
from qlora_jax.models.partition import ModelFunction, ModelParts, combine
from qlora_jax.sharding import AnyMesh, gather_rows, mesh_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class LetterQuestion:
    """One question: the ids of its prompt, the ids of the letters, and the index of the right letter."""

    ids: Int32[np.ndarray, "_"]
    letters: Sequence[int]
    answer: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class LetterScores:
    """Grades of a model's answers.

    Fields:
      right: the right letter's logit is above all others.
      tied: it shares first place, which does not count as right.
    """

    right: Bool[np.ndarray, " questions"]
    tied: Bool[np.ndarray, " questions"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LettersTask:
    """Share of questions whose likeliest letter is right; see evaluation/task.py for the members.

    Attributes:
      subjects: the subject of each question; None unless every question has one. MMLU reports the mean over subjects.
    """

    title: str
    questions: Sequence[LetterQuestion]
    subjects: Sequence[str] | None
    name: str = "letters"

    @property
    def size(self) -> int:
        """The number of questions."""
        return len(self.questions)

    @property
    def inputs(self) -> Sequence[Sequence[object]]:
        """Each question's prompt, letters and right letter."""
        return [[question.ids, [*question.letters], question.answer] for question in self.questions]

    def score(self, parts: ModelParts, progress: ProgressCallback, cache: ResultCache) -> LetterScores:
        """Scores one model on each question."""
        return score_letters(parts, self.questions, progress, cache)

    def metrics(self, scores: LetterScores) -> list[Metric]:
        """The share of right answers, its mean over subjects, and the number of ties."""
        by_subject = []
        if self.subjects is not None:
            mean = mean_over_subjects(scores.right, self.subjects)
            interval = stratified_bootstrap(scores.right, self.subjects)
            by_subject = [Metric(self._subject_mean, "share", mean, interval)]
        ties = Metric("ties (counted as wrong)", "count", int(scores.tied.sum()))
        return [share("right by letter", scores.right), *by_subject, ties]

    def compare(self, before: LetterScores, after: LetterScores) -> list[Comparison]:
        """The changes of the share and of its mean over subjects."""
        by_subject = []
        if self.subjects is not None:
            change = mean_over_subjects(after.right, self.subjects) - mean_over_subjects(before.right, self.subjects)
            interval = stratified_paired_bootstrap(before.right, after.right, self.subjects)
            by_subject = [Comparison(self._subject_mean, "share", change, interval)]
        return [share_change("right by letter", before.right, after.right), *by_subject]

    def row_values(self, scores: LetterScores) -> dict[str, RowValues]:
        """The rows' parts of the measures in `MEASURES`."""
        return {"right by letter": share_of_rows(scores.right)}

    def lower(self, parts: ModelParts) -> Iterator[LoweredProgram]:
        """Lowers the programs of the largest batches."""
        return lower_letters(parts, self.questions)

    @property
    def _subject_mean(self) -> str:
        return f"mean over {len(set(self.subjects or ()))} subjects"


def build(settings: QuestionArgs, context: TaskContext) -> LettersTask:
    """Reads the questions of a file.

    A row is {input, output} with an optional {subject}: a complete prompt and its letter, as in QLoRA's MMLU files. Or
    it is {question, options, answer} with an optional {subject}, from which MMLU's prompt is made.

    Raises:
      ValueError: rows that are neither, are too long, or have too few examples of their subject; the message lists
        them.
    """
    path, shots, num_shots, columns = settings.letters, settings.shots, settings.num_shots, settings.file_columns
    assert path is not None
    rows = read_task_rows(path, "letters", columns, settings.max_rows)
    examples = None if shots is None else _read_examples(shots, num_shots, columns)
    prompts = read_each(path, rows, lambda row: _prompt(row, examples, num_shots))
    questions = read_each(path, rows, lambda row: _encode(_prompt(row, examples, num_shots), context.tokenizer))
    problems = [
        (row.place, f"too long (found {len(question.ids)} tokens; the model has {context.max_positions} positions)")
        for row, question in zip(rows, questions, strict=True)
        if len(question.ids) > context.max_positions
    ]
    raise_problems(path, problems, len(rows))
    subjects = [prompt.subject for prompt in prompts if prompt.subject is not None]
    title = f"{path}: {len(rows)} questions by letter" + (f", {num_shots} examples each" if shots else "")
    return LettersTask(title=title, questions=questions, subjects=subjects if len(subjects) == len(rows) else None)


def score_letters(
    parts: ModelParts,
    questions: Sequence[LetterQuestion],
    progress: Callable[[int], None] = lambda questions_done: None,
    cache: ResultCache = NO_CACHE,
) -> LetterScores:
    """Scores each question, from f32 logits after its prompt.

    Args:
      progress: called with the number of questions scored so far.
      cache: scores of this model.

    Raises:
      ValueError: a question has an id that the model's embedding has no row for.
    """
    num_ids = combine(parts).model.embed_tokens.num_ids
    asked = enumerate(questions)
    if problems := [each for row, one in asked for each in id_problems(f"question {row}", one.ids, num_ids)]:
        raise ValueError("\n  ".join(["cannot score:", *problems]))
    right, tied, done = np.zeros(len(questions), bool), np.zeros(len(questions), bool), 0
    mesh = mesh_of(parts)
    for batch in batches_by_length([len(question.ids) for question in questions], row_shards(mesh)):
        members = [questions[index] for index in batch.rows]
        inputs = _inputs(batch, questions)
        (logits_BK,) = cache.get_or_compute(inputs, lambda inputs=inputs: [_letter_logits(parts, *inputs, mesh=mesh)])
        for index, question, logits_K in zip(batch.rows, members, logits_BK, strict=False):
            lead = _lead(logits_K[: len(question.letters)], question.answer)
            right[index], tied[index] = lead > 0, lead == 0
        done += len(members)
        progress(done)
    return LetterScores(right=right, tied=tied)


def lower_letters(parts: ModelParts, questions: Sequence[LetterQuestion]) -> Iterator[LoweredProgram]:
    """Lowers `score_letters` for the batch of most positions and for that of most rows, each of which has logits."""
    batches = batches_by_length([len(question.ids) for question in questions], row_shards(mesh_of(parts)))
    largest = max(batches, key=lambda batch: batch.positions), max(batches, key=lambda batch: batch.size)
    for batch in {batch.shape: batch for batch in largest}.values():
        yield lower_program(batch.shape, _letter_logits, parts, _inputs(batch, questions))


def mean_over_subjects(right: Bool[np.ndarray, " questions"], subjects: Sequence[str]) -> float:
    """The unweighted mean of the subjects' shares of right answers."""
    names = np.array(subjects)
    return float(np.mean([right[names == name].mean() for name in sorted(set(subjects))]))


@functools.partial(ModelFunction, static_argnames="mesh")
def _letter_logits(
    parts: ModelParts,
    tokens_BT: Int[Array, "B T"],
    last_B: Int[Array, " B"],
    letters_BK: Int[Array, "B K"],
    *,
    mesh: AnyMesh | None = None,
) -> Float[Array, "B K"]:
    """f32 logits of the letters after position `last` of each row."""

    def program(parts, tokens_BT, last_B, letters_BK):
        model = combine(parts)
        rows, length = tokens_BT.shape
        logits_BV = model.head.logits(model.hidden(tokens_BT)[jnp.arange(rows) * length + last_B])
        return gather_rows(jnp.take_along_axis(logits_BV, letters_BK, axis=1), mesh, axis=0)

    return run_on_mesh(program, parts, (tokens_BT, last_B, letters_BK), mesh, P())


def _inputs(batch: Batch, questions: Sequence[LetterQuestion]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens, position of each row's last token, letters padded to the most that any question has)."""
    members = [questions[index] for index in batch.rows]
    max_letters = max(len(question.letters) for question in questions)
    tokens_BT, last_B = pad_rows(batch, [question.ids for question in members]), np.zeros(batch.size, np.int32)
    last_B[: len(members)] = [len(question.ids) - 1 for question in members]
    letters_BK = np.zeros((batch.size, max_letters), np.int32)
    for index, question in enumerate(members):
        letters_BK[index, : len(question.letters)] = question.letters
    return tokens_BT, last_B, letters_BK


def _lead(logits_K: np.ndarray, answer: int) -> float:
    """The difference between the right letter's logit and the largest other one."""
    return float(logits_K[answer] - np.delete(logits_K, answer).max())


class _Prompt(NamedTuple):
    """A question with its options, as text.

    Fields:
      text: everything before the letter.
      letters: number of letters to choose from.
      answer: index of the right letter.
      subject: None if the row has none.
    """

    text: str
    letters: int
    answer: int
    subject: str | None


def _prompt(row: Row, examples: Mapping[str | None, Sequence[str]] | None, num_shots: int) -> _Prompt:
    columns = row.data
    subject = columns.get("subject")
    if {"input", "output"} <= columns.keys():
        prompt, letter = columns["input"], columns["output"]
        if examples is not None:
            raise ValueError("input: a complete prompt, to which no examples are added. Remove shots")
        if not isinstance(prompt, str) or not isinstance(letter, str) or letter not in [*"ABCD"]:
            raise ValueError(
                f"input, output: found output {shorten(repr(letter))}, expected a prompt and one of A, B, C, D"
            )
        return _Prompt(prompt, 4, "ABCD".index(letter), subject)
    question = read_question(columns)
    if len(question.options) > len(string.ascii_uppercase):
        raise ValueError(
            f"options: too many (found {len(question.options)}, expected at most {len(string.ascii_uppercase)})"
        )
    shown = () if examples is None else examples.get(subject, ())
    if examples is not None and len(shown) < num_shots:
        group = "without a subject" if subject is None else f"of subject {subject!r}"
        raise ValueError(
            f"shots: too few examples {group} (found {len(shown)}, expected {num_shots}). Reduce num_shots"
        )
    text = header(subject) + "".join(f"{example}\n\n" for example in shown) + with_options(question)
    return _Prompt(text, len(question.options), question.answer, subject)


def header(subject: str | None) -> str:
    """The beginning of MMLU's prompts, including their two spaces before the subject."""
    about = "" if subject is None else f" about  {subject.replace('_', ' ')}"
    return f"The following are multiple choice questions (with answers){about}.\n\n"


def with_options(question: Question) -> str:
    """The question with its lettered options, up to where the letter follows."""
    lettered = zip(string.ascii_uppercase, question.options, strict=False)
    return question.prompt + "".join(f"\n{letter}. {option}" for letter, option in lettered) + "\nAnswer:"


def _read_examples(path: str, num_shots: int, file_columns: Mapping[str, str] | None) -> dict[str | None, list[str]]:
    """The first `num_shots` answered questions of each subject, in the order of the file."""
    examples: dict[str | None, list[str]] = {}
    rows = read_task_rows(path, "letters", file_columns)
    questions = read_each(path, rows, lambda row: read_question(row.data))
    for row, question in zip(rows, questions, strict=True):
        of_subject = examples.setdefault(row.data.get("subject"), [])
        if len(of_subject) < num_shots:
            of_subject.append(f"{with_options(question)} {string.ascii_uppercase[question.answer]}")
    return examples


def _encode(prompt: _Prompt, tokenizer: Tokenizer) -> LetterQuestion:
    """Encodes the prompt followed by a space and each letter: the shared ids, and the next id for each letter."""
    letters = string.ascii_uppercase[: prompt.letters]
    encoded = tokenizer.encode_batch([f"{prompt.text} {letter}" for letter in letters])
    shared = encoded[0][: _shared_length(encoded)]
    bos = [tokenizer.bos_id] if tokenizer.add_bos_token else []
    next_ids = [ids[len(shared)] for ids in encoded if len(ids) > len(shared)]
    if len(set(next_ids)) < len(letters):
        raise ValueError(f"tokenizer: does not distinguish the letters {letters} by one token. Use choices instead")
    return LetterQuestion(ids=np.array([*bos, *shared], np.int32), letters=next_ids, answer=prompt.answer)


def _shared_length(rows: Sequence[Sequence[int]]) -> int:
    """The number of ids with which all rows begin."""
    return sum(1 for _ in itertools.takewhile(lambda ids: len(set(ids)) == 1, zip(*rows, strict=False)))
