"""Markup of the page: figures of a summary as text, tables, the frame. Knows nothing of what the figures mean.

Every number on the page is a `<data>` element that `Figures` wrote from a summary, with its name in `title`, so that
the page and `summary.json` cannot disagree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from lensteer.plots import FONT, PAGE, PAPER

#: How a number is written: format, and what it is multiplied by.
STYLES: dict[str, tuple[str, float]] = {
    "count": ("{:,.0f}", 1),
    "layer": ("L{:.0f}", 1),
    "percent": ("{:.1f} %", 100),
    "bare percent": ("{:.1f}", 100),
    "points": ("{:+.1f}", 100),
    "signed": ("{:+.3g}", 1),
    "plain": ("{:.3g}", 1),
    "cosine": ("{:+.2f}", 1),
    "tenths": ("{:,.1f}", 1),
    "thousandths": ("{:.3f}", 1),
}
NOTHING = "–"


class Figures:
    """Writes the figures of one summary. `source` is put before their names where it is not this run's."""

    def __init__(self, found: Mapping[str, Any], source: str = "") -> None:
        self.found = found
        self.source = source

    def __call__(self, name: str, style: str = "plain") -> str:
        """One figure, or a dash where there is none."""
        value = self.found.get(name)
        if value is None:
            return NOTHING
        label = escape(self.source + name)
        if isinstance(value, (bool, str)):
            text = visible(str(value)) if style == "token" else str(value)
            return f'<data title="{label}" value="{escape(str(value))}">{escape(text)}</data>'
        pattern, factor = STYLES[style]
        text = pattern.format(value * factor).replace("-", "−")
        return f'<data title="{label}" value="{value!r}">{text}</data>'

    def between(self, low: str, high: str, style: str) -> str:
        """Two figures with "to" between them; the per cent sign stands once."""
        return f"{self(low, 'bare percent' if style == 'percent' else style)} to {self(high, style)}"

    def interval(self, low: str, high: str, style: str) -> str:
        """An interval in brackets, without its unit; nothing where either end is missing."""
        if self.found.get(low) is None or self.found.get(high) is None:
            return ""
        return f'<span class="interval">({self.between(low, high, style).replace(" %", "")})</span>'


def visible(token: str) -> str:
    """A token's text with marks for what cannot be seen: line breaks, tabs, and a text of nothing but spaces."""
    if not token.strip(" "):
        return "␣" * len(token) or "∅"
    text = token.replace("\r", "␍").replace("\n", "⏎").replace("\t", "⇥")
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str = "", words: int = 1) -> str:
    """A table of finished markup.

    Args:
        head: of the columns.
        rows: cells; a row whose first cell starts with a space is set back as an addition to the one above.
        caption: above it.
        words: so many columns, from the left, hold words; the others hold numbers and are set right.
    """
    above = f'<p class="caption">{caption}</p>' if caption else ""
    lines = ["<thead><tr>"]
    lines += [f'<th class="{"w" if i < words else "n"}">{cell}</th>' for i, cell in enumerate(head)]
    lines.append("</tr></thead><tbody>")
    for row in rows:
        lines.append('<tr class="addition">' if row[0].startswith(" ") else "<tr>")
        lines += [f'<td class="{"w" if i < words else "n"}">{cell}</td>' for i, cell in enumerate(row)]
        lines.append("</tr>")
    return f'{above}<div class="wide"><table>{"".join(lines)}</tbody></table></div>'


def section(anchor: str, title: str, *parts: str) -> str:
    """A section of the page; empty parts are left out."""
    body = "\n".join(part for part in parts if part)
    return f'<section id="{anchor}"><h2>{title}</h2>\n{body}\n</section>'


def bullets(items: Sequence[str]) -> str:
    """A list."""
    return f"<ul>{''.join(f'<li>{item}</li>' for item in items)}</ul>"


def _variables(theme: str) -> str:
    return "; ".join(f"--{name}: {value}" for name, value in PAGE[theme].items())


STYLE = f"""
:root {{ color-scheme: light dark; {_variables("light")} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_variables("dark")} }} }}
@media print {{ :root {{ {_variables("light")} }} body {{ zoom: 0.7 }}
  figure, tr {{ break-inside: avoid }} }}
* {{ box-sizing: border-box }}
body {{ max-width: 78rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 {FONT} }}
h1 {{ font-size: 1.8rem; line-height: 1.2; margin: 0.5rem 0 0.25rem; overflow-wrap: anywhere }}
h2 {{ font-size: 1.3rem; margin: 2.75rem 0 0.5rem; padding-top: 0.75rem; border-top: 1px solid var(--line) }}
h3 {{ font-size: 1rem; margin: 1.5rem 0 0.25rem }}
.muted, .caption, tr.addition, .interval {{ color: var(--muted) }}
.answer {{ font-size: 1.15rem }}
.yes {{ color: var(--good); font-weight: 600 }}
.wide {{ overflow-x: auto; margin: 1rem 0 }}
table {{ border-collapse: collapse; width: 100%; font-size: 0.84rem; font-variant-numeric: tabular-nums }}
.caption {{ margin: 1.25rem 0 0; font-size: 0.9rem }}
.caption + .wide {{ margin-top: 0.4rem }}
th, td {{ padding: 0.3rem 0.4rem; border-bottom: 1px solid var(--line); vertical-align: top }}
th {{ font-weight: 600; vertical-align: bottom }}
.n {{ text-align: right; white-space: nowrap }}
.verdict {{ display: block; white-space: normal; max-width: 8em; margin-left: auto }}
.w {{ text-align: left }}
tr.addition td:first-child {{ padding-left: 1.5rem }}
.interval {{ font-size: 0.8rem; display: block }}
figure {{ margin: 1rem 0; padding: 0.5rem; border: 1px solid var(--line); border-radius: 6px; background: {PAPER} }}
.name {{ white-space: nowrap }}
.swatch {{ display: inline-block; width: 0.7em; height: 0.7em; border-radius: 2px; margin-right: 0.45em }}
.chains {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); gap: 1rem; font-size: 0.85rem }}
.chains > div {{ background: var(--soft); border-radius: 6px; padding: 0.75rem }}
.chains h3 {{ margin-top: 0 }}
.token {{ font-family: ui-monospace, Menlo, Consolas, monospace; white-space: pre; background: var(--soft);
  padding: 0 0.2em; border-radius: 3px }}
summary {{ cursor: pointer; color: var(--muted) }}
"""


def frame(title: str, body: str, script: str) -> str:
    """The whole page. Its policy forbids the browser every request.

    Args:
        title: plain text.
        body: markup.
        script: plotly's, put in once.
    """
    policy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
<script>{script}</script>
</head>
<body>
{body}
</body>
</html>
"""
