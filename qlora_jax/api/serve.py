"""`serve_models`: a base and its runs, for clients of OpenAI and Anthropic."""

from collections.abc import Sequence

from qlora_jax.api.settings import loading_bar
from qlora_jax.config.parse import from_dict
from qlora_jax.server.loading import make_server
from qlora_jax.server.run import Server
from qlora_jax.server.settings import ServeArgs, check_serve


def serve_models(
    model: str | None = None,
    *,
    runs: Sequence[str] = (),
    background: bool = False,
    progress: bool = False,
    **settings: object,
) -> Server:
    """Answers requests of OpenAI's and Anthropic's clients, until a signal or, in the background, until `stop`.

    >>> with q.serve_models("model", port=0, cache="8MiB", background=True) as server:
    ...     sorted(server.models)
    ['model']

    Args:
      model: a base model; None: the base of the runs.
      runs: folders of training runs or PEFT adapters; each is a model by the name of its folder.
      background: return at once, and answer in a thread until the server's `stop` is called or its `with` block ends.
      progress: show a progress bar while the base loads.
      settings: other settings of `qlora-jax serve`, such as port=8000, cache="2GiB" or api_key="...".

    Raises:
      ValueError: a setting is wrong, or a model cannot be loaded; lists all wrong settings.
      OSError: the port is taken.
    """
    args = from_dict(ServeArgs, {"model": model, "run": [*runs] or None, **settings})
    server = open_server(args, progress=progress)
    if background:
        return server.start()
    server.run()
    return server


def open_server(args: ServeArgs, *, progress: bool) -> Server:
    """Loads the models of the settings and opens the port; answers nothing yet."""
    check_serve(args)
    with loading_bar(progress) as report:
        return make_server(args, report)
