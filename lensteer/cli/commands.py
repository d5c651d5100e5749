"""The command line: `lensteer demo`, `lensteer run`, and a command for each stage of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from lensteer.errors import LensteerError
from lensteer.pipeline import DEMO, STAGES, Run, RunConfig, complete, run_stage


class _Commands(TyperGroup):
    """What a user can mend is one line, not a traceback; versions of typer differ in what they make of Ctrl-C."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (LensteerError, OSError) as error:
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt as stop:
            typer.echo("\nstopped; the same command goes on from here", err=True)
            raise typer.Exit(130) from stop


app = typer.Typer(
    cls=_Commands, help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)

Out = Annotated[Path, typer.Option(help="The run's folder.")]
Model = Annotated[str | None, typer.Option(help="A checkpoint's folder or a name on the hub; default: the organism.")]
Tasks = Annotated[str, typer.Option(help="'organism' or a JSONL file of tasks.")]
Small = Annotated[bool, typer.Option("--small", help="The demo's sizes instead of the full run's.")]
Window = Annotated[str, typer.Option(help="Where a behavior is read: onset, onset±k, span or published.")]
Negatives = Annotated[str, typer.Option(help="What it is compared with: spans, all, rest or same_trace.")]
Scope = Annotated[str, typer.Option(help="Where steering acts: onsets, thinking, generated, everywhere, ...")]
Seed = Annotated[int, typer.Option(help="Of everything that is drawn.")]


@app.command()
def demo(out: Out = Path("lensteer-demo")) -> None:
    """The whole story on the embedded model, small enough for five minutes on two cores."""
    _say_where(complete(Run.open(out, DEMO, progress=True), typer.echo))


def _beginning(doc: str, go: Callable[[Run], object]) -> Callable[..., None]:
    """A command that begins a run (or goes on with it) and then does `go`."""

    def command(
        out: Out,
        model: Model = None,
        tasks: Tasks = "organism",
        small: Small = False,
        window: Window = "onset",
        negatives: Negatives = "spans",
        scope: Scope = "onsets",
        seed: Seed = 0,
    ) -> None:
        sizes = DEMO if small else RunConfig()
        asked: dict[str, Any] = dict(
            model=model, tasks=tasks, window=window, negatives=negatives, scope=scope, seed=seed
        )
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
    if _name != "traces":
        app.command(_name)(_stage_command(_name))


def _say_where(report: Path) -> None:
    typer.echo(f"report: {report.resolve()}")
    typer.echo(f"figures: {report.with_name('summary.json').resolve()}")


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
