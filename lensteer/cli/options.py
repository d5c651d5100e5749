"""The options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

from lensteer.errors import LensteerError
from lensteer.models import MARKS
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
