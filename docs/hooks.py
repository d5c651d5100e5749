"""Hooks of mkdocs: notebooks and files outside of docs/ in the site, their links, and equations as MathML.

The Markdown in docs/ links to files as they lie in the repository, so that links work there, too. In the site, figures,
results, notebooks and some pages have a place of their own (`placed`); a link to any other file becomes its path.
"""

from __future__ import annotations

import base64
import html
import json
import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOCS = "docs"

#: Markdown outside of docs/ and its page in the site.
PAGES = {"README.md": "index.md", "analyses/LOG.md": "log.md", "CHANGELOG.md": "changelog.md"}
#: Folders whose files go along, and which of them.
COPIED = {"analyses/figures": "*.png", "analyses/results": "*.json", "analyses": "*.jsonl"}
NOTEBOOKS, TUTORIALS = "notebooks", "tutorials"

_FENCE = re.compile(r"^( *)(`{3,}|~{3,})")
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
_CODE = re.compile(r"(`+)(?!`).*?(?<!`)\1(?!`)")
_EQUATION = re.compile(r'<(div|span) class="arithmatex">\\[\[(](.*?)\\[\])]</\1>', re.DOTALL)
_STYLE = re.compile(r"<style.*?</style>\s*", re.DOTALL)


def placed(path: str) -> str | None:
    """Where a file of the repository is in the site, as mkdocs names sources; None if it is not there."""
    if path in PAGES:
        return PAGES[path]
    folder, name = posixpath.split(path)
    if folder == NOTEBOOKS and name.endswith(".ipynb"):
        return f"{TUTORIALS}/{name.removesuffix('.ipynb')}.md"
    if folder in COPIED and Path(name).match(COPIED[folder]):
        return path
    inside = path.removeprefix(f"{DOCS}/")
    return inside if inside != path and not path.endswith(".py") else None


def source_of(page: str) -> str:
    """The file of the repository that a page of the site is made of; the front page is docs/index.md."""
    made = {site: path for path, site in PAGES.items() if path != "README.md"}
    if page in made:
        return made[page]
    folder, name = posixpath.split(page)
    if folder == TUTORIALS:
        return f"{NOTEBOOKS}/{name.removesuffix('.md')}.ipynb"
    return f"{DOCS}/{page}"


def generated_pages() -> list[str]:
    """The pages that do not lie in docs/."""
    notebooks = [f"{TUTORIALS}/{path.stem}.md" for path in sorted((ROOT / NOTEBOOKS).glob("*.ipynb"))]
    return [site for path, site in PAGES.items() if path != "README.md"] + notebooks


def outside_code(markdown: str, change: Callable[[str], str]) -> str:
    """The text with `change` made to each line that is not in a fenced block."""
    lines, fence = [], ""
    for line in markdown.split("\n"):
        mark = _FENCE.match(line)
        if fence:
            fence = "" if mark and mark[2].startswith(fence) and not line.strip(" `~") else fence
        elif mark:
            fence = mark[2]
        else:
            line = change(line)
        lines.append(line)
    return "\n".join(lines)


def rewritten(markdown: str, source: str, page: str) -> str:
    """The Markdown of a file of the repository with links as they are in the site.

    Raises:
        ValueError: a link to a file that does not exist, or a figure that the site lacks.
    """

    def link(match: re.Match[str]) -> str:
        image, text, target = match.groups()
        name, _, anchor = target.partition("#")
        if not name or re.match(r"[a-z]+:", name):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), name))
        if not (ROOT / path).exists():
            raise ValueError(f"{source} links to {target}, which does not exist")
        site = placed(path)
        if site is None:
            if image:
                raise ValueError(f"{source} shows {target}, which is not in the site: add it to COPIED")
            return text if text.strip("`") in (path, name) else f"{text} (`{path}`)"
        moved = posixpath.relpath(site, posixpath.dirname(page) or ".") + (f"#{anchor}" if anchor else "")
        return f"{image}[{text}]({moved})"

    def line_of(line: str) -> str:
        kept: list[str] = []

        def keep(match: re.Match[str]) -> str:
            kept.append(match[0])
            return f"\0{len(kept) - 1}\0"

        changed = _LINK.sub(link, _CODE.sub(keep, line))
        return re.sub(r"\0(\d+)\0", lambda match: kept[int(match[1])], changed)

    return outside_code(markdown, line_of)


def notebook_page(notebook: dict[str, Any], stem: str) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and the figures of its outputs by file name. Nothing is executed."""
    parts: list[str] = []
    figures: dict[str, bytes] = {}
    for cell in notebook["cells"]:
        text = "".join(cell["source"]).strip("\n")
        if cell["cell_type"] == "markdown":
            parts.append(text)
        elif text:
            parts.append(f"```python\n{text}\n```")
            for output in cell.get("outputs", []):
                parts += _output(output, stem, figures)
    path = f"{NOTEBOOKS}/{stem}.ipynb"
    parts.insert(1, f'<p class="lensteer-source">The notebook is <code>{path}</code>; its outputs are from a run.</p>')
    return "\n\n".join(parts) + "\n", figures


def _output(output: dict[str, Any], stem: str, figures: dict[str, bytes]) -> Iterator[str]:
    data = output.get("data") or {}
    if "image/png" in data:
        name = f"{stem}_{len(figures)}.png"
        figures[name] = base64.b64decode("".join(data["image/png"]))
        yield f'<img class="lensteer-figure" alt="Figure {len(figures)} of the notebook" src="{name}">'
    elif "text/html" in data:
        page = _STYLE.sub("", "".join(data["text/html"]))
        page = re.sub(r"\n\s*", "\n", page.replace('border="1" ', ""))
        yield f'<div class="lensteer-output">\n{page}\n</div>'
    else:
        text = "".join(output.get("text") or data.get("text/plain") or []).rstrip("\n")
        if text and output.get("name") != "stderr":
            yield f"```{{ .text .lensteer-output }}\n{text}\n```"


def equations(page: str) -> str:
    """The HTML with every equation as MathML, which browsers render without a script."""
    from latex2mathml.converter import convert

    def rendered(match: re.Match[str]) -> str:
        display = "block" if match[1] == "div" else "inline"
        return f'<{match[1]} class="lensteer-math">{convert(html.unescape(match[2]), display=display)}</{match[1]}>'

    return _EQUATION.sub(rendered, page)


def on_files(files: Any, config: Any) -> Any:
    """Add what lies outside of docs/."""
    from mkdocs.structure.files import File

    for path, page in PAGES.items():
        if path != "README.md":
            files.append(File.generated(config, page, content=(ROOT / path).read_text(encoding="utf-8")))
    for notebook in sorted((ROOT / NOTEBOOKS).glob("*.ipynb")):
        text, figures = notebook_page(json.loads(notebook.read_text(encoding="utf-8")), notebook.stem)
        files.append(File.generated(config, f"{TUTORIALS}/{notebook.stem}.md", content=text))
        for name, content in figures.items():
            files.append(File.generated(config, f"{TUTORIALS}/{name}", content=content))
    for folder, pattern in COPIED.items():
        for found in sorted((ROOT / folder).glob(pattern)):
            files.append(File.generated(config, f"{folder}/{found.name}", abs_src_path=str(found)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Rewrite links. The front page is wide."""
    if page.file.src_uri == "index.md":
        page.meta["hide"] = ["navigation", "toc"]
    return rewritten(markdown, source_of(page.file.src_uri), page.file.src_uri)


def on_page_content(content: str, page: Any, config: Any, files: Any) -> str:
    """Render equations."""
    return equations(content)
