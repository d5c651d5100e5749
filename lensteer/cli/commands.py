"""The command line: `lensteer demo`, `lensteer run`, and a command for each stage of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from lensteer.cli.annotating import annotating
from lensteer.cli.caching import caching
from lensteer.cli.groups import Commands, Device, Dtype, Model, Seed, Tasks, tasks_for
from lensteer.pipeline import DEMO, STAGES, Run, RunConfig, complete, run_stage

app = typer.Typer(
    cls=Commands, help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)

Out = Annotated[Path, typer.Option(help="The run's folder.")]
Annotator = Annotated[
    str | None, typer.Option(help="grammar, rules, classifier or judge; default: what fits the tasks.")
]
Classifier = Annotated[str | None, typer.Option(help="The file that `lensteer annotate fit` wrote.")]
Chains = Annotated[str | None, typer.Option(help="Chains to use instead of generating any: traces, or annotated ones.")]
Small = Annotated[bool, typer.Option("--small", help="The demo's sizes instead of the full run's.")]
Window = Annotated[str, typer.Option(help="Where a behavior is read: onset, onset±k, span or published.")]
Negatives = Annotated[str, typer.Option(help="What it is compared with: spans, all, rest or same_trace.")]
Scope = Annotated[str, typer.Option(help="Where steering acts: onsets, thinking, generated, everywhere, ...")]


def _size(name: str, what: str) -> Any:
    """A number whose default hangs on the run's size."""
    return typer.Option(help=what, show_default=f"{getattr(RunConfig(), name)}; small: {getattr(DEMO, name)}")


@app.command()
def demo(out: Out = Path("lensteer-demo")) -> None:
    """The whole story on the embedded model, small enough for five minutes on two cores."""
    _say_where(complete(Run.open(out, DEMO, progress=True), typer.echo))


def _beginning(doc: str, go: Callable[[Run], object]) -> Callable[..., None]:
    """A command that begins a run (or goes on with it) and then does `go`."""

    def command(
        out: Out,
        model: Model = None,
        tasks: Tasks = None,
        small: Small = False,
        window: Window = "onset",
        negatives: Negatives = "spans",
        scope: Scope = "onsets",
        seed: Seed = 0,
        annotator: Annotator = None,
        classifier: Classifier = None,
        chains: Chains = None,
        dtype: Dtype = "float32",
        device: Device = None,
        n_train: Annotated[int | None, _size("n_train", "Tasks that vectors are fitted on.")] = None,
        n_dev: Annotated[int | None, _size("n_dev", "Tasks that coefficients are chosen on.")] = None,
        n_test: Annotated[int | None, _size("n_test", "Held-out tasks.")] = None,
        n_samples: Annotated[int | None, _size("n_samples", "Chains per held-out task and arm.")] = None,
        n_random: Annotated[int | None, _size("n_random", "Random vectors per steered layer.")] = None,
        n_nulls: Annotated[int | None, _size("n_nulls", "Control vectors beside the scores.")] = None,
        max_new_tokens: Annotated[int | None, _size("max_new_tokens", "Per chain.")] = None,
        batch_size: Annotated[int | None, _size("batch_size", "Chains that are made together.")] = None,
    ) -> None:
        sizes = DEMO if small else RunConfig()
        asked: dict[str, Any] = dict(
            model=model,
            tasks=tasks_for(model, tasks),
            window=window,
            negatives=negatives,
            scope=scope,
            seed=seed,
            annotator=annotator,
            classifier=classifier,
            chains=chains,
            dtype=dtype,
            device=device,
        )
        numbers = dict(
            n_train=n_train,
            n_dev=n_dev,
            n_test=n_test,
            n_samples=n_samples,
            n_random=n_random,
            n_nulls=n_nulls,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
        )
        asked |= {name: value for name, value in numbers.items() if value is not None}
        go(Run.open(out, replace(sizes, **asked), progress=True))

    command.__doc__ = doc
    return command


def _stage_command(name: str) -> Callable[[Path], None]:
    def command(out: Out) -> None:
        opened = Run.open(out, progress=True)
        run_stage(opened, name)
        if name == "report":
            _say_where(opened.path("report.html"))

    command.__doc__ = f"The stage {name!r} of a run that `lensteer traces` began."
    return command


app.command("run")(
    _beginning(
        "All stages of a run; goes on where an earlier call was cut off.",
        lambda run: _say_where(complete(run, typer.echo)),
    )
)
app.command("traces")(_beginning("Begin a run: generate its chains.", lambda run: run_stage(run, "traces")))
for _name in STAGES:
    if _name not in ("traces", "annotate"):
        app.command(_name)(_stage_command(_name))
app.add_typer(annotating, name="annotate")
app.add_typer(caching, name="cache")


def _say_where(report: Path) -> None:
    typer.echo(f"report: {report.resolve()}")
    typer.echo(f"figures: {report.with_name('summary.json').resolve()}")


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
