"""A judge behind an OpenAI-compatible endpoint."""

import functools
import queue
import random
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

from qlora_jax.openai_client import Endpoint, RequestFailed, RequestTimedOut, complete, read_key
from qlora_jax.studies.tournament.judges.judge import (
    UNREADABLE,
    Attempts,
    Judgement,
    JudgePrompts,
    JudgeStopped,
    Record,
    parse_verdict,
    read_judge_prompts,
)
from qlora_jax.studies.tournament.matches import Match, Transcripts
from qlora_jax.studies.tournament.settings import EndpointArgs
from qlora_jax.terminal.visible import without_passwords

MAX_WAIT = 120.0  # seconds between two attempts
GIVE_UP_AFTER = 10  # matches without a reply in succession; those that the endpoint rejected do not count
POLL = 0.1  # seconds between looks at the threads


class _Asked(NamedTuple):
    """The judgement on a match; `rejected` if the endpoint replied that it will never judge this one."""

    judgement: Judgement
    rejected: bool = False


class EndpointJudge:
    """Asks a chat model for a review of each match, several at the same time."""

    remembers = False

    def __init__(self, args: EndpointArgs):
        """Raises ValueError if the key is missing, or the file of prompts cannot be used."""
        self._args = args
        self._prompts: JudgePrompts = read_judge_prompts(args.prompts)
        self._endpoint = Endpoint(args.url, args.model, read_key(args.key_variable, "key_variable"), args.timeout)

    def inputs(self) -> dict[str, str | int | float | bool | None]:
        """The endpoint without its key, the settings of the review, and the prompts."""
        args = self._args
        return {
            "url": without_passwords(args.url),
            "model": args.model,
            "temperature": args.temperature,
            "max_tokens": args.max_tokens,
            "prompts": self._prompts.digest,
        }

    def judge(self, matches: Sequence[Match], transcripts: Transcripts, record: Record) -> None:
        """Judges the matches in threads; on Ctrl-C every reply that has arrived is recorded.

        Raises:
          JudgeStopped: the service refuses every request, or many matches in succession had no reply.
        """
        work = _Work(matches, record)
        # Daemon threads do not delay the end of the process while they wait for a reply.
        count = min(self._args.concurrency, len(matches))
        ask = functools.partial(self._ask, transcripts)
        threads = [threading.Thread(target=work.run, args=(ask,), daemon=True) for _ in range(count)]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                while thread.is_alive():
                    thread.join(POLL)
        finally:
            work.stop()
        if work.error is not None:
            raise work.error

    def _ask(self, transcripts: Transcripts, match: Match, stopped: threading.Event) -> _Asked | None:
        """Asks until there is a verdict or no attempt is left; None if the work was stopped."""
        prompt = self._prompts.of(transcripts.category(match))
        message = prompt.message(transcripts.question(match), transcripts.answers(match))
        attempts, judgement = Attempts(), Judgement(match, None)
        how = {"temperature": self._args.temperature, "max_tokens": self._args.max_tokens}
        for attempt in range(self._args.retries + 1):
            wait = None
            try:
                review = complete(self._endpoint, prompt.system, message, **how)
            except RequestFailed as error:
                if error.refused:
                    url = without_passwords(self._args.url)
                    raise JudgeStopped(f"{url}: {error}. Check url, model and key_variable") from None
                timed_out = isinstance(error, RequestTimedOut)
                attempts = attempts.plus(Attempts(failed=not timed_out, timed_out=timed_out))
                judgement = judgement._replace(attempts=attempts, problem=str(error))
                if not error.retry:
                    return _Asked(judgement, rejected=True)
                wait = error.wait
            else:
                verdict = parse_verdict(review)
                attempts = attempts.plus(Attempts(unreadable=verdict == UNREADABLE))
                judgement = Judgement(match, verdict, review, attempts)
                if verdict != UNREADABLE:
                    return _Asked(judgement)
            if attempt < self._args.retries and stopped.wait(self._pause(attempt, wait)):
                return None
        return _Asked(judgement)

    def _pause(self, attempt: int, wait: float | None) -> float:
        """Seconds until the next attempt: `wait`, or twice as long each time, shortened at random to spread threads."""
        if wait is not None:
            return min(MAX_WAIT, wait)
        return min(MAX_WAIT, self._args.backoff * 2**attempt) * random.uniform(0.5, 1)


class _Work:
    """Matches that several threads judge.

    Attributes:
      error: why the work ended early.
    """

    def __init__(self, matches: Sequence[Match], record: Record):
        self.error: BaseException | None = None
        self._record, self._failures = record, 0
        self._lock, self._stopped, self._closed = threading.Lock(), threading.Event(), False
        self._queue: queue.SimpleQueue[Match] = queue.SimpleQueue()
        for match in matches:
            self._queue.put(match)

    def run(self, ask: Callable[[Match, threading.Event], _Asked | None]) -> None:
        """Judges matches until none is left or the work is stopped.

        After an error nothing more is sent, but replies that are on their way are recorded: they are paid for.
        """
        try:
            while not self._stopped.is_set():
                if (asked := ask(self._queue.get_nowait(), self._stopped)) is not None:
                    self._add(asked)
        except queue.Empty:
            return
        except BaseException as error:
            with self._lock:
                self.error = self.error or error
                self._stopped.set()

    def stop(self) -> None:
        """Stops the threads; a judgement that is being recorded is recorded whole, and none after it."""
        with self._lock:
            self._stopped.set()
            self._closed = True

    def _add(self, asked: _Asked) -> None:
        judgement = asked.judgement
        with self._lock:
            if self._closed:
                return
            self._record(judgement)
            if not asked.rejected:
                self._failures = self._failures + 1 if judgement.verdict is None else 0
            if self._failures >= GIVE_UP_AFTER:
                raise JudgeStopped(
                    f"no reply to {self._failures} matches in succession (last: {judgement.problem}). Start again when "
                    "the endpoint answers"
                )
