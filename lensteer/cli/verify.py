"""`lensteer verify`: whether a served model has the effect that a plan promises, once or again and again."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from lensteer.annotation import Annotator, Judge, SentenceClassifier, grammar, rules
from lensteer.cli.options import Seed, System, Thought
from lensteer.errors import LensteerError
from lensteer.export import Asking, Endpoint, read_plan
from lensteer.export import verify as verify_endpoint
from lensteer.pipeline.own import is_own, load_own
from lensteer.tasks import load_tasks

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def seconds(text: str) -> float:
    """`30s`, `10m`, `1h` or `1d` as seconds.

    Raises:
        LensteerError: another form, or no time at all.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text.strip())
    if not found or not float(found[1]):
        raise LensteerError(f"{text!r} is no time: write one such as 30s, 10m, 1h or 1d")
    return float(found[1]) * _UNITS[found[2]]


def _annotator(name: str, classifier: str | None, out: Path) -> Annotator:
    if name == "classifier":
        if classifier is None:
            raise LensteerError("--annotator classifier needs --classifier FILE, which `lensteer annotate fit` writes")
        found = SentenceClassifier.load(classifier)
        if found.layer is not None:
            raise LensteerError(f"{classifier!r} reads activations, which a server does not give: fit one without")
        return found
    if name == "judge":
        return Judge(cache=out / "judge")
    if is_own(name):
        own: Annotator = load_own(name)
        return own
    if name not in ("grammar", "rules"):
        raise LensteerError(f"no annotator {name!r}: choose grammar, rules, classifier, judge or FILE.py:NAME")
    return grammar if name == "grammar" else rules


def verify(
    endpoint: Annotated[str, typer.Option(help="The server with the plan, such as http://localhost:8080/v1.")],
    plan: Annotated[str, typer.Option(help="A folder that `lensteer export folder` wrote, or a name on the hub.")],
    unsteered: Annotated[
        str,
        typer.Option(help="The server without the plan, or a file of recorded answers (look-0001/unsteered.jsonl)."),
    ],
    out: Annotated[Path, typer.Option(help="Folder of answers and history; the same command resumes in it.")],
    served_model: Annotated[
        str, typer.Option(help="Its name at --endpoint.", show_default="the only one that is served")
    ] = "",
    unsteered_model: Annotated[
        str, typer.Option(help="Its name at --unsteered.", show_default="the only one that is served")
    ] = "",
    behavior: Annotated[str | None, typer.Option(help="Which, if the plan steers along several.")] = None,
    annotator: Annotated[
        str, typer.Option(help="What labels the answers' sentences: rules, classifier, judge, grammar or FILE.py:NAME.")
    ] = "rules",
    classifier: Annotated[str | None, typer.Option(help="For --annotator classifier.")] = None,
    tasks: Annotated[
        str, typer.Option(help="'builtin', 'organism' or a file; its held-out split is asked, as in `lensteer run`.")
    ] = "builtin",
    n_tasks: Annotated[int | None, typer.Option(help="At most so many.", show_default="all that are held out")] = None,
    n: Annotated[int, typer.Option("--n", help="Answers per task.")] = 4,
    temperature: Annotated[
        float | None, typer.Option(help="0 is greedy.", show_default="as in the evaluation, else 0.8")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="As in `lensteer run`.", show_default="as in the evaluation, else 1")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Most tokens of an answer.", show_default="as in the evaluation, else 400")
    ] = None,
    system: System = "",
    thought: Thought = "auto",
    every: Annotated[str | None, typer.Option(help="Look again each 30s, 10m, 1h or 1d, until an alarm.")] = None,
    looks: Annotated[
        int | None, typer.Option(help="How many looks.", show_default="1; with --every until an alarm")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds without data after which a try fails.")] = 120.0,
    retries: Annotated[int, typer.Option(help="Of a request that failed.")] = 2,
    concurrency: Annotated[int, typer.Option(help="Requests at a time.")] = 4,
    seed: Seed = 0,
) -> None:
    """Ask a served model held-out tasks, and say whether a plan's promised effect is there.

    Ends with status 0 if the effect is there, with 1 if it is not, or if it has changed since the first look.
    """
    found = read_plan(plan)
    measured = next((edit.evidence for edit in found.plan.edits if edit.evidence is not None), None)
    drawn = {} if measured is None else measured.sampling
    asking = Asking(
        n_samples=n,
        temperature=float(drawn.get("temperature", 0.8)) if temperature is None else temperature,
        top_p=float(drawn.get("top_p", 1.0)) if top_p is None else top_p,
        max_new_tokens=int(drawn.get("max_new_tokens", 400)) if max_new_tokens is None else max_new_tokens,
        system=system or str(drawn.get("system", "")),
        seed=seed,
    )

    def server(url: str, name: str) -> Endpoint:
        return Endpoint(url=url, model=name, timeout=timeout, retries=retries, concurrency=concurrency)

    other = server(unsteered, unsteered_model) if "://" in unsteered else unsteered
    with tqdm(total=0, unit="answer", disable=None, leave=False) as bar:

        def step(done: int, total: int) -> None:
            bar.total, bar.n = total, done
            bar.refresh()

        result = verify_endpoint(
            found.plan,
            server(endpoint, served_model),
            load_tasks(tasks, split="test", n=n_tasks),
            _annotator(annotator, classifier, out),
            out,
            unsteered=other,
            model=found.model.name,
            behavior=behavior,
            asking=asking,
            thought=thought,
            every=None if every is None else seconds(every),
            looks=looks,
            announce=lambda text: tqdm.write(text),
            step=step,
        )
    typer.echo(f"{result}\nanswers and history: {out.resolve()}")
    if result.alarm or not result.there:
        raise typer.Exit(1)
