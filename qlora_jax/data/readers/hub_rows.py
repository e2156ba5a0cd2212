"""Rows of data sets on a Hugging Face Hub: `hf://datasets/org/name[@revision][?name=CONFIG&split=SPLIT]`.

The `datasets` library, which is an extra, does the work, so its cache, token and switches hold (HF_HOME, HF_TOKEN,
HF_HUB_OFFLINE). Code of a data set is never run.
"""

import dataclasses
import urllib.parse
from collections.abc import Iterator
from typing import Any

SCHEME = "hf://datasets/"
_OPTIONS = ("name", "split")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HubRows:
    """A split of a data set.

    Attributes:
      repo: "org/name", or a local folder that `datasets` reads.
      revision: a branch, a tag or a commit; None for the repository's own default.
      name: the configuration; None for its only or default one.
    """

    repo: str
    revision: str | None
    name: str | None
    split: str

    @classmethod
    def parse(cls, text: str) -> "HubRows | None":
        """What `text` names; None where it is no such address; ValueError where it is a wrong one."""
        if not text.startswith(SCHEME):
            return None
        address, _, query = text.removeprefix(SCHEME).partition("?")
        repo, _, revision = address.partition("@")
        options = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
        unknown = [name for name in options if name not in _OPTIONS]
        if unknown or not repo:
            raise ValueError(
                f"{text}: found the options {', '.join(unknown) or 'none'}, expected "
                f"{SCHEME}org/name[@revision][?name=CONFIG&split=SPLIT]"
            )
        return cls(
            repo=repo,
            revision=urllib.parse.unquote(revision) or None,
            name=options.get("name"),
            split=options.get("split", "train"),
        )


def hub_rows(hub: HubRows) -> Iterator[dict[str, Any]]:
    """The rows of a split; they lie in files, so memory does not grow with them.

    Raises:
      ValueError: `datasets` is not installed; no such data set, configuration, split or revision; offline.
    """
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError(
            f"{SCHEME}{hub.repo}: data sets on the Hub are read by datasets, and it is not installed: "
            "pip install 'qlora-jax[datasets]'"
        ) from None
    try:
        rows = datasets.load_dataset(hub.repo, hub.name, split=hub.split, revision=hub.revision)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{SCHEME}{hub.repo}: {error}") from error
    for row in rows:
        yield dict(row)
