"""A person, who judges on a page without knowing which system wrote which reply, and sends back the file it exports.

The page holds only texts and random ids. A separate key file says which pair of systems an id stands for, and stays
with the organizer. Neither ids nor orders follow from the texts or from a seed, so nobody can compute them again.

Prompts and replies are untrusted text. jinja2 escapes all of it, and the page's Content-Security-Policy keeps a browser
from running any script but the page's own.
"""

import json
import random
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, TypedDict

from markupsafe import Markup

from qlora_jax.atomic_files import write_text
from qlora_jax.page_template import package_text, page_template, script_source
from qlora_jax.progress_reporter import ProgressReporter
from qlora_jax.studies.tournament.judges.judge import Judgement, Record, Verdict
from qlora_jax.studies.tournament.matches import Match, Transcripts, unordered
from qlora_jax.studies.tournament.settings import PersonArgs
from qlora_jax.terminal.visible import visible
from qlora_jax.untrusted_json import read_json

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
    script = package_text(__package__, "person.js")
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


def embedded_json(value: object) -> Markup:
    """Returns JSON that can stand in a script element, whatever texts it holds."""
    return Markup(json.dumps(value).translate(_ESCAPED))


MAX_BYTES = 64 << 20  # largest key file; it has 200 bytes per pair


class PersonJudge:
    """Writes the page once, and reads the verdicts that it exports.

    Attributes:
      page: the page.
      key: the file that says which systems wrote the replies of the page.
    """

    remembers = True

    def __init__(self, name: str, args: PersonArgs, folder: Path, reporter: ProgressReporter):
        """Reads the key and the exported file, if there are any.

        Args:
          folder: of the tournament.

        Raises:
          ValueError: the page was drawn with other settings, or the exported file is not of this page.
          OSError: the exported file cannot be read.
        """
        self.page, self.key = folder / "people" / f"{name}.html", folder / "keys" / f"{name}.json"
        self._name, self._args, self._reporter = name, args, reporter
        self._key = self._read_key()
        self._verdicts = {} if args.answers is None or self._key is None else _read_answers(args.answers, self._key)

    def inputs(self) -> dict[str, str | int | float | bool | None]:
        """Nothing: the exported file is read each time."""
        return {}

    def judge(self, matches: Sequence[Match], transcripts: Transcripts, record: Record) -> None:
        """Records the exported verdicts on the pairs of the page; without an exported file, asks for one.

        Raises:
          ValueError: replies have changed since the page was written.
        """
        key = self._open_key(matches, transcripts)
        self._report_left_out(key, matches)
        if self._args.answers is None:
            self._reporter.message(
                f"{self._name}: {len(key['matches']):,} pairs to judge: open {self.page} in a browser, save the "
                f"verdicts to a file, and set judges.{self._name}.answers to it. Keep {self.key} to yourself"
            )
        for name, keyed in key["matches"].items():
            record(Judgement(match_of(keyed), self._verdicts.get(name)))

    def _open_key(self, matches: Sequence[Match], transcripts: Transcripts) -> PageKey:
        """The key of the page; draws it if there is none, and writes the page if it is missing."""
        key = self._key
        if key is None:
            key = draw_key(matches, transcripts, limit=self._args.limit, both_orders=self._args.both_orders)
            _write(self.key, json.dumps(key, indent=1))
        self._check_texts(key, matches, transcripts)
        if not self.page.exists():
            _write(self.page, person_page(key, transcripts))
        return key

    def _read_key(self) -> PageKey | None:
        """The key of a page that was written before; ValueError if other settings drew it, or it is lost."""
        if not self.key.exists():
            if self._args.answers is not None:
                raise ValueError(f"{self.key}: no such file, but {self._args.answers} needs it. Restore it")
            return None
        key = read_json(self.key, PageKey, MAX_BYTES)
        changed = [
            f"{setting} (found {json.dumps(given)}, expected {json.dumps(drawn)})"
            for setting, given, drawn in (
                ("limit", self._args.limit, key["limit"]),
                ("both_orders", self._args.both_orders, key["both_orders"]),
            )
            if given != drawn
        ]
        if changed:
            raise ValueError(
                f"judges.{self._name}: {self.page} was drawn with other settings: {', '.join(changed)}. Restore them, "
                f"or delete {self.page} and {self.key} to judge on a new page"
            )
        return key

    def _report_left_out(self, key: PageKey, matches: Sequence[Match]) -> None:
        """Reports the pairs of the tournament that the page does not show."""
        total = len(unordered(matches))
        if left := total - len(unordered([match_of(keyed) for keyed in key["matches"].values()])):
            self._reporter.message(
                f"{self._name}: {left:,} of {total:,} pairs are not on the page, which shows what limit drew when it "
                "was written. For pairs that were added later, add another judge of kind person"
            )

    def _check_texts(self, key: PageKey, matches: Sequence[Match], transcripts: Transcripts) -> None:
        """Raises ValueError if the page shows other texts, or systems and prompts that no longer take part."""
        wanted, shown = {*matches}, key["matches"].values()
        current = [m for m in shown if match_of(m) in wanted and transcripts.digest(match_of(m)) == m["texts"]]
        if len(current) < len(shown):
            raise ValueError(
                f"{self.page}: {len(shown) - len(current)} of its {len(shown)} pairs have other texts now, or do not "
                f"take part. Restore them, or delete {self.page} and {self.key} to judge on a new page"
            )


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    write_text(path, text)


def _read_answers(path: str, key: PageKey) -> dict[str, Verdict]:
    """The verdicts in an exported file by the id of the pair."""
    found = read_json(path, ExportedVerdicts)
    if found["page"] != key["page"]:
        raise ValueError(
            f"{path}: of another page (found {found['page']}, expected {key['page']}). Give the right file"
        )
    if unknown := [name for name in found["verdicts"] if name not in key["matches"]]:
        raise ValueError(
            f"{path}: verdicts on pairs that the page does not have ({', '.join(unknown[:8])}). Export again"
        )
    return {**found["verdicts"]}
