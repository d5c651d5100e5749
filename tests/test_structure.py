"""What holds for the package as a whole: import order, public names, sizes, quiet and quick import, ignores.

The checkers are functions of source text, so that each is also shown to catch a planted offense.
"""

from __future__ import annotations

import ast
import io
import json
import re
import subprocess
import sys
import tokenize
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "lensteer"

#: The layout, top to bottom. A module (or folder, as one) imports from rooms above its own, or from its own.
ROOMS: list[tuple[str, list[str]]] = [
    ("files", ["errors", "_version", "files", "progress", "results", "arguments"]),
    ("values", ["behaviors", "organism", "tasks", "positions", "expressions", "metrics", "statistics"]),
    (
        "model",
        [
            "models",
            "twins",
            "caches",
            "rotary",
            "steering",
            "forward",
            "traces",
            "transcripts",
            "cache_steering",
            "endpoints",
            "generation",
        ],
    ),
    ("text", ["transcripts", "activations", "annotation"]),
    ("vectors", ["vectors", "contrast"]),
    ("where", ["attribution", "attention", "calibration"]),
    ("measure", ["evaluation", "ablation"]),
    (
        "doors",
        [
            "export",
            "adapters",
            "plots",
            "explorer",
            "report",
            "distributed",
            "pipeline",
            "planner",
            "doctor",
            "cli",
            "__main__",
        ],
    ),
]
ROOM_OF = {module: number for number, (_, modules) in enumerate(ROOMS) for module in modules}

MAX_NOTEBOOK_BYTES = 1_250_000  # with outputs; most of it is the PNG of each figure


def dotted(path: Path) -> str:
    """The module's dotted name below the package; a folder's is that of its `__init__`, the package's own is empty."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def library_files() -> dict[str, Path]:
    return {dotted(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def library_imports(source: str, package: str) -> list[str]:
    """Dotted names below `lensteer` that `source` imports, wherever the import stands; the public namespace is empty.

    `package` is the dotted package that holds the module. Of `from lensteer.a import b`, it is `a.b`.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            found += [f"{base}.{alias.name}" for alias in node.names]
    return [name.removeprefix("lensteer").removeprefix(".") for name in found if name.split(".")[0] == "lensteer"]


def import_offenses(unit: str, source: str, package: str = "lensteer") -> list[str]:
    """Violations of the layout by the imports of one module of `unit`, as messages."""
    offenses = []
    for name in library_imports(source, package):
        target = name.split(".")[0]
        if target not in ROOM_OF:
            offenses.append(f"{unit} imports lensteer.{target}, which is not in the layout")
        elif ROOM_OF[target] > ROOM_OF[unit]:
            offenses.append(f"{unit} imports {target}, which stands below it")
    return offenses


def circle(graph: dict[str, set[str]]) -> set[str]:
    """The nodes of a graph that are left when leaves are taken off again and again."""
    graph = dict(graph)
    while leaves := [node for node, targets in graph.items() if not targets & graph.keys()]:
        for node in leaves:
            del graph[node]
    return set(graph)


def package_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).parent.parts)


def test_the_layout_lists_every_module_and_no_other():
    assert {name.split(".")[0] for name in library_files()} - {""} == set(ROOM_OF), "ROOMS and the package differ"


def test_imports_go_downwards_or_stay_in_a_room():
    offenses = []
    for name, path in library_files().items():
        if name:
            offenses += import_offenses(name.split(".")[0], path.read_text(encoding="utf-8"), package_of(path))
    assert offenses == []


def test_no_import_circle_among_files_or_rooms():
    """Imports inside functions and for type checking count, too."""
    files = library_files()
    modules: dict[str, set[str]] = {}
    units: dict[str, set[str]] = {}
    for name, path in files.items():
        if not name:
            continue
        found = library_imports(path.read_text(encoding="utf-8"), package_of(path))
        # `a.b` is the module of that name, or a name in `a`
        targets = {target if target in files else target.rpartition(".")[0] for target in found} - {name}
        modules[name] = targets
        unit = name.split(".")[0]
        units.setdefault(unit, set()).update({target.split(".")[0] for target in targets} - {unit})
    assert circle(modules) == set()
    assert circle(units) == set()


def test_a_planted_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == {"a", "b", "c"}
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == set()


@pytest.mark.parametrize(
    ("unit", "source", "package", "offense"),
    [
        ("metrics", "import lensteer.steering", "lensteer", "steering, which stands below"),
        ("metrics", "from lensteer.steering import edit", "lensteer", "steering, which stands below"),
        ("metrics", "from lensteer import steering", "lensteer", "steering, which stands below"),
        ("metrics", "from .steering import edit", "lensteer", "steering, which stands below"),
        ("metrics", "def f():\n    from . import steering", "lensteer", "steering, which stands below"),
        ("organism", "from ..activations import Window", "lensteer.organism", "activations, which stands below"),
        ("plots", "import lensteer as ls", "lensteer", "imports lensteer., which is not in the layout"),
        ("plots", "from lensteer import evaluate", "lensteer", "lensteer.evaluate, which is not"),
        ("plots", "from lensteer.nowhere import f", "lensteer", "lensteer.nowhere, which is not"),
    ],
)
def test_planted_imports_are_caught(unit, source, package, offense):
    (found,) = import_offenses(unit, source, package)
    assert offense in found


@pytest.mark.parametrize(
    ("unit", "source", "package"),
    [
        ("steering", "from lensteer.models import resid_hook\nimport torch", "lensteer"),
        ("annotation", "from lensteer.activations import Window", "lensteer"),
        ("organism", "from .grammar import Grammar\nfrom ..errors import LensteerError", "lensteer.organism"),
        ("tasks", "def load():\n    from lensteer.organism import grammar", "lensteer"),
    ],
)
def test_rightful_imports_pass(unit, source, package):
    assert import_offenses(unit, source, package) == []


def test_public_names_are_exact():
    import lensteer

    declared = lensteer.__all__
    assert len(declared) == len(set(declared)), "a name stands twice in __all__"
    missing = [name for name in declared if not hasattr(lensteer, name)]
    assert missing == []
    # Submodules appear in the namespace as soon as anything imports them: public only where declared.
    public = {
        name for name, value in vars(lensteer).items() if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert public - set(declared) == set(), "public in lensteer, but not in __all__"


def test_notebooks_stay_small():
    sizes = {path.name: path.stat().st_size for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert sizes
    assert {name: n for name, n in sizes.items() if n > MAX_NOTEBOOK_BYTES} == {}, "smaller or fewer figures"


def test_the_citation_has_the_version():
    from lensteer._version import __version__

    assert f"version: {__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


#: Each takes a tenth of a second or more to import.
HEAVY = {"numpy", "pandas", "plotly", "scipy", "sklearn", "torch", "transformer_lens", "transformers"}

#: Run in a fresh interpreter: what importing a module adds to importing what it is built on.
IMPORT_PROBE = """
import contextlib, io, json, socket, sys
import torch, transformer_lens

calls = []

def refuse(*args, **kwargs):
    calls.append(repr(args))
    raise OSError("no network while importing")

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
said = io.StringIO()
before = set(sys.modules)
with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
    import {module}
    for name in getattr({module}, "__all__", ()):
        if name not in ("explore", "plots"):  # plotly
            getattr({module}, name)
packages = {{name.split(".")[0] for name in set(sys.modules) - before}} - sys.stdlib_module_names
print("PROBE" + json.dumps(dict(packages=sorted(packages), calls=calls, said=said.getvalue())))
"""


def probe_import(module: str, folder: Path | None = None) -> dict:
    run = subprocess.run(
        [sys.executable, "-c", IMPORT_PROBE.format(module=module)],
        capture_output=True,
        text=True,
        check=True,
        cwd=folder or ROOT,
    )
    return json.loads(run.stdout.rsplit("PROBE", 1)[1])


@pytest.mark.medium
@pytest.mark.parametrize("module", ["lensteer", "lensteer.export"])
def test_import_is_light_quiet_and_offline(module):
    """scipy.stats, scikit-learn and plotly take a second each; they are imported where they are used."""
    probe = probe_import(module)
    assert probe["calls"] == []
    assert probe["said"] == ""
    assert "lensteer" in probe["packages"]
    assert set(probe["packages"]) <= {"lazy_loader", "lensteer", "safetensors", "transformers"}


@pytest.mark.parametrize("module", ["lensteer", "lensteer.cli"])
def test_nothing_heavy_is_imported_before_it_is_used(module):
    code = f"import sys, {module}; print(sorted({{name.split('.')[0] for name in sys.modules}} & {HEAVY!r}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout == "[]\n"


@pytest.mark.medium
def test_the_import_probe_notices_a_noisy_heavy_module_that_calls_home(tmp_path):
    (tmp_path / "planted.py").write_text(
        "import socket, scipy.stats\n"
        "print('hello')\n"
        "try:\n    socket.create_connection(('127.0.0.1', 9))\nexcept OSError:\n    pass\n"
    )
    probe = probe_import("planted", tmp_path)
    assert probe["said"] == "hello\n"
    assert len(probe["calls"]) == 1
    assert "scipy" in probe["packages"]


def unsafe_calls(source: str) -> list[str]:
    """What could run code that somebody else wrote: pickles, evaluated text, a shell, a checkpoint's own code."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            found += [name for name in names if name.split(".")[0] in {"pickle", "marshal", "shelve", "dill", "joblib"}]
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if called in {"eval", "exec", "compile", "os.system", "os.popen", "yaml.load"}:
                found.append(called)
            if called == "torch.load" and options.get("weights_only") != "True":
                found.append("torch.load without weights_only=True")
            found += [f"{name}=True" for name in ("shell", "trust_remote_code") if options.get(name) == "True"]
    return found


def test_the_package_runs_nobodys_code():
    assert {
        path.name: found for path in PACKAGE.rglob("*.py") if (found := unsafe_calls(path.read_text("utf-8")))
    } == {}


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("import pickle", "pickle"),
        ("def f():\n    from joblib import load", "joblib"),
        ("x = eval(text)", "eval"),
        ("torch.load(path)", "torch.load without weights_only=True"),
        ("torch.load(path, weights_only=False)", "torch.load without weights_only=True"),
        ("subprocess.run(words, shell=True)", "shell=True"),
        ("f(name, trust_remote_code=True)", "trust_remote_code=True"),
    ],
)
def test_unsafe_calls_are_found(source, named):
    assert unsafe_calls(source) == [named]
    assert unsafe_calls("model.eval()\nre.compile(x)\ntorch.load(path, weights_only=True)") == []


def test_the_tests_that_hold_a_promise_exist():
    text = (ROOT / "docs" / "reliability.md").read_text("utf-8")
    named = re.findall(r"`(tests/\w+\.py)::(\w+)`", text)
    assert len(named) > 15
    assert [name for path, name in named if f"def {name}(" not in (ROOT / path).read_text("utf-8")] == []
    scripts = re.findall(r"`python (benchmarks/\w+\.py)", text)
    assert [path for path in scripts if not (ROOT / path).exists()] == []


IGNORE = re.compile(r"#\s*(?:type:\s*ignore|(?:ruff:\s*)?noqa)\b", re.IGNORECASE)
EXPLAINED = re.compile(
    r"#\s*(?:type:\s*ignore\[[\w\-, ]+\]|(?:ruff:\s*)?noqa:\s*[A-Z]+\d+(?:,\s*[A-Z]+\d+)*)"  # which rule
    r"\s*(?:#|--?|—|:)\s*\w.{4,}"  # why
)


def unexplained_ignores(source: str) -> list[str]:
    """Comments that silence a checker without naming the rule, or without a reason."""
    comments = [
        token.string
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    ]
    return [text for text in comments if len(IGNORE.findall(text)) != len(EXPLAINED.findall(text))]


@pytest.mark.medium
def test_every_ignore_has_its_code_and_reason():
    folders = ("lensteer", "tests", "analyses", "benchmarks")
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    offenses = {
        str(path.relative_to(ROOT)): found
        for path in files
        if (found := unexplained_ignores(path.read_text(encoding="utf-8")))
    }
    assert offenses == {}


@pytest.mark.parametrize(
    ("comment", "explained"),
    [
        ("# type: ignore", False),
        ("# type: ignore[arg-type]", False),
        ("# type: ignore[arg-type]  # the stub lacks None", True),
        ("# noqa", False),
        ("# noqa: F401", False),
        ("# noqa: F401  # imported for its side effect", True),
        ("# noqa: F401, E402 - set up first", True),
        ("# ruff: noqa: E501", False),
        ("# an ordinary comment", True),
    ],
)
def test_the_check_of_ignores(comment, explained):
    assert (unexplained_ignores(f"x = 1  {comment}\n") == []) is explained
