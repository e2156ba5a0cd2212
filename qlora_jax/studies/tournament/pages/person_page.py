"""The page on which a person judges, without knowing which system wrote which reply.

The page holds only texts and random ids. A separate key file says which pair of systems an id stands for, and stays
with the organizer. Neither ids nor orders follow from the texts or from a seed, so nobody can compute them again.

Prompts and replies are untrusted text. jinja2 escapes all of it, and the page's Content-Security-Policy keeps a browser
from running any script but the page's own.
"""

import base64
import hashlib
import json
import random
import secrets
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Literal, TypedDict

from markupsafe import Markup

from qlora_jax.page_template import page_template
from qlora_jax.studies.tournament.matches import Match, Transcripts, unordered
from qlora_jax.terminal.visible import visible

# Characters that could end a script element, or a line of it.
_ESCAPED = {ord(letter): f"\\u{ord(letter):04x}" for letter in "<>&\u2028\u2029"}


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
    script = resources.files(__package__).joinpath("person.js").read_text("utf-8")
    return page_template(__package__, "person.html.jinja").render(
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


def script_source(script: str) -> str:
    """Returns the source expression that allows exactly this script in a Content-Security-Policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def embedded_json(value: object) -> Markup:
    """Returns JSON that can stand in a script element, whatever texts it holds."""
    return Markup(json.dumps(value).translate(_ESCAPED))
