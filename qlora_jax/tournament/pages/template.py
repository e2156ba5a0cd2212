"""Renders pages that load no script, font or image from elsewhere.

Prompts and replies are untrusted text. jinja2 escapes all of it, and the pages' Content-Security-Policy keeps a browser
from running any script but the page's own.
"""

import base64
import hashlib
import json
from importlib import resources

from markupsafe import Markup

from qlora_jax.page_template import page_template

# Characters that could end a script element, or a line of it.
_ESCAPED = {ord(letter): f"\\u{ord(letter):04x}" for letter in "<>&\u2028\u2029"}


def render(name: str, **values: object) -> str:
    """Renders the template `name` of this folder; `style` is the style sheet of all pages."""
    return page_template(__package__, name).render(**values, style=Markup(read_asset("style.css")))


def read_asset(name: str) -> str:
    """The text of a file of this folder."""
    return resources.files(__package__).joinpath(name).read_text("utf-8")


def script_source(script: str) -> str:
    """The source expression that allows exactly this script in a Content-Security-Policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def embedded_json(value: object) -> Markup:
    """JSON that can stand in a script element, whatever texts it holds."""
    return Markup(json.dumps(value).translate(_ESCAPED))
