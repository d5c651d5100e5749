"""The explorer in a real browser, in JupyterLab and in marimo: what is done on the page, and what is seen on it."""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path

import nbformat
import pytest

pytest.importorskip("playwright", reason="the browser test needs playwright: pip install -e '.[test]'")
pytest.importorskip("jupyterlab", reason="the browser test needs jupyterlab: pip install -e '.[test]'")

from playwright.sync_api import expect, sync_playwright

from browser.kernel import only_kernel
from browser.lab import run_all, set_theme
from browser.pages import PATIENCE, Explorer, browser, chromium, eventually
from browser.servers import jupyter_lab, marimo_app

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(chromium() is None, reason="no browser: apt-get install chromium"),
]

HERE = Path(__file__).parent
NOTEBOOK = HERE.parent / "notebooks" / "4_steering_positions.ipynb"

#: Would set a variable of the page if any of it were taken for markup.
MARKUP = "<img src=x onerror=window.broken=1><script>window.broken=1</script>"

#: One more cell: a chain whose task, text and behavior are markup.
HOSTILE = f"""
from dataclasses import replace
one, text = chains[0], {MARKUP!r}
n, cut = len(text), one.offsets[10]
ls.explore(model, vectors, [replace(
    one,
    task=replace(one.task, id=text),
    response=one.response[:cut] + text + one.response[cut:],
    offsets=tuple(at + n * (i > 10) for i, at in enumerate(one.offsets)),
    spans=(ls.Span(text, one.prompt_length + 8, one.prompt_length + 12, one.offsets[8], one.offsets[12] + n),),
)])
"""

#: What the kernel knows beside the notebook's own names.
PRELUDE = """
import os
from lensteer.ablation import forced_effect

def measured():
    # Apart from the explorer: the shown plan on the shown chain, by the library.
    trace, plan = chains[explorer.state.trace], explorer.wait(120).plan
    nothing = ls.SteeringPlan(vectors["backtracking"], layer, 0.0)
    effect = forced_effect(model, trace, plan or nothing)
    values = {"kl": effect.kl.tolist(), "change": effect.change.tolist()}
    return {"first": trace.prompt_length, "total": effect.total, **values}

def continued():
    found = explorer.wait(120).result.continuation
    return [trace.response[(*trace.offsets, len(trace.response))[found.cut - trace.prompt_length]:]
            for trace in (found.unsteered, found.steered)]

first = explorer.state
"""


#: The explorer on a language model: vectors and classifier from labeled chains, shown is a chain of the model's own.
LANGUAGE = """
import lensteer as ls
from lensteer.annotation import fit_classifier
from lensteer.pipeline import read_chains

model = ls.load_model({model!r}, dtype="bfloat16")
labeled = read_chains([{chains!r}], model)
annotator = fit_classifier(labeled)
vectors = ls.fit_vectors(model, labeled[:40], window="span", negatives="all")
scores = ls.attribute(model, labeled[:10], vectors, behaviors=ls.STEERED, coefficient=0.5, max_spans=6)
tasks = ls.load_tasks("builtin", split="dev", n=2)
chains = ls.annotate(ls.generate_traces(model, tasks, temperature=0.6), annotator)
chains = sorted(chains, key=lambda chain: -len(chain.ids))
middle = ls.models.n_layers(model) // 2
explorer = ls.explore(model, vectors, chains, scores, dict.fromkeys(ls.STEERED, middle), annotator=annotator)
explorer.state = explorer.state.changed(dict(coefficient=1.25, expression="generated", temperature=0.6))
explorer
"""


@pytest.fixture(scope="module")
def playwright():
    with sync_playwright() as started:
        yield started


@pytest.fixture(scope="module")
def lab(playwright, tmp_path_factory):
    """A page with the notebook on it, all run, and a line into its kernel."""
    folder, root = tmp_path_factory.mktemp("lab"), tmp_path_factory.mktemp("notebooks")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        cell.update({"outputs": [], "execution_count": None} if cell.cell_type == "code" else {})
    notebook.cells.append(nbformat.v4.new_code_cell(HOSTILE))
    nbformat.write(notebook, root / NOTEBOOK.name)
    with jupyter_lab(folder, root) as server, browser(playwright, tmp_path_factory.mktemp("chromium")) as opened:
        run_all(opened, server, NOTEBOOK.name, len(notebook.cells))
        with only_kernel(folder / "jupyter_runtime_dir") as kernel:
            kernel.run(PRELUDE)
            pid = kernel.value("os.getpid()")
            yield opened, kernel
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{pid}").exists(), "the kernel outlives its server"


@pytest.fixture
def shown(lab):
    """The explorer in its first state; afterwards, nothing has gone wrong, or been asked of other machines."""
    opened, kernel = lab
    explorer = Explorer(opened.page.get_by_test_id("ls-explorer").first)
    kernel.run("explorer.stop(); explorer.state = first; explorer.wait(120)")
    expect(explorer.part("expression")).to_have_value("onsets")
    explorer.root.scroll_into_view_if_needed()
    yield explorer, kernel
    assert opened.errors == []
    assert opened.outside == []


def rounded(value):
    """To three decimals, or two digits if it is small."""
    return {"abs": 6e-4} if value >= 1e-3 else {"rel": 0.06}


def agrees(explorer, kernel):
    """What is chosen on the page is chosen in the kernel, and the strip draws what the library measures for it."""
    eventually(lambda: kernel.value("list(explorer.positions)"), explorer.selected())
    real = kernel.value("measured()")
    eventually(lambda: explorer.total() == pytest.approx(real["total"], **rounded(real["total"])), True)
    for name, values in (("kl", real["kl"]), *((way, real["change"]) for way in ("up", "down"))):
        most, height = max(map(abs, values)), 26 if name == "kl" else 14
        wanted = {real["first"] + i: v for i, v in enumerate(values) if name == "kl" or (v > 0) == (name == "up")}
        drawn = explorer.bars(name)
        assert set(drawn) <= set(wanted)
        for i, value in wanted.items():  # bars are drawn to two decimals
            assert drawn.get(i, 0) == pytest.approx(value, abs=0.006 * most / height + 1e-3 * most)
    return real


def test_the_first_choice_is_on_the_page(shown):
    explorer, kernel = shown
    real = agrees(explorer, kernel)
    assert real["total"] > 0
    assert explorer.selected() == kernel.value("list(explorer.positions)") != []
    assert explorer.part("layer-value").inner_text().startswith(f"{kernel.value('layer')} ")
    assert "selected" in explorer.part("layer-value").inner_text()
    assert explorer.part("curve").locator("polyline").count() == 1
    tokens = explorer.part("token").all_inner_texts()
    assert len(tokens) >= kernel.value("len(chains[0].ids)")
    assert explorer.part("code").text_content() == kernel.value("explorer.to_code()")


def test_positions_by_click_shift_click_and_drag(shown):
    explorer, kernel = shown
    a = kernel.value("chains[0].prompt_length") + 4
    explorer.part("select-none").click()
    eventually(explorer.selected, [])
    assert agrees(explorer, kernel)["total"] == 0
    explorer.token(a).click()
    explorer.token(a + 6).click()
    eventually(lambda: kernel.value("list(explorer.positions)"), [a, a + 6])
    explorer.token(a + 6).click()
    eventually(lambda: kernel.value("list(explorer.positions)"), [a])
    explorer.token(a).click()
    explorer.token(a).click()
    explorer.token(a + 3).click(modifiers=["Shift"])
    eventually(lambda: kernel.value("list(explorer.positions)"), [*range(a, a + 4)])
    agrees(explorer, kernel)

    mouse = explorer.root.page.mouse
    for i, move in ((a + 5, mouse.down), (a + 9, mouse.up)):
        box = explorer.token(i).bounding_box()
        mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, steps=10)
        move()
    eventually(lambda: kernel.value("list(explorer.positions)"), [*range(a, a + 4), *range(a + 5, a + 10)])
    agrees(explorer, kernel)
    assert explorer.part("expression").input_value().startswith("at([")


def test_positions_by_buttons_and_by_an_expression(shown):
    explorer, kernel = shown
    n = kernel.value("len(chains[0].ids)")
    before = explorer.selected()
    explorer.part("select-invert").click()
    eventually(explorer.selected, [i for i in range(n) if i not in before])
    explorer.part("select-all").click()
    eventually(explorer.selected, [*range(n)])
    explorer.part("select-behavior").click()
    own = "sorted(p for s in chains[0].spans if s.label == 'backtracking' for p in range(s.start, s.end))"
    eventually(explorer.selected, kernel.value(own))
    agrees(explorer, kernel)
    explorer.part("select-none").click()
    eventually(explorer.selected, [])
    span = kernel.value("[chains[0].spans[1].start, chains[0].spans[1].end]")
    explorer.token(span[0] + 1).click()
    explorer.part("select-sentence").click()
    eventually(explorer.selected, [*range(*span)])

    explorer.part("expression").fill("thinking & ~sentence_starts | at([5, 6])")
    explorer.part("expression").press("Enter")
    eventually(lambda: kernel.value("explorer.state.expression"), "thinking & ~sentence_starts | at([5, 6])")
    eventually(lambda: explorer.selected()[:2], [5, 6])
    agrees(explorer, kernel)
    for name in ("thinking", "sentence_starts", "onsets"):
        explorer.part(f"select-{name}").click()
        eventually(lambda: kernel.value("explorer.state.expression"), name)
    eventually(explorer.selected, before)


def test_a_bad_expression_is_answered_and_the_kernel_lives(shown):
    explorer, kernel = shown
    before = explorer.selected()
    for bad in ("thinking &", "__import__('os').getcwd()", "at([5, 'a'])"):
        explorer.part("expression").fill(bad)
        explorer.part("expression").press("Enter")
        expect(explorer.part("expression-error")).to_contain_text(bad.split("(")[0])
        expect(explorer.part("expression")).to_have_attribute("aria-invalid", "true")
        assert explorer.part("expression").input_value() == bad  # to be mended, not typed anew
    assert explorer.selected() == before
    assert kernel.value("explorer.state.expression") == "onsets"
    explorer.part("expression").fill("at([0, 1, 2])")
    explorer.part("expression").press("Enter")
    expect(explorer.part("expression-error")).to_be_hidden()
    eventually(explorer.selected, [0, 1, 2])
    explorer.part("cut").fill("1")
    explorer.part("cut").press("Enter")
    expect(explorer.part("error")).to_contain_text("cut=1")
    agrees(explorer, kernel)


def test_the_layer_and_the_coefficient_change_the_strip(shown):
    explorer, kernel = shown
    seen = [agrees(explorer, kernel)["total"]]
    explorer.part("layer").press("ArrowLeft")
    eventually(lambda: kernel.value("explorer.state.layer"), kernel.value("layer") - 1)
    seen.append(agrees(explorer, kernel)["total"])
    explorer.part("mark").filter(has_text="KL").first.click()
    spent = "ls.calibration.starting_coefficient(scores, 'backtracking', layer - 1, 0.1)"
    eventually(lambda: kernel.value("explorer.state.coefficient"), kernel.value(spent))
    explorer.slide("coefficient", -1)
    eventually(lambda: kernel.value("explorer.state.coefficient"), -1)
    seen.append(agrees(explorer, kernel)["total"])
    explorer.part("coefficient-number").fill("0.33")
    explorer.part("coefficient-number").press("Enter")
    explorer.part("operator").select_option("project_out")
    eventually(lambda: kernel.value("[explorer.state.coefficient, explorer.state.operator]"), [0.33, "project_out"])
    seen.append(agrees(explorer, kernel)["total"])
    explorer.part("behavior").select_option("uncertainty-estimation")
    explorer.part("trace").select_option("3")
    eventually(lambda: kernel.value("[explorer.state.behavior, explorer.state.trace]"), ["uncertainty-estimation", 3])
    eventually(lambda: explorer.part("chain").get_by_test_id("ls-token").count(), kernel.value("len(chains[3].ids)"))
    seen.append(agrees(explorer, kernel)["total"])
    assert len(set(seen)) == 5


def test_what_is_being_typed_is_not_overwritten(shown):
    explorer, kernel = shown
    for name, typed in (("max-tokens", "77"), ("coefficient-number", "0.7"), ("expression", "at([0, 1")):
        explorer.part(name).fill(typed)
        kernel.run("explorer.state = replace(explorer.state, layer=(explorer.state.layer + 1) % 3)")
        eventually(lambda: explorer.part("layer-value").inner_text()[0], str(kernel.value("explorer.state.layer")))
        explorer.wait()
        assert explorer.part(name).input_value() == typed
    sent = kernel.value("sum(explorer.ack.values())")
    explorer.part("expression").fill("at([0, 1])")
    explorer.part("expression").press("Enter")
    eventually(lambda: kernel.value("list(explorer.positions)"), [0, 1])
    explorer.part("select-all").click()
    eventually(lambda: kernel.value("explorer.state.expression"), "everywhere")
    assert kernel.value("sum(explorer.ack.values())") == sent + 2  # Enter and the button: the text was sent once
    assert kernel.value("[explorer.state.max_new_tokens, explorer.state.coefficient]") == [77, 0.7]


def test_a_layer_is_seen_soon(shown, record_property, capsys):
    explorer, kernel = shown
    n = len(kernel.value("list(vectors.layers)"))
    times = explorer.latencies([i % n for i in range(11)])
    agrees(explorer, kernel)
    record_property("milliseconds", times)
    with capsys.disabled():
        print(f"\nlayer to strip: first {times[0]:.0f} ms, median of 10: {statistics.median(times[1:]):.0f} ms")
    assert statistics.median(times[1:]) < 2000  # 200 are wanted; a machine may be busy


def test_a_continuation_runs_and_is_stopped(shown):
    explorer, kernel = shown
    explorer.part("max-tokens").fill("40")
    explorer.part("continue").click()
    for name in ("unsteered", "steered"):
        expect(explorer.part(name)).to_have_attribute("data-running", "false")
        expect(explorer.part(name)).not_to_be_empty()
    texts = [explorer.part(name).text_content() for name in ("unsteered", "steered")]
    assert texts == kernel.value("continued()")
    assert explorer.part("unsteered").get_by_test_id("ls-piece").first.get_attribute("data-label") == "initializing"

    explorer.part("select-all").click()
    explorer.part("coefficient-number").fill("6")  # so much that no chain ends by itself
    explorer.part("coefficient-number").press("Enter")
    expect(explorer.part("steered")).to_have_attribute("data-stale", "true")
    explorer.part("max-tokens").fill("4000")
    explorer.part("continue").click()
    expect(explorer.part("steered")).to_have_attribute("data-running", "true")
    eventually(lambda: len(explorer.part("steered").text_content()) > 20, True)
    explorer.part("stop").click()
    expect(explorer.part("progress")).to_be_hidden()
    expect(explorer.part("stop")).to_be_disabled()
    expect(explorer.part("steered")).to_have_attribute("data-running", "false")
    assert kernel.value("explorer.wait(60).result.continuation") is None
    assert "stopped" in explorer.root.inner_text()
    explorer.part("max-tokens").fill("8")
    explorer.part("continue").click()
    eventually(lambda: kernel.value("explorer.wait(60).result.continuation is not None"), True)
    eventually(explorer.part("steered").text_content, kernel.value("continued()")[1])


def test_leaving_out_ranks_on_the_page(shown):
    explorer, kernel = shown
    explorer.part("rank").click()
    expect(explorer.part("rank-item").first).to_be_visible()
    real = kernel.value("dict(zip((r := explorer.wait(120).result.ranking).names, r.importance))")
    names = explorer.part("rank-item").evaluate_all("nodes => nodes.map((node) => node.dataset.group)")
    assert names == sorted(real, key=lambda name: -abs(real[name]))
    assert f"{real[names[0]]:+.3f}" in explorer.part("rank-item").first.inner_text()
    most = max(map(abs, real.values()))
    assert explorer.part("bar").count() == sum(abs(value) >= 0.02 * most for value in real.values()) > 0
    explorer.part("select-none").click()
    expect(explorer.part("ranking")).to_have_attribute("data-stale", "true")
    expect(explorer.part("bar")).to_have_count(0)
    explorer.part("rank").click()
    expect(explorer.part("error")).to_contain_text("nothing to leave out")


def test_markup_in_a_chain_stays_text(lab, shown):
    page = lab[0].page
    explorer = Explorer(page.get_by_test_id("ls-explorer").nth(1))
    explorer.root.scroll_into_view_if_needed()
    explorer.wait()
    texts = explorer.part("token").all_text_contents()
    assert sum(MARKUP in text for text in texts) == 1
    assert MARKUP in explorer.part("legend").text_content()
    assert MARKUP in explorer.part("trace").text_content()
    explorer.part("select-none").click()
    eventually(explorer.selected, [])
    explorer.part("token").filter(has_text=MARKUP).click()
    explorer.part("rank").click()
    expect(explorer.part("rank-item")).to_have_count(1)
    assert MARKUP in explorer.part("ranking").text_content()
    assert explorer.root.locator("img, script").count() == 0
    assert page.evaluate("window.broken") is None


def test_by_keyboard_only(lab, shown):
    explorer, kernel = shown
    page, cells = lab[0].page, lab[0].page.locator(".jp-Notebook .jp-Cell").count()
    explorer.part("select-none").focus()
    page.keyboard.press("Enter")
    eventually(explorer.selected, [])
    focused = "() => document.activeElement.dataset.testid"
    for _ in range(12):
        page.keyboard.press("Tab")
        if page.evaluate(focused) == "ls-token":
            break
    at = int(page.evaluate("() => document.activeElement.dataset.i"))
    assert at == kernel.value("chains[0].prompt_length")
    for key in ("ArrowRight", "Space", "ArrowRight", "ArrowRight", "Shift+ArrowRight", "Shift+ArrowRight"):
        page.keyboard.press(key)
    eventually(lambda: kernel.value("list(explorer.positions)"), [at + 1, at + 3, at + 4, at + 5])
    for key in ("Home", "Space", "End", "ArrowUp"):
        page.keyboard.press(key)
    eventually(lambda: kernel.value("list(explorer.positions)")[0], 0)
    starts = kernel.value("[*explorer.chain['starts']]")
    assert page.evaluate("() => Number(document.activeElement.dataset.i)") == starts[-1]
    for key in ("b", "a", "d", "d", "x"):  # commands of the notebook
        page.keyboard.press(key)
    while page.evaluate(focused) != "ls-continue":
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    eventually(lambda: explorer.part("steered").text_content() != "", True)
    agrees(explorer, kernel)
    assert page.locator(".jp-Notebook .jp-Cell").count() == cells
    eventually(lambda: explorer.part("progress").is_hidden(), True)


def test_a_sentence_at_a_time(lab, shown):
    explorer, kernel = shown
    page = lab[0].page
    sentences = kernel.value("[[span.start, span.end] for span in chains[0].spans]")
    explorer.part("select-none").click()
    eventually(explorer.selected, [])
    tag = explorer.part("chain").locator(f'[data-of="{sentences[2][0]}"]')
    tag.click()
    eventually(lambda: kernel.value("list(explorer.positions)"), [*range(*sentences[2])])
    page.keyboard.press("ArrowDown")  # to the next sentence
    page.keyboard.press("Enter")
    eventually(explorer.selected, [*range(sentences[2][0], sentences[3][1])])
    tag.click()
    eventually(explorer.selected, [*range(*sentences[3])])
    agrees(explorer, kernel)


def test_where_most_is_chosen_the_behaviors_keep_their_colors(shown):
    explorer, kernel = shown
    style = "node => getComputedStyle(node).backgroundColor"
    begin = kernel.value("chains[0].spans[1].start + 1")
    plain = explorer.token(begin).evaluate(style)
    explorer.token(begin).click()
    eventually(lambda: explorer.token(begin).evaluate(style) != plain, True)
    explorer.part("select-all").click()
    eventually(lambda: explorer.token(begin).evaluate(style), plain)
    explorer.part("select-none").click()
    eventually(explorer.selected, [])


def test_both_themes(lab, shown, tmp_path):
    explorer, _ = shown
    folder = Path(os.environ.get("LENSTEER_SCREENSHOTS", tmp_path))
    lab[0].page.set_viewport_size({"width": 1280, "height": 1600})  # all of it on one picture
    for theme in ("dark", "light"):
        set_theme(lab[0], theme)
        expect(explorer.root).to_have_attribute("data-theme", theme)
        explorer.root.screenshot(path=folder / f"explorer_{theme}.png")


def test_a_long_chain_of_a_language_model(playwright, tmp_path, reference_folder, capsys):
    """With LENSTEER_SCREENSHOTS=FOLDER it makes analyses/figures/explorer_language.png."""
    model = Path(os.environ.get("LENSTEER_REAL") or "none") / "mini-r1"
    if not model.is_dir():
        pytest.skip("LENSTEER_REAL has no mini-r1")
    labeled = reference_folder / "r1_qwen_1.5b_annotated_chains.jsonl"
    cell = nbformat.v4.new_code_cell(LANGUAGE.format(model=str(model.resolve()), chains=str(labeled.resolve())))
    kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    (tmp_path / "root").mkdir()
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata={"kernelspec": kernelspec})
    nbformat.write(notebook, tmp_path / "root" / "language.ipynb")
    with (
        jupyter_lab(tmp_path / "lab", tmp_path / "root") as server,
        browser(playwright, tmp_path / "chromium") as opened,
    ):
        run_all(opened, server, "language.ipynb", 1, patience=10 * PATIENCE)
        page, explorer = opened.page, Explorer(opened.page.get_by_test_id("ls-explorer"))
        page.set_viewport_size({"width": 1440, "height": 2000})  # all of it on one picture
        explorer.wait()
        with only_kernel(tmp_path / "lab" / "jupyter_runtime_dir") as kernel:
            n, starts = kernel.value("len(chains[0].ids)"), kernel.value("explorer.chain['starts']")
            assert n > 400
            assert 0 < float(explorer.part("view").get_attribute("width")) < n  # a part of it is in sight
            focused = "() => Number(document.activeElement.dataset.i)"
            box = explorer.part("strip").bounding_box()
            explorer.part("strip").click(position={"x": 0.5 * box["width"], "y": 20})
            at = page.evaluate(focused)
            assert at == pytest.approx(n / 2, abs=0.01 * n)
            eventually(lambda: float(explorer.part("view").get_attribute("x")) > 0, True)
            view = [float(explorer.part("view").get_attribute(name)) for name in ("x", "width")]
            assert view[0] < at < sum(view)
            assert page.evaluate("window.scrollY") == 0
            page.keyboard.press("PageDown")
            assert page.evaluate(focused) > at + 20
            page.keyboard.press("PageUp")
            assert page.evaluate(focused) == pytest.approx(at, abs=60)  # a line
            explorer.part("select-none").click()
            eventually(explorer.selected, [])
            explorer.token(at).focus()
            page.keyboard.press("Enter")
            own = [max(s for s in starts if s <= at), min([s for s in starts if s > at], default=n)]
            eventually(explorer.selected, [*range(*own)])
            explorer.wait()
            measured = kernel.value("ls.ablation.forced_effect(model, chains[0], explorer.wait(120).plan).total")
            assert explorer.total() == pytest.approx(measured, rel=0.1, abs=0.01)  # of bfloat16 logits
            explorer.part("select-onsets").click()
            explorer.wait()
            middle = kernel.value("middle")
            times = explorer.latencies([middle - 1, middle] * 4)
            with capsys.disabled():
                print(f"\nmini-R1, {n} tokens, layer to strip: median {statistics.median(times):.0f} ms")

            kernel.run("explorer.state = explorer.state.changed(dict(expression='generated', max_new_tokens=120))")
            first = kernel.value("next(span.start for span in chains[0].spans[6:])")
            explorer.part("cut").fill(str(first))
            explorer.part("cut").press("Enter")
            eventually(lambda: kernel.value("explorer.state.cut"), first)
            kernel.run("explorer.run_continuation(); explorer.wait(600)")
            for name in ("unsteered", "steered"):
                expect(explorer.part(name)).to_have_attribute("data-running", "false")
                expect(explorer.part(name)).not_to_be_empty()
            explorer.wait()
            explorer.token(first).focus()
            folder = Path(os.environ.get("LENSTEER_SCREENSHOTS", tmp_path))
            explorer.root.screenshot(path=folder / "explorer_language.png")
        assert opened.errors == []
        assert opened.outside == []


def test_in_marimo(playwright, tmp_path):
    pytest.importorskip("marimo", reason="not installed: pip install -e '.[test]'")
    (tmp_path / "server").mkdir()
    with (
        marimo_app(tmp_path / "server", HERE / "browser" / "explorer_app.py") as server,
        browser(playwright, tmp_path / "chromium") as opened,
    ):
        opened.page.goto(f"{server.url}?access_token={server.token}")
        explorer = Explorer(opened.page.get_by_test_id("ls-explorer"))
        explorer.root.wait_for(timeout=3 * PATIENCE)  # the notebook runs when its page is opened
        explorer.wait()
        seen = explorer.bars("kl")
        n = explorer.part("token").count()
        explorer.part("select-none").click()
        eventually(explorer.selected, [])
        explorer.part("layer").press("ArrowLeft")
        explorer.part("select-onsets").click()
        eventually(lambda: explorer.selected() != [], True)
        explorer.wait()
        eventually(lambda: bool(explorer.bars("kl")), True)
        assert explorer.bars("kl") != seen
        assert n == explorer.part("token").count()
        explorer.root.screenshot(path=Path(os.environ.get("LENSTEER_SCREENSHOTS", tmp_path)) / "explorer_marimo.png")
        assert opened.errors == []
        assert opened.outside == []
