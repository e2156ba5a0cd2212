"""Pages with a live run: one file each, which loads nothing and runs only its own script."""

from markupsafe import Markup

from qlora_jax.page_template import package_text, page_template, script_source


def page_with_run(package: str, template: str, script: str, **values: str) -> str:
    """Returns a page that can show a run: its template gets `panel_style`, `script` and `script_source`.

    Args:
      package, template, script: the package of the template and of the script, and their file names. The script
        follows run_panel.js, and calls its `watchRun`.
      values: other values of the template, which escapes them.
    """
    here = "qlora_jax.training.live"
    code = package_text(here, "run_panel.js") + package_text(package, script)
    return page_template(package, template).render(
        panel_style=Markup(package_text(here, "run_panel.css")),
        script=Markup(code),
        script_source=Markup(script_source(code)),
        **values,
    )


def watch_page(title: str) -> str:
    """Returns the page of `watch`."""
    return page_with_run("qlora_jax.training.live", "watch.html.jinja", "watch.js", title=title)
