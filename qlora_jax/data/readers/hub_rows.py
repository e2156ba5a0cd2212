"""Reads rows of data sets on a Hugging Face Hub: `hf://datasets/org/name[@revision][?name=CONFIG&split=SPLIT]`.

It uses the `datasets` library, an optional dependency, with its cache, token and switches (HF_HOME, HF_TOKEN,
HF_HUB_OFFLINE). The code of a data set is never run.
"""

import dataclasses
import urllib.parse
from collections.abc import Iterator

from qlora_jax.terminal.visible import without_passwords

SCHEME = "hf://datasets/"
_OPTIONS = ("name", "split")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HubRows:
    """A split of a data set.

    Fields:
      repo: "org/name", or a local folder that `datasets` reads.
      revision: a branch, a tag or a commit; None for the repository's default.
      name: the configuration; None for the only or default one.
    """

    repo: str
    revision: str | None
    name: str | None
    split: str

    @classmethod
    def parse(cls, text: str) -> "HubRows | None":
        """Parses an hf:// address; returns None for other texts, and raises ValueError for a wrong address."""
        if not text.startswith(SCHEME):
            return None
        address, _, query = text.removeprefix(SCHEME).partition("?")
        repo, _, revision = address.partition("@")
        options = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
        unknown = [name for name in options if name not in _OPTIONS]
        if unknown or not repo:
            raise ValueError(
                f"{text}: wrong address (found the options {', '.join(unknown) or 'none'}, expected "
                f"{SCHEME}org/name[@revision][?name=CONFIG&split=SPLIT])"
            )
        return cls(
            repo=repo,
            revision=urllib.parse.unquote(revision) or None,
            name=options.get("name"),
            split=options.get("split", "train"),
        )


def hub_rows(hub: HubRows) -> Iterator[dict[str, object]]:
    """Yields the rows of a split. They are in files, so memory does not grow with their number.

    Raises:
      ValueError: `datasets` is not installed; the data set, configuration, split or revision does not exist; or
        the machine is offline.
    """
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError(
            f"{SCHEME}{hub.repo}: data sets on the Hub need the datasets library, which is not installed. "
            "Run pip install 'qlora-jax[datasets]'."
        ) from None
    try:
        rows = datasets.load_dataset(hub.repo, hub.name, split=hub.split, revision=hub.revision)
    except (OSError, ValueError, KeyError) as error:
        # Not chained, because its text may contain the password of the Hub's URL.
        raise ValueError(f"{SCHEME}{hub.repo}: {without_passwords(str(error))}") from None
    for row in rows:
        yield dict(row)
