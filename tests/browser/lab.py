"""JupyterLab's own page: a notebook is opened, and all of it run."""

from __future__ import annotations

from browser.pages import PATIENCE, Browser
from browser.servers import Server

# Lab is ready when all of it holds: a kernel that is idle is so before the notebook's commands are.
_READY = """(n) => document.querySelectorAll(".jp-Notebook .jp-Cell").length >= n
  && /python/i.test(document.querySelector(".jp-Toolbar-kernelName")?.textContent ?? "")
  && document.querySelector('.jp-Notebook-ExecutionIndicator[data-status="idle"]')
  && ![...document.querySelectorAll(".jp-Spinner")].some((spinner) => spinner.checkVisibility())"""

_WRONG = '.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.stderr"]'  # tracebacks, too
_RAN = """(wrong) => {
  const numbers = [...document.querySelectorAll(".jp-CodeCell .jp-InputArea-prompt")].map((node) => node.textContent);
  return document.querySelector(wrong) || (numbers.length && numbers.every((text) => /\\[\\d+\\]/.test(text)));
}"""


def run_all(browser: Browser, server: Server, notebook: str, n_cells: int, patience: float = 3 * PATIENCE) -> None:
    """Open a notebook and run all its cells, within `patience` milliseconds; none of them fails or warns."""
    page = browser.page
    page.goto(f"{server.url}lab/tree/{notebook}?token={server.token}&reset")
    page.wait_for_function(_READY, arg=n_cells)
    page.evaluate("() => jupyterapp.commands.execute('notebook:run-all-cells')")
    page.wait_for_function(_RAN, arg=_WRONG, timeout=patience)
    wrong = page.locator(_WRONG).all_text_contents()
    assert not wrong, "\n".join(wrong)


def set_theme(browser: Browser, theme: str) -> None:
    """Change Lab's theme: "light" or "dark"."""
    name = f"JupyterLab {theme.capitalize()}"
    browser.page.evaluate("(theme) => jupyterapp.commands.execute('apputils:change-theme', { theme })", name)
    browser.page.wait_for_function(f"document.body.dataset.jpThemeLight === '{str(theme == 'light').lower()}'")
    browser.page.wait_for_function("!document.getElementById('jupyterlab-splash')")  # it fades
