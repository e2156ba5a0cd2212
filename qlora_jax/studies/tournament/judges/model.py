"""A judge that is a model of ours, loaded here."""

from collections.abc import Iterator, Sequence

import numpy as np

from qlora_jax.evaluation.loglikelihood import score_rows
from qlora_jax.evaluation.shared_prefixes import ScoredIds
from qlora_jax.inference.prompts import Prompter
from qlora_jax.inference.sampling_params import Sampling
from qlora_jax.progress_reporter import ProgressReporter
from qlora_jax.studies.local_model import LocalModel, open_local_model
from qlora_jax.studies.tournament.judges.judge import (
    FIRST,
    SECOND,
    TIE,
    UNREADABLE,
    Attempts,
    Judgement,
    JudgePrompts,
    Record,
    Verdict,
    parse_verdict,
    read_judge_prompts,
)
from qlora_jax.studies.tournament.matches import Match, Transcripts
from qlora_jax.studies.tournament.settings import ModelJudgeArgs

CHOICES: tuple[Verdict, ...] = (FIRST, SECOND, TIE)
LIKELIHOOD_MATCHES = 16  # scored together, then recorded


class ModelJudge:
    """Generates a review of each match, or reads which of 1, 2 and 3 is the likeliest reply."""

    remembers = False

    def __init__(self, args: ModelJudgeArgs, reporter: ProgressReporter):
        """Opens the model without its weights; raises ValueError if it or the file of prompts cannot be used."""
        self._args, self._reporter = args, reporter
        self._prompts: JudgePrompts = read_judge_prompts(args.prompts)
        opened = open_local_model(args, None)
        if not opened.prompter.chat:
            raise ValueError(f"{args.path}: a judge requires a chat template. Set chat_template, and remove raw")
        self._identity = opened.identity()

    def inputs(self) -> dict[str, str | int | float | bool | None]:
        """The model, the settings of the review, and the prompts."""
        keys = ("reads", "temperature", "max_tokens", "seed", "quant_type", "compute_dtype")
        own = {key: getattr(self._args, key) for key in keys}
        return own | self._identity | {"prompts": self._prompts.digest}

    def judge(self, matches: Sequence[Match], transcripts: Transcripts, record: Record) -> None:
        """Judges the matches that fit into the model's positions; the others are recorded without a verdict."""
        opened = open_local_model(self._args, None)
        ids = {match: self._encode(opened.prompter, transcripts, match) for match in matches}
        room = opened.max_positions - 1
        for match, found in ids.items():
            if len(found) > room:
                problem = f"the judge's prompt is too long (found {len(found)} tokens, expected at most {room})"
                record(Judgement(match, None, attempts=Attempts(failed=1), problem=problem))
        fitting = {match: found for match, found in ids.items() if len(found) <= room}
        if not fitting:
            return
        self._reporter.message(f"{self._args.path}: loading")
        with self._reporter.loading() as progress:
            model = opened.load(progress)
        judged = self._by_review if self._args.reads == "review" else self._by_likelihood
        for judgement in judged(model, fitting):
            record(judgement)

    def _encode(self, prompter: Prompter, transcripts: Transcripts, match: Match) -> list[int]:
        prompt = self._prompts.of(transcripts.category(match))
        message = prompt.message(transcripts.question(match), transcripts.answers(match))
        return prompter.conversation(
            [{"role": "system", "content": prompt.system}, {"role": "user", "content": message}]
        )

    def _by_review(self, model: LocalModel, ids: dict[Match, list[int]]) -> Iterator[Judgement]:
        """Judges all matches, then those with an unreadable review again with the next seed."""
        left, attempts, unreadable = [*ids], Attempts(), {}
        retries = self._args.retries if self._args.temperature else 0  # greedy reviews would be the same
        for attempt in range(retries + 1):
            sampling, unreadable = Sampling(temperature=self._args.temperature, seed=self._args.seed + attempt), {}
            for row, reply in model.reply_each([ids[match] for match in left], sampling, self._args.max_tokens):
                review = model.tokenizer.decode(reply.ids)
                verdict = parse_verdict(review)
                if verdict == UNREADABLE:
                    unreadable[left[row]] = review
                else:
                    yield Judgement(left[row], verdict, review, attempts)
            left, attempts = [*unreadable], attempts.plus(Attempts(unreadable=1))
            if not left:
                return
        for match in left:
            yield Judgement(match, UNREADABLE, unreadable[match], attempts)

    def _by_likelihood(self, model: LocalModel, ids: dict[Match, list[int]]) -> Iterator[Judgement]:
        """Takes the likeliest verdict as the whole reply; equal ones are unreadable."""
        for start in range(0, len(ids), LIKELIHOOD_MATCHES):
            matches = [*ids][start : start + LIKELIHOOD_MATCHES]
            rows = [_scored(ids[match], model.tokenizer.encode(str(v))) for match in matches for v in CHOICES]
            for match, nll in zip(matches, score_rows(model.parts, rows).nll.reshape(-1, len(CHOICES)), strict=True):
                best = np.flatnonzero(nll == nll.min())
                verdict = CHOICES[best[0]] if len(best) == 1 else UNREADABLE
                likelihoods = ", ".join(f"log p({v}) = {-x:.4f}" for v, x in zip(CHOICES, nll, strict=True))
                yield Judgement(match, verdict, likelihoods, Attempts(unreadable=int(verdict == UNREADABLE)))


def _scored(prompt: Sequence[int], reply: Sequence[int]) -> ScoredIds:
    return np.array([*prompt, *reply], np.int32), np.array([False] * len(prompt) + [True] * len(reply))
