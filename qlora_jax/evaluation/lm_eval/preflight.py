"""Checks lm-evaluation-harness before a model is loaded: installation, task names, and data sets."""

import functools
import http.client
import logging
import os
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any

from qlora_jax.bounded_request import send
from qlora_jax.terminal.visible import without_passwords

TIMEOUT, MAX_BYTES = 5.0, 1 << 20  # seconds to wait for the Hub, and bytes of its reply


def import_lm_eval() -> Any:
    """Imports the library, which has no type annotations; raises ValueError if it is not installed."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # hides its progress bars; ours are shown
    try:
        import lm_eval  # pyright: ignore[reportMissingImports]
        import lm_eval.tasks  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(f"harness: lm-eval is not installed ({error}). pip install 'qlora-jax[lm-eval]'") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return lm_eval


@functools.cache
def task_manager(folder: str | None) -> Any:
    """The harness' TaskManager, including the task files in `folder`; cached, because it reads thousands of files."""
    return import_lm_eval().tasks.TaskManager(include_path=folder)


def check_ready(tasks: Sequence[str], folder: str | None, report: Callable[[str], object]) -> None:
    """Loads the tasks' data sets, from the Hub or, if it does not respond, from the cache.

    Args:
      tasks: names of the harness' tasks.
      folder: folder with the user's task files, or None.
      report: called with lines for people, before each slow step and if the Hub does not respond.

    Raises:
      ValueError: the harness is not installed, a task is unknown, or a data set cannot be loaded.
    """
    report("harness: reading its list of tasks")
    import_lm_eval()
    offline = _go_offline_if_unreachable(report)
    manager = task_manager(folder)
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise ValueError(f"harness: unknown task (found {', '.join(unknown)}). `lm_eval ls tasks` lists them")
    report(f"harness: loading the data sets of {', '.join(tasks)}")
    try:
        manager.load(list(tasks))
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"harness: cannot load a data set: {reason}{_offline_fix(offline)}") from error


def _offline_fix(offline: str | None) -> str:
    if offline is None:
        return ""
    import datasets.config  # pyright: ignore[reportMissingImports]

    return (
        f". {offline}, and the cache {datasets.config.HF_DATASETS_CACHE} does not contain it. Run the same command "
        "once on a machine with a network and copy its cache (HF_DATASETS_CACHE names the folder), or use task files "
        "over your own data: --harness_folder"
    )


def _go_offline_if_unreachable(report: Callable[[str], object]) -> str | None:
    """Returns why the Hub is not used, or None; sets its libraries offline, which otherwise retry six times."""
    import datasets.config  # pyright: ignore[reportMissingImports]
    import huggingface_hub.constants as hub

    if hub.HF_HUB_OFFLINE or datasets.config.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    if (problem := connection_problem(hub.ENDPOINT)) is None:
        return None
    hub.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    reason = f"{without_passwords(hub.ENDPOINT)} does not respond ({problem})"
    report(f"harness: {reason}; data sets are loaded only from the cache")
    return reason


def connection_problem(address: str) -> str | None:
    """Returns why a server does not respond, or None if it does; behind a proxy, always None."""
    if urllib.request.getproxies():
        return None
    request = urllib.request.Request(address, method="HEAD")
    try:
        send(request, TIMEOUT, MAX_BYTES, lambda response: None)  # an error is a response too
    except TimeoutError:
        return f"no reply within {TIMEOUT:g} s"
    except (OSError, http.client.HTTPException) as error:
        return str(getattr(error, "reason", error)) or type(error).__name__
    return None
