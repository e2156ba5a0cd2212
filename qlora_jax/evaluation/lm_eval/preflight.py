"""lm-evaluation-harness before a model is read: it is installed, knows the tasks, has their data sets, or says no."""

import functools
import logging
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any

PATIENCE = 5.0  # seconds


def harness() -> Any:
    """The library; ValueError where it is not installed."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # its bars; ours are shown
    try:
        import lm_eval  # pyright: ignore[reportMissingImports]
        import lm_eval.tasks  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(f"harness: it is not installed ({error}): pip install 'qlora-jax[lm-eval]'") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return lm_eval


@functools.cache
def task_manager(folder: str | None) -> Any:
    """The harness' tasks, and those of files in `folder`; it reads thousands of files, so once."""
    return harness().tasks.TaskManager(include_path=folder)


def check_ready(tasks: Sequence[str], folder: str | None, tell: Callable[[str], object]) -> None:
    """Loads the tasks' data sets, from the Hub or where that gives no answer from the cache alone.

    Args:
      tell: is told what there is to wait for, and that there is no network.

    Raises:
      ValueError: the harness is not installed, knows no such task, or can't have a data set.
    """
    tell("harness: reads its list of tasks")
    harness()
    offline = _offline(tell)
    manager = task_manager(folder)
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise ValueError(f"harness: no task is called {', '.join(unknown)}; `lm_eval ls tasks` lists them")
    tell(f"harness: loads the data sets of {', '.join(tasks)}")
    try:
        manager.load(list(tasks))
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"harness: a data set can't be had: {reason}{_way_out(offline)}") from error


def _way_out(offline: str | None) -> str:
    if offline is None:
        return ""
    import datasets.config  # pyright: ignore[reportMissingImports]

    return (
        f". {offline}, and the cache {datasets.config.HF_DATASETS_CACHE} does not hold it. Run the same command once "
        "where there is a network and bring its cache (HF_DATASETS_CACHE names the folder), or give tasks over files "
        "of your own: --harness_folder"
    )


def _offline(tell: Callable[[str], object]) -> str | None:
    """Why the Hub is not asked, or None. Where it gives no answer, its libraries are told, or they try six times."""
    import datasets.config  # pyright: ignore[reportMissingImports]
    import huggingface_hub.constants as hub

    if hub.HF_HUB_OFFLINE or datasets.config.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    if (problem := no_answer(hub.ENDPOINT)) is None:
        return None
    hub.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    reason = f"{hub.ENDPOINT} gives no answer ({problem})"
    tell(f"harness: {reason}; data sets come from the cache alone")
    return reason


def no_answer(address: str) -> str | None:
    """Why a server can't be reached, or None; nothing is tried where a proxy stands before it."""
    if urllib.request.getproxies():
        return None
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=PATIENCE).close()
    except urllib.error.HTTPError as error:
        error.close()  # an answer, if no good one
    except urllib.error.URLError as error:
        return str(error.reason)
    except OSError as error:
        return str(error)
    return None
