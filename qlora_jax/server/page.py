"""The page of the server: a chat with one or two of the models that it serves, next to the run of a model.

The page asks the server at its own address: GET v1/models, POST v1/chat/completions with `stream`, and GET runs/NAME,
which answers with `RunStatus.to_json()` of the run of that model name, or 404 for a model without a run.
"""

from qlora_jax.training.live.pages import page_with_run


def chat_page() -> str:
    """Returns the page as HTML: one file, which loads nothing and runs only its own script."""
    return page_with_run("qlora_jax.server", "page.html.jinja", "chat.js")
