"""The documentation site: its pages, links, commands and code, without building it."""

from __future__ import annotations

import ast
import base64
import importlib.util
import inspect
import json
import posixpath
import re
import shlex
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md"))
NAMES = [str(path.relative_to(DOCS)) for path in PAGES]
CONFIG = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
#: `FENCE language ... FENCE`, at the beginning of a line; the language may have attributes after it.
BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def loaded(name: str) -> ModuleType:
    """A module of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hooks = loaded("hooks")


def blocks(language: str) -> list[Any]:
    """All code blocks of a language, each with the page that it is on."""
    found = []
    for path in PAGES:
        for number, (kind, text) in enumerate(BLOCK.findall(path.read_text(encoding="utf-8"))):
            if kind == language:
                found.append(pytest.param(text, id=f"{path.relative_to(DOCS)}-{number}"))
    return found


def in_nav() -> list[str]:
    """The pages that the navigation names."""
    return re.findall(r"([\w/-]+\.md)$", CONFIG.split("\nnav:\n")[1], re.MULTILINE)


def test_the_navigation_has_every_page_once_and_no_other():
    assert sorted(in_nav()) == sorted([*NAMES, *hooks.generated_pages()])


def test_a_pages_source_and_place_are_inverse():
    for page in in_nav():
        source = hooks.source_of(page)
        assert (ROOT / source).exists()
        assert hooks.placed(source) == page
    assert hooks.placed("README.md") == "index.md"
    assert hooks.placed("lensteer/errors.py") is None
    assert hooks.placed("docs/hooks.py") is None


@pytest.mark.parametrize("page", in_nav())
def test_links_lead_somewhere_in_the_repository_and_in_the_site(page):
    """`rewritten` raises for a file that does not exist; what it returns is in the site."""
    source = ROOT / hooks.source_of(page)
    if source.suffix == ".ipynb":
        cells = json.loads(source.read_text(encoding="utf-8"))["cells"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    else:
        text = source.read_text(encoding="utf-8")
    site = hooks.rewritten(text, hooks.source_of(page), page)
    sources = {hooks.placed(hooks.source_of(each)) for each in in_nav()}
    for target in re.findall(r"\]\((?![a-z]+:|#)([^)\s#]+)", re.sub(r"```.*?```|`[^`\n]*`", "", site, flags=re.DOTALL)):
        moved = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
        assert moved in sources or hooks.placed(moved) == moved, (page, target)


def headings(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    plain = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.+)$", plain, re.MULTILINE)
    bare = (re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).lower()) for title in titles)
    return {title.strip().replace(" ", "-") for title in bare}


def test_anchors_exist():
    missing = []
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        for target, anchor in re.findall(r"\]\((?![a-z]+:)([^)\s#]*)#([^)\s]+)\)", text):
            page = (path.parent / target).resolve() if target else path
            if page.suffix == ".md" and anchor not in headings(page.read_text(encoding="utf-8")):
                missing.append((path.name, target, anchor))
    assert missing == []


def test_links_are_rewritten_but_code_is_not():
    text = "[a](choices.md#layer) ![f](../analyses/figures/mini_r1_run.png) [`x`](../lensteer/errors.py) `[b](no.md)`"
    found = hooks.rewritten(text, "docs/page.md", "page.md")
    assert (
        found == "[a](choices.md#layer) ![f](analyses/figures/mini_r1_run.png) `x` (`lensteer/errors.py`) `[b](no.md)`"
    )
    fenced = "```\n[a](no.md)\n```"
    assert hooks.rewritten(fenced, "docs/page.md", "page.md") == fenced
    assert hooks.rewritten("[log](LOG.md)", "analyses/x.md", "deep/x.md") == "[log](../log.md)"
    with pytest.raises(ValueError, match="which does not exist"):
        hooks.rewritten("[a](no.md)", "docs/page.md", "page.md")
    with pytest.raises(ValueError, match="not in the site"):
        hooks.rewritten("![a](../mkdocs.yml)", "docs/page.md", "page.md")


def test_a_notebook_becomes_a_page_with_its_outputs():
    def cell(kind: str, source: str, *outputs: dict[str, Any]) -> dict[str, Any]:
        return {"cell_type": kind, "source": [source], "outputs": list(outputs)}

    png = {"data": {"image/png": base64.b64encode(b"png").decode(), "text/plain": ["Figure"]}}
    table = {"data": {"text/html": ["<style scoped>x</style>\n<table></table>"], "text/plain": ["1"]}}
    out, err = ({"output_type": "stream", "name": name, "text": [name]} for name in ("stdout", "stderr"))
    page, figures = hooks.notebook_page(
        {"cells": [cell("markdown", "# Title"), cell("code", "f()", png, table, out, err), cell("code", "")]}, "1_a"
    )
    assert figures == {"1_a_0.png": b"png"}
    assert page.startswith("# Title\n\n")
    assert "```python\nf()\n```" in page
    assert 'src="1_a_0.png"' in page
    assert "<table></table>" in page
    assert "style" not in page
    assert "stdout" in page
    assert "stderr" not in page


def test_equations_become_mathml():
    pytest.importorskip("latex2mathml", reason="the extra `docs` is not installed")
    page = hooks.equations(
        '<p><span class="arithmatex">\\(a &lt; b\\)</span></p><div class="arithmatex">\\[\nx\n\\]</div>'
    )
    assert page.count("<math") == 2
    assert 'display="block"' in page
    assert re.search(r"<mo>(&lt;|&#x0*3C;)</mo>", page)
    assert "arithmatex" not in page


def test_equations_are_closed():
    """An odd number of dollar signs would turn prose into an equation."""
    for path in PAGES:
        for paragraph in BLOCK.sub("", path.read_text(encoding="utf-8")).split("\n\n"):
            assert re.sub(r"`[^`]*`", "", paragraph).count("$") % 2 == 0, (path.name, paragraph[:80])


def reference_names() -> set[str]:
    """What the reference pages document, as dotted names."""
    text = "".join(path.read_text(encoding="utf-8") for path in (DOCS / "reference").glob("*.md"))
    return set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))


def test_every_public_name_is_in_the_reference():
    """Functions, classes and values; of a module (`ls.plots`), that some of its names are."""
    stub = (ROOT / "lensteer" / "__init__.pyi").read_text(encoding="utf-8")
    documented = reference_names()
    last = {name.rpartition(".")[2] for name in documented}
    missing = []
    for node in ast.parse(stub).body:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                module = node.module is None
                known = any(f"lensteer.{alias.name}." in name for name in documented) if module else alias.name in last
                if not known and alias.name not in ("__version__", "organism"):
                    missing.append(alias.name)
    assert missing == []


@pytest.mark.parametrize("name", sorted(reference_names()))
def test_names_in_the_reference_exist(name):
    module, _, attribute = name.rpartition(".")
    if module in ("lensteer.adapters.lm_eval", "lensteer.adapters.inspect_ai"):  # need packages that are optional
        source = ROOT / (module.replace(".", "/") + ".py")
        assert re.search(rf"^(?:class|def) {attribute}\b", source.read_text(encoding="utf-8"), re.MULTILINE)
    else:
        assert hasattr(import_module(module), attribute)


def test_the_page_of_commands_is_up_to_date():
    command_line = loaded("command_line")
    found = (DOCS / "reference" / "command-line.md").read_text(encoding="utf-8")
    assert found == command_line.page(), "run: python docs/command_line.py"


def calls() -> list[Any]:
    """Every `lensteer …` line of the pages' shell blocks, as words; lines may end in a backslash."""
    found = []
    for block in blocks("bash"):
        for line in block.values[0].replace("\\\n", " ").splitlines():
            if line.startswith("lensteer "):
                found.append(pytest.param(shlex.split(line, comments=True)[1:], id=f"{block.id}:{line[:60]}"))
    return found


@pytest.mark.parametrize("words", calls())
def test_commands_and_options_exist(words):
    """Parsed as the command line does, up to the call itself."""
    from typer.main import get_command

    from lensteer.cli.commands import app

    command: Any = get_command(app)
    name = "lensteer"
    while getattr(command, "commands", None) and words and words[0] in command.commands:
        name, command, words = f"{name} {words[0]}", command.commands[words[0]], words[1:]
    assert name != "lensteer", f"no command {words[0]!r}"
    command.make_context(name, list(words))


def mentioned() -> list[Any]:
    """Options in the prose, such as `--n-test`, by page."""
    found = []
    for path in PAGES:
        text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        if path.name != "command-line.md":
            found += [
                pytest.param(each, id=f"{path.name}:{each}") for each in sorted(set(re.findall(r"`(--[\w-]+)", text)))
            ]
    return found


#: Options of other programs that the pages name.
FOREIGN = {
    "--apply_chat_template", "--batch_size", "--control-vector-layer-range", "--enable-steer-vector", "--model_args",
    "--steer-algorithms", "--use_cache", "--folder",
}  # fmt: skip


@pytest.mark.parametrize("option", mentioned())
def test_options_in_the_prose_exist(option):
    known = set(re.findall(r"`(--[\w-]+)`", (DOCS / "reference" / "command-line.md").read_text(encoding="utf-8")))
    assert option in known | FOREIGN


@pytest.mark.parametrize("code", blocks("python"))
def test_python_compiles_and_its_names_exist(code):
    import lensteer as ls

    for node in ast.walk(ast.parse(code)):
        chain = []
        while isinstance(node, ast.Attribute):
            chain.insert(0, node.attr)
            node = node.value
        if isinstance(node, ast.Name) and node.id == "ls" and chain:
            assert hasattr(ls, chain[0]), f"no ls.{chain[0]}"
            if chain[0] in ("export", "plots", "models", "positions", "steering", "evaluation") and len(chain) > 1:
                assert hasattr(getattr(ls, chain[0]), chain[1]), f"no ls.{'.'.join(chain[:2])}"
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lensteer":
            if node.module.split(".")[:2] == ["lensteer", "adapters"]:
                continue
            module = import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names)


def keywords(code: str) -> list[tuple[str, list[str]]]:
    """Calls of `ls.NAME(...)` with their keywords."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
        ):
            if node.func.value.id == "ls":
                found.append((node.func.attr, [each.arg for each in node.keywords if each.arg]))
    return found


@pytest.mark.parametrize("code", blocks("python"))
def test_keywords_of_calls_exist(code):
    import lensteer as ls

    for name, given in keywords(code):
        known = inspect.signature(getattr(ls, name)).parameters
        assert set(given) <= set(known), (name, set(given) - set(known))


def test_the_site_can_be_built_where_mkdocs_is():
    """The configuration is read; `make docs` builds the site, strictly."""
    pytest.importorskip("mkdocs", reason="the extra `docs` is not installed")
    from mkdocs.config import load_config

    config = load_config(str(ROOT / "mkdocs.yml"))
    assert config.strict
    assert not [each for each in ("https:", "//") if any(each in str(url) for url in config.extra_javascript)]
