"""The matches of a tournament, and the texts that judges read."""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import xxhash

from qlora_jax.studies.tournament.prompt_file import Prompt

NEXT_CONVERSATION = "A chat between a curious human and an artificial intelligence"


class Match(NamedTuple):
    """Two replies to one prompt, in the order in which a judge reads them.

    Fields:
      prompt: id of the prompt.
      first, second: names of the systems.
    """

    prompt: str
    first: str
    second: str

    def swapped(self) -> "Match":
        """The match in the other order."""
        return Match(self.prompt, self.second, self.first)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transcripts:
    """The prompts and all replies.

    Attributes:
      prompts: each prompt by its id, in order.
      replies: each system's replies by the id of the prompt.
    """

    prompts: Mapping[str, Prompt]
    replies: Mapping[str, Mapping[str, str]]

    def matches(self) -> list[Match]:
        """Every ordered pair of systems for every prompt."""
        pairs = [*itertools.permutations(self.replies, 2)]
        return [Match(prompt, first, second) for prompt in self.prompts for first, second in pairs]

    def question(self, match: Match) -> str:
        """The prompt's text."""
        return self.prompts[match.prompt].question

    def category(self, match: Match) -> str | None:
        """The prompt's category."""
        return self.prompts[match.prompt].category

    def answers(self, match: Match) -> tuple[str, str]:
        """(the first reply, the second), each cut where the model begins another conversation, as in the paper."""
        first, second = (self.replies[system][match.prompt] for system in (match.first, match.second))
        return first.partition(NEXT_CONVERSATION)[0], second.partition(NEXT_CONVERSATION)[0]

    def digest(self, match: Match) -> str:
        """Digest of the texts that a judge reads; it shows if they have changed since a judgement was stored."""
        return xxhash.xxh3_64_hexdigest(repr([self.question(match), *self.answers(match)]).encode("utf-8", "replace"))


def systems_of(matches: Iterable[Match]) -> list[str]:
    """Names of the systems of the matches, sorted."""
    return sorted({name for match in matches for name in (match.first, match.second)})


def unordered(matches: Sequence[Match]) -> list[Match]:
    """One match of each pair of systems and prompt: the first of the two orders."""
    kept: dict[Match, None] = {}
    for match in matches:
        if match.swapped() not in kept:
            kept[match] = None
    return [*kept]
