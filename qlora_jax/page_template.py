"""Templates of HTML pages, which show text of unknown origin.

jinja2 escapes all values. `page_style` is the style sheet that all pages share (page.css). The filter `visible`
replaces control characters that an HTML parser would drop or change.
"""

import base64
import functools
import hashlib
from importlib import resources
from typing import TYPE_CHECKING

from markupsafe import Markup

from qlora_jax.terminal.visible import visible

if TYPE_CHECKING:
    import jinja2


@functools.cache
def page_template(package: str, name: str) -> "jinja2.Template":
    """Returns the template in the file `name` of a package; a value that it lacks raises an error."""
    import jinja2  # takes longer than the modules that use it, and is used once, at their end

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["visible"] = visible
    environment.globals["page_style"] = Markup(package_text("qlora_jax", "page.css"))
    return environment.from_string(package_text(package, name))


def script_source(script: str) -> str:
    """Returns the source expression that allows exactly this script in a Content-Security-Policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


@functools.cache
def package_text(package: str, name: str) -> str:
    """Returns the text of the file `name` of a package."""
    return resources.files(package).joinpath(name).read_text("utf-8")
