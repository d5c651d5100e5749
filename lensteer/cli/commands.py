"""All commands; `lensteer.cli` imports them when one is called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from lensteer.annotation.judge_client import KEY, MODEL, URL
from lensteer.cli.annotate import annotating
from lensteer.cli.benchmark import benchmark
from lensteer.cli.cache import caching
from lensteer.cli.directions import directions
from lensteer.cli.doctor import doctor
from lensteer.cli.export import export
from lensteer.cli.groups import COMMANDS, Commands
from lensteer.cli.options import (
    IN_FLIGHT,
    Cpus,
    Device,
    DeviceMap,
    EngineUrl,
    Gpus,
    InFlight,
    Model,
    NActors,
    Ray,
    RayCommand,
    Revision,
    Seed,
    ServedModel,
    System,
    Tasks,
    Template,
    Thought,
    engine_at,
    numbers,
    on_actors,
    tasks_for,
    whole_numbers,
)
from lensteer.cli.verify import verify
from lensteer.contrast import FORMATS
from lensteer.errors import LensteerError
from lensteer.pipeline import DEMO, DEMO_REAL, ORGANISM, SCOPES, STAGES, Run, RunConfig, complete, run_stage

app = typer.Typer(cls=Commands, add_completion=False, pretty_exceptions_enable=False)

Out = Annotated[Path, typer.Option(help="The run's folder.")]
Annotators = Annotated[
    list[str] | None,
    typer.Option(
        "--annotator",
        help="What labels the sentences of generated text: grammar (the organism's), rules, classifier (see "
        "--classifier), judge, or FILE.py:NAME for a function of yours; repeatable: the first is tested, the others "
        "are reported as well. judge is a chat model on an OpenAI-compatible server, which is sent every chain of "
        "every condition, 60 sentences a request, so it costs thousands of requests in a full run; replies are kept "
        f"in the run's folder. It needs the extra `judge`, {MODEL} (the model's name), {URL} (such as "
        f"http://localhost:8000/v1; OpenAI without one), and for most servers {KEY}.",
        show_default="grammar for the organism's tasks; classifier, rules with labeled --chains or --classifier; "
        "none with --measure and --pairs or --chains; else rules",
    ),
]
Classifier = Annotated[
    str | None,
    typer.Option(
        help="The file that `lensteer annotate fit` wrote, for --annotator classifier.",
        show_default="one is fitted on the labels of --chains",
    ),
]
Chains = Annotated[
    list[str] | None,
    typer.Option(
        help="A file of chains to fit the vectors on instead of generating any: saved traces, the published "
        "annotation format, or plain text of any model. Their labels are kept; repeatable."
    ),
]
Pairs = Annotated[
    str | None,
    typer.Option(
        help="Contrastive pairs to fit the vectors on instead of on chains: a file, or 'politeness', a written set."
    ),
]
PairFormat = Annotated[
    str | None, typer.Option(help=f"One of {', '.join(FORMATS)}.", show_default="by the first entry")
]
Measuring = Annotated[
    str | None,
    typer.Option(
        "--measure",
        help="FILE.py:NAME of a function from a trace to a number; its mean is tested instead of shares of sentences.",
    ),
]
Small = Annotated[bool, typer.Option("--small", help="The demo's sizes, which are too small for rare behaviors.")]


def _option(name: str, what: str) -> Any:
    """An option whose default depends on the model, a language model or the organism, and on `--small`."""
    language, short, own, small = (getattr(config, name) for config in (RunConfig(), DEMO_REAL, ORGANISM, DEMO))

    def shown(value: Any) -> str:
        return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)

    words = shown(language) or "by scores"  # only layers have no value of their own
    if short != language:
        words += f" (small: {shown(short)})"
    if own != language or small != language:
        words += f"; organism: {shown(own)}" + (f" (small: {shown(small)})" if small != own else "")
    return typer.Option(help=what, show_default=words)


@app.command()
def demo(
    out: Out = Path("lensteer-demo"),
    model: Annotated[
        str | None,
        typer.Option(help="A folder of mini-R1 or another thinking model, for the short run."),
    ] = None,
    chains: Chains = None,
) -> None:
    """A full run on the organism in five minutes on two cores, or a short one on a language model."""
    if model is None and chains:
        raise LensteerError("--chains without --model: the organism generates its own chains")
    config = DEMO if model is None else replace(DEMO_REAL, model=model, chains=tuple(chains or ()))
    _say_where(complete(Run.open(out, config, progress=True), typer.echo))


def _beginning(go: Callable[[Run], object]) -> Callable[..., None]:
    """A command that starts a run (or resumes it) and then calls `go`."""

    def command(
        out: Out,
        model: Model = None,
        tasks: Tasks = None,
        small: Small = False,
        annotators: Annotators = None,
        classifier: Classifier = None,
        chains: Chains = None,
        pairs: Pairs = None,
        pair_format: PairFormat = None,
        measure: Measuring = None,
        dtype: Annotated[
            str | None, _option("dtype", "Of weights and activations: float32, bfloat16 or float16.")
        ] = None,
        device: Device = None,
        device_map: DeviceMap = None,
        revision: Revision = None,
        thought: Thought = "auto",
        template: Template = None,
        seed: Seed = 0,
        behaviors: Annotated[str | None, _option("behaviors", "Which to steer, separated by commas.")] = None,
        layers: Annotated[
            str | None,
            _option("layers", "Layers to steer, such as 15 or 12,15,15,18: one for all behaviors or one for each."),
        ] = None,
        window: Annotated[
            str | None,
            _option("window", "Where a behavior is read: onset, onset±k, onset-k, onset+k, span or published."),
        ] = None,
        negatives: Annotated[
            str | None, _option("negatives", "What it is compared with: spans, all, rest or same_trace.")
        ] = None,
        scope: Annotated[str | None, _option("scope", f"Where steering acts: {', '.join(SCOPES)}.")] = None,
        unit: Annotated[str | None, _option("unit", "What coefficient 1 adds: difference, mean_norm or unit.")] = None,
        coefficients: Annotated[
            str | None, _option("coefficients", "Coefficients to choose from, in --unit; both signs are tried.")
        ] = None,
        temperature: Annotated[float | None, _option("temperature", "For all sampling; 0 is greedy.")] = None,
        top_p: Annotated[
            float | None, _option("top_p", "Probability that the likeliest tokens to draw from add up to.")
        ] = None,
        prefill: Annotated[
            str | None, typer.Option(help="What every generated chain begins with.", show_default="nothing")
        ] = None,
        system: System = "",
        n_train: Annotated[int | None, _option("n_train", "Tasks that chains are generated on.")] = None,
        n_dev: Annotated[int | None, _option("n_dev", "Tasks that coefficients are chosen on.")] = None,
        n_test: Annotated[int | None, _option("n_test", "Held-out tasks.")] = None,
        n_samples: Annotated[int | None, _option("n_samples", "Chains per held-out task and own condition.")] = None,
        control_samples: Annotated[
            int | None, _option("control_samples", "Chains per held-out task and control vector.")
        ] = None,
        n_controls: Annotated[int | None, _option("n_controls", "Control vectors per pool and layer.")] = None,
        kl_controls: Annotated[
            bool, typer.Option("--kl-controls", help="Also control vectors that spend the edit's KL per token.")
        ] = False,
        coherence: Annotated[
            bool, typer.Option("--coherence", help="Have a judge score how coherent the text of each condition is.")
        ] = False,
        n_score_controls: Annotated[
            int | None,
            _option("n_score_controls", "Control vectors of each of two kinds for the scores by layer; 0 for none."),
        ] = None,
        train_tokens: Annotated[int | None, _option("train_tokens", "Most tokens of a training chain.")] = None,
        max_new_tokens: Annotated[
            int | None, _option("max_new_tokens", "Most tokens of a chain on dev and held-out tasks.")
        ] = None,
        batch_size: Annotated[int | None, _option("batch_size", "Chains per batch.")] = None,
        engine: EngineUrl = None,
        engine_model: ServedModel = "",
        in_flight: InFlight = IN_FLIGHT,
        ray: Ray = None,
        actors: NActors = None,
        gpus: Gpus = 0.0,
        cpus: Cpus = 1,
    ) -> None:
        chosen = tasks_for(model, tasks)
        full, demo_sized = (ORGANISM, DEMO) if chosen == "organism" else (RunConfig(), DEMO_REAL)
        base = demo_sized if small else full
        asked: dict[str, Any] = dict(
            model=model,
            tasks=chosen,
            annotators=tuple(annotators or ()),
            classifier=classifier,
            chains=tuple(chains or ()),
            pairs=pairs,
            pair_format=pair_format,
            measure=measure,
            device=device,
            device_map=device_map,
            revision=revision,
            thought=thought,
            template=template,
            seed=seed,
            system=system,
            kl_controls=kl_controls,
            coherence=coherence,
        )
        maybe: dict[str, Any] = dict(
            dtype=dtype,
            behaviors=None if behaviors is None else tuple(part.strip() for part in behaviors.split(",")),
            layers=None if layers is None else whole_numbers(layers),
            window=window,
            negatives=negatives,
            scope=scope,
            unit=unit,
            coefficients=None if coefficients is None else numbers(coefficients),
            temperature=temperature,
            top_p=top_p,
            prefill=prefill,
            n_train=n_train,
            n_dev=n_dev,
            n_test=n_test,
            n_samples=n_samples,
            control_samples=control_samples,
            n_controls=n_controls,
            n_score_controls=n_score_controls,
            train_tokens=train_tokens,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
        )
        asked |= {name: value for name, value in maybe.items() if value is not None}
        opened = Run.open(out, replace(base, **asked), progress=True)
        opened.announce = typer.echo
        opened.engine = engine_at(engine, engine_model, in_flight)
        with on_actors(opened, ray, actors, gpus, cpus):
            go(opened)

    return command


def _stage_command(name: str) -> Callable[..., None]:
    def command(out: Out, ray: Ray = None, actors: NActors = None, gpus: Gpus = 0.0, cpus: Cpus = 1) -> None:
        opened = Run.open(out, progress=True)
        opened.announce = typer.echo
        with on_actors(opened, ray, actors, gpus, cpus):
            run_stage(opened, name)
        if name == "report":
            _say_where(opened.path("report.html"))

    return command


app.command("run", cls=RayCommand, help=COMMANDS["run"])(_beginning(lambda run: _say_where(complete(run, typer.echo))))
app.command("traces", cls=RayCommand, help=COMMANDS["traces"])(_beginning(lambda run: run_stage(run, "traces")))
for _name in STAGES:
    if _name not in ("traces", "annotate"):
        app.command(_name, cls=RayCommand, help=COMMANDS[_name])(_stage_command(_name))
app.command("benchmark")(benchmark)
app.command("directions")(directions)
app.command("doctor")(doctor)
app.command("export")(export)
app.command("verify")(verify)
app.add_typer(annotating, name="annotate")
app.add_typer(caching, name="cache")


def _say_where(report: Path) -> None:
    typer.echo(f"report: {report.resolve()}")
    typer.echo(f"figures: {report.with_name('summary.json').resolve()}")
