"""A headless Chromium that remembers every error and request, and the explorer on a page of it."""

from __future__ import annotations

import contextlib
import math
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import Locator, Page, Playwright, expect

#: Milliseconds. Playwright's own 5 seconds are too few for a busy machine.
PATIENCE = 120_000
_QUIET = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
_QUIET += ["--disable-component-update", "--disable-sync"]


def chromium() -> str | None:
    """Where the system's browser is."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@dataclass
class Browser:
    """One page, and what went wrong on it.

    Attributes:
        page: of Playwright.
        errors: of the console and of the page, failed requests and answers among them.
        outside: requests to other hosts than this machine's loopback.
    """

    page: Page
    errors: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)


@contextlib.contextmanager
def browser(playwright: Playwright, folder: Path) -> Iterator[Browser]:
    """A fresh browser without a past."""
    context = playwright.chromium.launch_persistent_context(
        folder,
        executable_path=chromium(),
        headless=True,
        args=_QUIET,
        viewport={"width": 1280, "height": 1000},
        color_scheme="light",
    )
    try:
        context.set_default_timeout(PATIENCE)
        expect.set_options(timeout=PATIENCE)
        made = Browser(context.pages[0] if context.pages else context.new_page())

        def wrong(what: str) -> None:
            made.errors.append(what)

        context.on("console", lambda m: wrong(f"console: {m.text} ({m.location})") if m.type == "error" else None)
        context.on("weberror", lambda e: wrong(f"page: {e.error}"))
        context.on("request", lambda r: None if _is_local(r.url) else made.outside.append(r.url))
        context.on("requestfailed", lambda r: wrong(f"failed: {r.url} {r.failure}"))
        context.on("response", lambda r: wrong(f"{r.status}: {r.url}") if r.status >= 400 else None)
        yield made
    finally:
        context.close()


def _is_local(url: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme in ("data", "blob", "about") or parts.hostname == "127.0.0.1"


_BARS = """(strip, name) => [...strip.querySelector(name).getAttribute("d").matchAll(/M([\\d.]+) [\\d.]+v(-?[\\d.]+)/g)]
    .map(([, x, v]) => [Math.floor(x), -v])"""

# From a layer's choice to the frame that shows its strip: milliseconds.
_LATENCIES = """async (root, places) => {
  const part = (name) => root.querySelector(`[data-testid="ls-${name}"]`);
  const slider = part("layer"), strip = part("strip"), times = [];
  for (const place of places) {
    const drawn = new Promise((done) => {
      let asked = false;
      new MutationObserver((_, watch) => {
        asked ||= strip.dataset.stale === "true";
        if (asked && strip.dataset.stale === "false") { watch.disconnect(); done(); }
      }).observe(strip, { attributes: true });
    });
    const began = performance.now();
    slider.value = place;
    for (const kind of ["input", "change"]) slider.dispatchEvent(new Event(kind, { bubbles: true }));
    await drawn;
    await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
    times.push(performance.now() - began);
  }
  return times;
}"""


class Explorer:
    """The widget on a page, by what its elements are called."""

    def __init__(self, root: Locator) -> None:
        self.root = root

    def part(self, name: str) -> Locator:
        """An element by its test id, without the prefix."""
        return self.root.get_by_test_id(f"ls-{name}")

    def token(self, i: int) -> Locator:
        """The token at a position."""
        return self.part("chain").locator(f'[data-i="{i}"]')

    def selected(self) -> list[int]:
        """The positions that are shown as chosen."""
        chosen = '[data-testid="ls-token"][aria-selected="true"]'
        return self.part("chain").locator(chosen).evaluate_all("nodes => nodes.map((node) => Number(node.dataset.i))")

    def wait(self) -> None:
        """Until the strip shows what is chosen."""
        expect(self.part("total")).to_have_text(re.compile("^total KL"))

    def total(self) -> float:
        """The total KL that is shown; not a number while it is computed."""
        found = re.match(r"total KL (\S+) nats", self.part("total").inner_text())
        return float(found[1]) if found else math.nan

    def bars(self, name: str) -> dict[int, float]:
        """The strip's drawn bars: position -> nats, as exactly as they are drawn (name: kl, up or down)."""
        strip = self.part("strip")
        kind, height = ("data-kl", 26) if name == "kl" else ("data-change", 14)
        most = float(strip.get_attribute(kind) or "nan")
        return {i: value * most / height for i, value in strip.evaluate(_BARS, f".ls-{name}")}

    def latencies(self, places: list[int]) -> list[float]:
        """How long it takes until the strip of each layer, by its place on the slider, is painted: milliseconds."""
        found: list[float] = self.root.evaluate(_LATENCIES, places)
        return found

    def slide(self, name: str, value: float) -> None:
        """Move a slider, as a keyboard does."""
        self.part(name).evaluate(
            "(slider, value) => { slider.value = value; for (const kind of ['input', 'change']) "
            "slider.dispatchEvent(new Event(kind, { bubbles: true })); }",
            value,
        )


def eventually(found: Callable[[], Any], wanted: Any) -> None:
    """Assert that something becomes what is wanted."""
    deadline = time.monotonic() + PATIENCE / 1000
    while (last := found()) != wanted and time.monotonic() < deadline:
        time.sleep(0.1)
    assert last == wanted, f"{last!r} is not {wanted!r}"
