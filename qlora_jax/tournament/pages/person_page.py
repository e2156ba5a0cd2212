"""The page on which a person judges, without knowing which system wrote which reply.

The page holds texts and random ids alone. A separate key file says which pair of systems an id stands for, and stays
with the organizer. Neither ids nor orders follow from the texts or from a seed, so nobody can compute them again.
"""

import random
import secrets
from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict

from markupsafe import Markup

from qlora_jax.terminal.visible import visible
from qlora_jax.tournament.matches import Match, Transcripts, unordered
from qlora_jax.tournament.pages.template import embedded_json, read_asset, render, script_source


class KeyedMatch(TypedDict):
    """A match of the key: reply A is that of `first`; `texts` is the digest of its texts."""

    prompt: str
    first: str
    second: str
    texts: str


class PageKey(TypedDict):
    """The key of a page: the page's id, the settings it was drawn with, and the match that each id stands for."""

    page: str
    limit: int | None
    both_orders: bool
    matches: dict[str, KeyedMatch]


class ExportedVerdicts(TypedDict):
    """The file that a page exports: the page's id, and a verdict for each id that was judged."""

    page: str
    verdicts: dict[str, Literal[1, 2, 3]]


def draw_key(matches: Sequence[Match], transcripts: Transcripts, *, limit: int | None, both_orders: bool) -> PageKey:
    """Draws ids, sides and an order for the matches of a page.

    Args:
      matches: both orders of each pair.
      limit: number of pairs to draw; None for all.
      both_orders: show both orders of each pair that is drawn.
    """
    source = random.SystemRandom()
    pairs = unordered(matches)
    drawn = source.sample(pairs, len(pairs) if limit is None else min(limit, len(pairs)))
    shown = [match if source.random() < 0.5 else match.swapped() for match in drawn]
    if both_orders:
        shown += [match.swapped() for match in shown]
        source.shuffle(shown)
    return PageKey(
        page=secrets.token_hex(8),
        limit=limit,
        both_orders=both_orders,
        matches={
            secrets.token_hex(8): KeyedMatch(**match._asdict(), texts=transcripts.digest(match)) for match in shown
        },
    )


def person_page(key: PageKey, transcripts: Transcripts) -> str:
    """Returns the page as HTML."""
    items = [_item(name, match_of(keyed), transcripts) for name, keyed in key["matches"].items()]
    script = read_asset("person.js")
    return render(
        "person.html.jinja",
        data=embedded_json({"page": key["page"], "items": items}),
        script=Markup(script),
        script_source=Markup(script_source(script)),
    )


def match_of(keyed: KeyedMatch) -> Match:
    """The match that an entry of the key stands for."""
    return Match(keyed["prompt"], keyed["first"], keyed["second"])


def _item(name: str, match: Match, transcripts: Transcripts) -> Mapping[str, str]:
    first, second = transcripts.answers(match)
    texts = {"question": transcripts.question(match), "left": first, "right": second}
    return {"id": name} | {part: visible(text) for part, text in texts.items()}
