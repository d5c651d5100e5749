"""The options that several commands share."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from lensteer.distributed import LOCAL, ActorOptions
from lensteer.endpoints import Endpoint
from lensteer.errors import LensteerError
from lensteer.generation import Served
from lensteer.models import MARKS
from lensteer.pipeline import Run
from lensteer.tasks.benchmarks import FORMATS

Model = Annotated[
    str | None,
    typer.Option(help="A checkpoint's folder, a GGUF file or a name on the hub.", show_default="the organism"),
]
Revision = Annotated[
    str | None,
    typer.Option(help="Of a checkpoint on the hub: a branch, tag or commit.", show_default="its main branch"),
]
Dtype = Annotated[str, typer.Option(help="Of weights and activations: float32, bfloat16 or float16.")]
Device = Annotated[str | None, typer.Option(help="Such as cpu or cuda.", show_default="TransformerLens chooses")]
DeviceMap = Annotated[
    str | None, typer.Option(help="Of Hugging Face, such as auto, to spread a model over devices; instead of --device.")
]
Thought = Annotated[
    str,
    typer.Option(
        help="How the model marks its thought: auto (read from its chat template), none (the whole response is its "
        f"chain), one of {', '.join(MARKS)}, or both marks with a blank between them."
    ),
]
Template = Annotated[
    str | None, typer.Option(help="A file with a chat template (Jinja).", show_default="the tokenizer's own")
]
Tasks = Annotated[
    str | None,
    typer.Option(
        help="'organism', 'builtin' (550 written tasks), or a file (JSONL, parquet) of tasks or of a benchmark: "
        f"{', '.join(form.title for form in FORMATS)}. Of a benchmark's questions, a fifth is for dev, a fifth held "
        "out and the rest for training, unless its records name a split.",
        show_default="builtin; for the organism: organism",
    ),
]


def tasks_for(model: str | None, tasks: str | None) -> str:
    """The requested tasks, or those that fit the model: only the organism can solve its own."""
    return tasks or ("organism" if model is None else "builtin")


System = Annotated[
    str,
    typer.Option(
        help="The system prompt of every question, in every condition; pairs that have one keep theirs.",
        show_default="none, or what the chat template inserts",
    ),
]
Seed = Annotated[int, typer.Option(help="For all random draws.")]

Ray = Annotated[
    str | None,
    typer.Option(
        metavar="[ADDRESS]",
        help="Run the model on actors of Ray (extra `ray`): of this machine, or of a cluster, whose ADDRESS is "
        "HOST:PORT or auto. They generate chains, sum activations, score layers and measure text; annotators, "
        "directions from pairs and embedding overlap stay in this process, which loads the model on its CPU.",
        show_default="none",
    ),
]
NActors = Annotated[
    int | None, typer.Option("--actors", help="With --ray: number of actors.", show_default="what there is room for")
]
Gpus = Annotated[
    float,
    typer.Option(
        "--gpus-per-actor", help="With --ray: such as 0.5 for two actors on one GPU, or 4 with --device-map auto."
    ),
]
Cpus = Annotated[int, typer.Option("--cpus-per-actor", help="With --ray: cores of each, which are its threads.")]


#: Chains that a server is asked for at a time: vLLM batches what there is.
IN_FLIGHT = 64
EngineUrl = Annotated[
    str | None,
    typer.Option(
        "--engine",
        metavar="URL",
        help="Have a vLLM server with the same model, such as http://localhost:8000/v1, write the chains that vectors "
        "are fitted on (or the answers of pairs). They come back as the ids that it sampled.",
        show_default="none",
    ),
]
ServedModel = Annotated[
    str,
    typer.Option("--engine-model", help="With --engine: the name that it serves it by.", show_default="the only one"),
]
InFlight = Annotated[int, typer.Option("--in-flight", help="With --engine: chains at a time.")]


def engine_at(url: str | None, model: str, in_flight: int) -> Served | None:
    """The engine at an address, if one is given. A chain may take an hour.

    Raises:
        LensteerError: options of an engine without one, or an invalid address or number.
    """
    if url is None:
        if model or in_flight != IN_FLIGHT:
            raise LensteerError("--engine-model and --in-flight are of --engine: give it, too")
        return None
    return Served(Endpoint(url=url, model=model, concurrency=in_flight, timeout=3600.0))


class RayCommand(TyperCommand):
    """A command with `--ray`, whose ADDRESS may be left out; typer has no such options."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the default address after a `--ray` without one."""
        for at in [i for i, arg in enumerate(args) if arg == "--ray"][::-1]:
            if at + 1 == len(args) or args[at + 1].startswith("-"):
                args = [*args[: at + 1], LOCAL, *args[at + 1 :]]
        return super().parse_args(ctx, args)


def on_actors(run: Run, ray: str | None, actors: int | None, gpus: float, cpus: int) -> AbstractContextManager[None]:
    """A context in which the run's model is on actors, if that is asked for.

    Raises:
        LensteerError: options of actors without `--ray`, or what `Run.on_actors` raises.
    """
    if ray is None:
        if actors is not None or gpus or cpus != 1:
            raise LensteerError("--actors, --gpus-per-actor and --cpus-per-actor are of --ray: give it, too")
        return nullcontext()
    return run.on_actors(ActorOptions(ray, actors, gpus, cpus))


def numbers(text: str) -> tuple[float, ...]:
    """`0.5,1,2` as numbers.

    Raises:
        LensteerError: a part that is not a number.
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise LensteerError(f"{text!r} is not a list of numbers: write one such as 0.5,1,2") from error


def whole_numbers(text: str) -> tuple[int, ...]:
    """`3,4` as whole numbers.

    Raises:
        LensteerError: a part that is not a whole number.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise LensteerError(f"{text!r} is not a list of whole numbers: write one such as 15 or 12,15,15,18") from error
