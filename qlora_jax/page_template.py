"""Templates of HTML pages, which show text of unknown origin.

jinja2 escapes all values. The filter `visible` replaces control characters that an HTML parser would drop or change.
"""

import functools
from importlib import resources
from typing import TYPE_CHECKING

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
    return environment.from_string(resources.files(package).joinpath(name).read_text("utf-8"))
