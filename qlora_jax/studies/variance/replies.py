"""Generates the replies of a study and the likelihoods of its answers, and stores them.

All models are opened and all prompts encoded before weights are loaded. One model is in memory at a time. A stored
result is found by the digest of its token ids, in a file of all its other inputs, so a stale one is never used.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypedDict

import numpy as np
from jaxtyping import Float64

from qlora_jax.config.fields import TEMPLATE_CHOICES
from qlora_jax.evaluation.loglikelihood import score_rows
from qlora_jax.inference.result_cache import digest
from qlora_jax.inference.sampling_params import Sampling
from qlora_jax.inference.settings import LocalModelArgs
from qlora_jax.progress_reporter import ProgressReporter
from qlora_jax.studies.local_model import LocalModel, OpenedLocalModel, open_local_model
from qlora_jax.studies.record_file import Inputs, RecordFile
from qlora_jax.studies.variance.questions import EncodedReply, Questions, encode_reply
from qlora_jax.studies.variance.settings import ConditionArgs, Design, VarianceArgs, effective, model_settings

# Settings that change the prompt, and so the likelihood of an answer.
OF_PROMPT = ("system", "paraphrase", "example_order", "quant_type")


class ObservedReply(TypedDict):
    """A reply; `prompt` is a digest of the prompt's token ids, `end` is explained in `DecodeStep`."""

    prompt: str
    reply: str
    end: str
    tokens: int


class StoredLikelihood(TypedDict):
    """Minus the log likelihood of an answer; `row` is a digest of the ids of prompt and answer."""

    row: str
    nll: float
    tokens: int


class Observed(NamedTuple):
    """One model under one condition.

    Fields:
      replies: to each prompt, in order.
      likelihood: mean log likelihood of each answer's tokens, in nats; None if no measure needs it.
      preference: the judge's for each reply over that of the first model, from -1 to 1; None without a judge.
    """

    replies: Sequence[ObservedReply]
    likelihood: Float64[np.ndarray, " prompts"] | None
    preference: Float64[np.ndarray, " prompts"] | None = None


Observations = Mapping[str, Mapping[ConditionArgs, Observed]]  # by model


def observe(args: VarianceArgs, design: Design, questions: Questions, reporter: ProgressReporter) -> Observations:
    """Returns what every model does under every condition; generates what is not stored.

    Raises:
      ValueError: a model cannot be used, or a prompt is too long for it.
    """
    sources = [
        _Source(name, settings, [*conditions], args, questions)
        for name, settings in ((name, model_settings(given)) for name, given in args.models.items())
        for _, conditions in itertools.groupby(design.conditions(), lambda condition: condition.quant_type)
    ]
    found: dict[str, dict[ConditionArgs, Observed]] = {name: {} for name in args.models}
    for source in sources:
        found[source.name] |= source.observe(reporter)
    return found


class _Source:
    """One model in one format of its base, with the conditions in which it replies."""

    def __init__(
        self,
        name: str,
        settings: LocalModelArgs,
        conditions: Sequence[ConditionArgs],
        args: VarianceArgs,
        questions: Questions,
    ):
        self.name, self._conditions = name, conditions
        self._folder, self._likelihood = Path(args.output) / "replies", "likelihood" in args.measures
        if conditions[0].quant_type is not None:
            settings = dataclasses.replace(settings, quant_type=conditions[0].quant_type)
        self._settings = settings
        opened = open_local_model(settings, None)
        if not opened.prompter.chat:
            raise ValueError(
                f"models.{name}: a study needs a chat template (found none). Set its chat_template to "
                f"{TEMPLATE_CHOICES}"
            )
        self._model_inputs: Inputs = {
            "quant_type": settings.quant_type,
            "compute_dtype": settings.compute_dtype,
            **opened.identity(),
        }
        self._ids = {one: _prompt_ids(name, opened, questions, one) for one in conditions}
        self._rows = {one: _answer_rows(name, opened, questions, one) for one in conditions} if self._likelihood else {}

    def observe(self, reporter: ProgressReporter) -> dict[ConditionArgs, Observed]:
        """Returns what the model does under each condition, in memory only as long as something is missing."""
        model: LocalModel | None = None
        found = {}
        for number, condition in enumerate(self._conditions, 1):
            label = f"{self.name}: condition {number} of {len(self._conditions)}"
            with self._replies(condition) as replies, self._likelihoods(condition) as likelihoods:
                stored = {record["prompt"]: record for record in replies.records}
                scored = {record["row"]: record for record in likelihoods.records}
                ids, rows = self._ids[condition], self._rows.get(condition, [])
                new_ids = [one for one in ids if _key(one) not in stored]
                new_rows = [one for one in rows if _key(one) not in scored]
                if (new_ids or new_rows) and model is None:
                    reporter.message(f"{self.name}: loading")
                    with reporter.loading() as progress:
                        model = open_local_model(self._settings, None).load(progress)
                if model is not None and new_ids:
                    stored |= _generate(model, new_ids, condition, replies, reporter, label)
                if model is not None and new_rows:
                    scored |= _score(model, new_rows, likelihoods)
            likelihood = np.array([-scored[_key(row)]["nll"] / scored[_key(row)]["tokens"] for row in rows])
            found[condition] = Observed([stored[_key(one)] for one in ids], likelihood if self._likelihood else None)
        return found

    def _replies(self, condition: ConditionArgs) -> RecordFile[ObservedReply]:
        inputs = {**self._model_inputs, **dataclasses.asdict(effective(condition))}
        return RecordFile(self._path("replies", inputs), inputs, ObservedReply)

    def _likelihoods(self, condition: ConditionArgs) -> RecordFile[StoredLikelihood]:
        inputs = {**self._model_inputs, **{key: getattr(condition, key) for key in OF_PROMPT}}
        return RecordFile(self._path("likelihoods", inputs), inputs, StoredLikelihood)

    def _path(self, kind: str, inputs: Inputs) -> Path:
        return self._folder / f"{kind}-{digest([sorted(inputs.items())])[:16]}.jsonl"


def _prompt_ids(name: str, opened: OpenedLocalModel, questions: Questions, condition: ConditionArgs) -> list[list[int]]:
    ids = [opened.prompter.conversation(questions.messages(one, condition)) for one in questions.asked]
    _check_lengths(name, questions, [len(one) + 1 for one in ids], opened.max_positions)
    return ids


def _answer_rows(
    name: str, opened: OpenedLocalModel, questions: Questions, condition: ConditionArgs
) -> list[EncodedReply]:
    tokenizer = opened.prompter.tokenizer
    rows = [encode_reply(tokenizer, questions.messages(one, condition), one.answers[0]) for one in questions.asked]
    _check_lengths(name, questions, [len(row.ids) for row in rows], opened.max_positions)
    return rows


def _check_lengths(name: str, questions: Questions, lengths: Sequence[int], limit: int) -> None:
    long = [one.id for one, length in zip(questions.asked, lengths, strict=True) if length > limit]
    if long:
        found = f"the rows {', '.join(long[:8])}{' and others' if len(long) > 8 else ''} are longer"
        raise ValueError(f"prompts: {name} has {limit} positions ({found}). Shorten them, or show fewer examples")


def _generate(
    model: LocalModel,
    ids: Sequence[Sequence[int]],
    condition: ConditionArgs,
    stored: RecordFile[ObservedReply],
    reporter: ProgressReporter,
    label: str,
) -> dict[str, ObservedReply]:
    """Generates replies, and stores each as soon as it is complete."""
    sampling = Sampling(
        temperature=condition.temperature, top_k=condition.top_k, top_p=condition.top_p, seed=condition.seed
    )
    found: dict[str, ObservedReply] = {}
    with reporter.counting(label, len(ids)) as progress:
        for row, reply in model.reply_each(ids, sampling, condition.max_new_tokens):
            key = _key(ids[row])
            found[key] = ObservedReply(
                prompt=key, reply=model.tokenizer.decode(reply.ids), end=reply.end, tokens=len(reply.ids)
            )
            stored.append(found[key])
            progress(len(found))
    return found


def _score(
    model: LocalModel, rows: Sequence[EncodedReply], stored: RecordFile[StoredLikelihood]
) -> dict[str, StoredLikelihood]:
    """Computes and stores the likelihoods of answers."""
    scores = score_rows(model.parts, [(row.ids, row.scored) for row in rows])
    found: dict[str, StoredLikelihood] = {}
    for row, nll, tokens in zip(rows, scores.nll.tolist(), scores.tokens.tolist(), strict=True):
        found[_key(row)] = StoredLikelihood(row=_key(row), nll=nll, tokens=tokens)
        stored.append(found[_key(row)])
    return found


def _key(ids: Sequence[int] | EncodedReply) -> str:
    return digest([*ids] if isinstance(ids, EncodedReply) else [*map(int, ids)])[:16]
