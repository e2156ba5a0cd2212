"""Reads the prompts of a study with their answers, and renders them under a condition."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int32

from qlora_jax.data.formats.row_format import Segment
from qlora_jax.data.loss_mask.token_spans import encode_segments
from qlora_jax.data.readers.files import Problem, Row, raise_problems, read_rows
from qlora_jax.data.tokenizer.template_pipe import Message
from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.studies.variance.settings import PROMPT, ConditionArgs, VarianceArgs


class Question(NamedTuple):
    """One prompt.

    Fields:
      row: its row in the file.
      answers: texts that are right; empty if no measure needs them.
    """

    row: Row
    prompt: str
    answers: Sequence[str]

    @property
    def id(self) -> str:
        """The number of its row, from 1."""
        return str(self.row.place.number + 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Questions:
    """The prompts of a study, and the solved examples that are shown before each."""

    asked: Sequence[Question]
    examples: Sequence[Question]

    def messages(self, question: Question, condition: ConditionArgs) -> list[Message]:
        """The conversation up to the reply, under a condition."""
        system = [] if condition.system is None else [{"role": "system", "content": condition.system}]
        shown = [
            message
            for example in self._ordered(condition.example_order)
            for message in (
                {"role": "user", "content": _worded(example, condition)},
                {"role": "assistant", "content": example.answers[0]},
            )
        ]
        return [*system, *shown, {"role": "user", "content": _worded(question, condition)}]

    def _ordered(self, seed: int | None) -> Sequence[Question]:
        if seed is None:
            return self.examples
        order = np.random.default_rng(seed).permutation(len(self.examples))
        return [self.examples[index] for index in order]


class EncodedReply(NamedTuple):
    """A prompt with its first answer as the reply; `scored` marks the answer's tokens."""

    ids: Int32[np.ndarray, " tokens"]
    scored: Bool[np.ndarray, " tokens"]


def read_questions(args: VarianceArgs) -> Questions:
    """Reads the prompts and examples that the settings name.

    Raises:
      ValueError: rows without a prompt, without an answer that a measure needs, or with the prompt of another row.
    """
    answered = bool({"answer", "likelihood"} & {*args.measures})
    asked = _read(args.prompts, args, answered=answered)[: args.max_prompts]
    if len(asked) < 2:
        raise ValueError(
            f"{args.prompts}: variances are between prompts (found {len(asked)}, expected 2 or more). Add some"
        )
    return Questions(asked=asked, examples=_read(args.examples, args, answered=True) if args.examples else [])


def encode_reply(tokenizer: Tokenizer, messages: Sequence[Message], answer: str) -> EncodedReply:
    """Ids of a conversation with an answer as its reply."""
    prompt = tokenizer.render([*messages], add_generation_prompt=True)
    (encoding,) = tokenizer.encode_spans([prompt + answer])
    row = encode_segments(tokenizer, [Segment(prompt, False), Segment(answer, True)], encoding)
    return EncodedReply(np.array(row.ids, np.int32), np.asarray(row.supervised, bool))


def _read(path: str, args: VarianceArgs, *, answered: bool) -> list[Question]:
    rows = read_rows(path)
    questions: list[Question] = []
    problems: list[Problem] = []
    seen: dict[str, str] = {}
    for row in rows:
        try:
            prompt, answer = row.data.get(args.prompt_column), row.data.get(args.answer_column)
            if not isinstance(prompt, str) or not prompt.strip():
                raise ValueError(f"{args.prompt_column}: found {prompt!r}, expected a text. Set prompt_column")
            given = answer if isinstance(answer, list) else [answer]
            answers = [text for text in given if isinstance(text, str) and text.strip()]
            if answered and (not answers or len(answers) < len(given)):
                fix = "Set answer_column, or leave the measures answer and likelihood out"
                raise ValueError(f"{args.answer_column}: found {answer!r}, expected a text or a list of texts. {fix}")
            question = Question(row, prompt, answers if answered else [])
            if question.prompt in seen:
                raise ValueError(f"the same prompt as row {seen[question.prompt]}. Remove one")
        except ValueError as error:
            problems.append((row.place, str(error)))
            continue
        seen[question.prompt] = question.id
        questions.append(question)
    raise_problems(path, problems, len(rows))
    return questions


def _worded(question: Question, condition: ConditionArgs) -> str:
    return condition.paraphrase.replace(PROMPT, question.prompt)


class ChosenPrompt(NamedTuple):
    """A prompt to show: its index, and the rule that chose it."""

    index: int
    rule: str


def choose_prompts(
    differences: Sequence[tuple[str, Float64[np.ndarray, " prompts"]]], *, random: int, extreme: int, seed: int
) -> list[ChosenPrompt]:
    """Chooses prompts, each once: at random, then those with the largest differences of each sign.

    Equal differences are in the order of the prompts. A prompt whose difference is 0 is not an extreme.

    Args:
      differences: (description of the pair, each prompt's mean difference over all conditions).
    """
    prompts = len(differences[0][1])
    drawn = np.random.default_rng(seed).choice(prompts, size=min(random, prompts), replace=False)
    found = {int(index): f"drawn at random (seed {seed})" for index in np.sort(drawn)}
    for pair, difference_P in differences:
        for sign, word in ((1, "highest difference"), (-1, "lowest difference")):
            order = np.argsort(-sign * difference_P, kind="stable")[:extreme]
            for index in order[sign * difference_P[order] > 0]:
                found.setdefault(int(index), f"{pair}: {word} ({difference_P[index]:+.3g})")
    return [ChosenPrompt(index, rule) for index, rule in found.items()]
