"""Does a base model learn to think from a few hundred chains? A thinking model that anyone can make.

A base (a folder, a name on the hub, a GGUF file) is fine-tuned on chains of thought as mini-R1 was: a low-rank update
of all linear layers, and the rows of two tokens, the marks of a thought (`thinking_base.py` says where these come
from). Chains are what `lensteer.pipeline.read_chains` reads: the published annotation format, saved traces, or plain
text of any template; `teaching_rows.py` makes rows of them. The loss is of the responses only.

Questions are held out, not rows: several chains on one question stay together. Their loss, in nats per token, is
measured before, during and after training, and once more on the merged weights. The output folder is a checkpoint for
`ls.load_model` and `lensteer doctor --model`, with a card (README.md); `adapter/` holds the update by itself.

A killed run continues from where it last saved, and gives the numbers that it would have given: batches depend on the
seed alone, and dropout on the seed and the step. The folder of a run with other settings or data is refused.

Needs the extra `teach` (peft).

Example:
    python analyses/teach_thinking.py --base HuggingFaceTB/SmolLM2-135M-Instruct --chains annotated.jsonl --out thinker
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import io
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from teaching_rows import Data, Row, batches_of, data_of, same_questions, within
from thinking_base import NEW, Base, load_base, plain_model
from torch import Tensor, nn

import lensteer as ls
from lensteer import models
from lensteer.errors import LensteerError
from lensteer.export.cards import front_matter
from lensteer.files import digest, read_text, write_atomically
from lensteer.pipeline import read_chains
from lensteer.progress import no_loading_bar, progress_bar

if TYPE_CHECKING:
    from peft import PeftModel

MANIFEST, STATE, ADAPTER, CARD = "teaching.json", "state.pt", "adapter", "README.md"
SAVE_SECONDS = 60.0  # between two savings of the state
LONGEST = 4096  # tokens of a row, where the context is longer and nothing is said
WARMUP = 0.03  # share of the steps
SAMPLE_TOKENS = 160


@dataclass(frozen=True)
class Config:
    """What is taught on what, and how. Rank, layers, epochs and chains are those of mini-R1.

    Attributes:
        base: a folder, a name on the hub or a GGUF file.
        chains: JSONL files.
        out: folder of the model.
        dtype: of the base's weights, and of those that are written.
        device: where it runs; None: the GPU if there is one.
        rank: of the update; it is scaled by 2.
        learning_rate: at its highest: it rises over the first 3 % of the steps, then falls to 0.
        dropout: of the update's inputs.
        epochs: passes over the rows; without effect if `steps` is given.
        steps: of the optimizer.
        batch_tokens: of a batch of rows, padding included: at least as many as the longest row has.
        batches: per step.
        max_tokens: of a row; None: the base's context, at most 4096.
        held_out: share of the questions.
        evaluations: of the held-out rows during training, the last one after it.
        license: of the model, for its card.
        seed: of the split, the order, the update's beginning and dropout.

    Raises:
        LensteerError: a number that is not possible.
    """

    base: str
    chains: tuple[Path, ...]
    out: Path
    dtype: str = "bfloat16"
    device: str | None = None
    rank: int = 32
    learning_rate: float = 5e-4
    dropout: float = 0.0
    epochs: int = 12
    steps: int | None = None
    batch_tokens: int = 4096
    batches: int = 1
    max_tokens: int | None = None
    held_out: float = 0.1
    evaluations: int = 6
    license: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rank", "epochs", "steps", "batch_tokens", "batches", "max_tokens", "evaluations"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise LensteerError(f"{name}={value}: give a number from 1")
        if not 0 < self.learning_rate < 1:
            raise LensteerError(f"learning_rate={self.learning_rate}: give a number between 0 and 1, such as 5e-4")
        if not 0 <= self.dropout < 1:
            raise LensteerError(f"dropout={self.dropout}: give a share from 0 to below 1")
        if not 0 < self.held_out < 1:
            raise LensteerError(f"held_out={self.held_out}: give a share of the questions between 0 and 1")
        if not self.chains:
            raise LensteerError("no chains: give at least one JSONL file")

    @property
    def coarse(self) -> bool:
        """Whether the base's weights are in less than single precision. The update's are always in float32."""
        return self.dtype.removeprefix("torch.") in ("bfloat16", "bf16", "float16", "fp16")


@dataclass(frozen=True)
class Result:
    """What was taught.

    Attributes:
        folder: of the model.
        base: its name.
        marks: of the thought.
        marks_from: where their tokens come from.
        n_train: rows for training.
        n_held_out: held-out rows.
        n_questions: for training, and held out.
        tokens: of all rows, for training.
        cut: rows that were cut.
        left_out: rows that were left out, by reason.
        max_tokens: of a row.
        steps: of the optimizer.
        losses: of each step, in nats per token of the responses.
        held_out: held-out loss by step; step 0 is the base with its new rows.
        merged: held-out loss of the weights as written.
        seconds: of training and evaluation.
        sample: what the model writes on a held-out question, from the folder: prompt and response.
    """

    folder: Path
    base: str
    marks: tuple[str, str]
    marks_from: str
    n_train: int
    n_held_out: int
    n_questions: tuple[int, int]
    tokens: int
    cut: int
    left_out: dict[str, int]
    max_tokens: int
    steps: int
    losses: tuple[float, ...]
    held_out: tuple[tuple[int, float], ...]
    merged: float
    seconds: float
    sample: str


def main(config: Config) -> Result:
    """Teach, or go on, and write the model.

    Raises:
        LensteerError: peft is not installed; a base, chains or numbers that are not possible; an output folder of
            another run, or that another process works on.
    """
    if importlib.util.find_spec("peft") is None:
        raise LensteerError("the package peft is not installed: pip install 'lensteer[teach]'")
    files = [str(path) for path in config.chains]
    chains = read_chains(files)
    digests = [digest(path.read_bytes()) for path in config.chains]
    with _alone(config.out):
        base, bridge = load_base(config.base, config.dtype, config.device)
        settings = _settings(config, base, digests)
        done = _continued(config.out, settings)
        if "result" in done:
            (config.out / STATE).unlink(missing_ok=True)
            return _read(done["result"], config.out)
        data = _data(base, bridge, chains, config)
        write_atomically(config.out / MANIFEST, json.dumps({"settings": settings}, indent=1))
        model = _adapted(base, bridge, config)
        del bridge  # the model has weights of its own
        gc.collect()
        found = _taught(model, base, data, config)
        write_atomically(config.out / CARD, card(found, config, base, digests))
        values = asdict(found) | {"folder": ""}
        write_atomically(config.out / MANIFEST, json.dumps({"settings": settings, "result": values}, indent=1))
        (config.out / STATE).unlink()
        return found


def _data(base: Base, bridge: Any, chains: Sequence[ls.Trace], config: Config) -> Data:
    """The rows, split by question.

    Raises:
        LensteerError: rows that cannot be made or split; a row that no batch holds; a rank or a length that the base
            does not have.
    """
    context = models.context_length(bridge)
    if config.max_tokens and context and config.max_tokens > context:
        raise LensteerError(f"max_tokens={config.max_tokens}: {base.identity.name!r} has a context of {context} tokens")
    if config.rank > base.identity.d_model:
        raise LensteerError(f"rank={config.rank}: give at most {base.identity.d_model}, the width of the base")
    data = data_of(
        base,
        bridge,
        chains,
        max_tokens=config.max_tokens or min(context or LONGEST, LONGEST),
        held_out=config.held_out,
        seed=config.seed,
    )
    if data.longest > config.batch_tokens:
        raise LensteerError(
            f"batch_tokens={config.batch_tokens}: the longest row has {data.longest} tokens; give at least that, or "
            "lower max_tokens"
        )
    return data


def summed_loss(model: Any, rows: Sequence[Row], config: Config) -> Tensor:
    """The negative log-likelihood of the rows' responses, summed over their tokens, in nats."""
    width, device = max(len(row.ids) for row in rows), model.device
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    there, learned = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for number, row in enumerate(rows):
        ids[number, : len(row.ids)] = torch.tensor(row.ids)
        there[number, : len(row.ids)] = 1
        learned[number, row.n_prompt : len(row.ids)] = True
    ids, there, wanted = ids.to(device), there.to(device), learned[:, 1:].to(device)  # a token is predicted one before
    with torch.autocast(device.type, torch.bfloat16, enabled=config.coarse):
        logits = model(input_ids=ids, attention_mask=there, use_cache=False).logits[:, :-1]
    return nn.functional.cross_entropy(logits[wanted].float(), ids[:, 1:][wanted], reduction="sum")


@torch.no_grad()
def mean_loss(model: Any, rows: Sequence[Row], config: Config) -> float:
    """Nats per token of the responses."""
    model.eval()
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    batches = within(order, rows, config.batch_tokens)
    total = sum(float(summed_loss(model, [rows[i] for i in some], config)) for some in batches)
    return total / sum(row.learned for row in rows)


def _adapted(base: Base, bridge: Any, config: Config) -> PeftModel:
    """The base with an update that does nothing yet: rank on all linear layers, and the rows of the marks."""
    from peft import LoraConfig, get_peft_model

    model = plain_model(base, bridge)
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if module is tables[0]}
    if tables[0].weight is not tables[1].weight:
        names |= {name.rpartition(".")[2] for name, module in model.named_modules() if module is tables[1]}
    how = LoraConfig(
        r=config.rank,
        lora_alpha=2 * config.rank,
        lora_dropout=config.dropout,
        target_modules="all-linear",
        trainable_token_indices={name: list(base.rows) for name in sorted(names)} if base.rows else None,
        task_type="CAUSAL_LM",
    )
    model.config._name_or_path = base.identity.name
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        return get_peft_model(model, how)


def _rate(step: int, steps: int, config: Config) -> float:
    """Learning rate: linear warm-up, then linear decay to zero."""
    warmup = max(1, round(WARMUP * steps))
    return config.learning_rate * min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))


def _taught(model: PeftModel, base: Base, data: Data, config: Config) -> Result:
    """Train from the last saved state on, merge, write and try the folder."""
    learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(learned.values(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    batches = batches_of(
        data.train,
        config.batch_tokens,
        epochs=config.epochs,
        n=config.steps and config.steps * config.batches,
        seed=config.seed,
    )
    steps = [batches[i : i + config.batches] for i in range(0, len(batches), config.batches)]
    measured = set(np.linspace(0, len(steps), config.evaluations + 1).round().astype(int).tolist())
    state: dict[str, Any] = {"step": 0, "losses": [], "held_out": {}, "seconds": 0.0}
    path = config.out / STATE
    if path.exists():
        state = torch.load(path, weights_only=True, map_location=model.device)
        optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            for name, parameter in learned.items():
                parameter.copy_(state["learned"][name])
    sizes = [sum(len(data.train[i].ids) for batch in step for i in batch) for step in steps]
    begun = time.perf_counter() - state["seconds"]
    saved = time.perf_counter()

    def save() -> None:
        now = dict(optimizer=optimizer.state_dict(), seconds=time.perf_counter() - begun)
        now["learned"] = {name: parameter.detach() for name, parameter in learned.items()}
        buffer = io.BytesIO()
        torch.save(state | now, buffer)
        write_atomically(path, buffer.getvalue())

    done = int(state["step"])
    shown: dict[str, Any] = dict(
        total=sum(sizes), initial=sum(sizes[:done]), desc="teach", unit="token", unit_scale=True
    )
    with progress_bar(show=True, **shown) as bar:
        for step in range(done, len(steps) + 1):
            if step in measured and step not in state["held_out"]:
                state["held_out"][step] = mean_loss(model, data.held_out, config)
            if step == len(steps):
                break
            rows = [[data.train[i] for i in batch] for batch in steps[step]]
            rate = _rate(step, len(steps), config)
            state["losses"].append(_step(model, optimizer, rows, step, rate, config))
            state["step"] = step + 1
            bar.update(sizes[step])
            bar.set_postfix(loss=f"{state['losses'][-1]:.3f}", held_out=f"{list(state['held_out'].values())[-1]:.3f}")
            if time.perf_counter() - saved >= SAVE_SECONDS:
                save()
                saved = time.perf_counter()
    save()
    seconds = time.perf_counter() - begun
    merged = _merged(model, base, data, config)
    questions = [
        len(set(same_questions([row.question for row in rows]).values())) for rows in (data.train, data.held_out)
    ]
    return Result(
        config.out,
        base.identity.name,
        base.marks,
        base.how,
        len(data.train),
        len(data.held_out),
        (questions[0], questions[1]),
        sum(len(row.ids) for row in data.train),
        data.cut,
        dict(data.left_out),
        data.max_tokens,
        len(steps),
        tuple(state["losses"]),
        tuple(sorted(state["held_out"].items())),
        merged,
        seconds,
        _tried(base, data.held_out[0].question, config),
    )


def _step(
    model: Any,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Sequence[Row]],
    number: int,
    rate: float,
    config: Config,
) -> float:
    """One step of the optimizer on the mean loss of all tokens in its batches, which is returned.

    Raises:
        LensteerError: the loss is not finite.
    """
    model.train()
    n = sum(row.learned for rows in batches for row in rows)
    total = 0.0
    with torch.random.fork_rng():
        torch.manual_seed(config.seed + number)  # of dropout
        for rows in batches:
            loss = summed_loss(model, rows, config) / n
            loss.backward()
            total += float(loss.detach())
    if not math.isfinite(total):
        raise LensteerError(f"the loss is {total} at a learning rate of {rate:.2g}: lower learning_rate")
    learned = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    nn.utils.clip_grad_norm_(learned, 1.0)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total


def _merged(model: Any, base: Base, data: Data, config: Config) -> float:
    """Merge in float32 and write the checkpoint and the update, config.json last; the loss of what was written."""
    from transformers import AutoModelForCausalLM

    made, device = config.out / "written.tmp", model.device
    shutil.rmtree(made, ignore_errors=True)
    model.save_pretrained(str(made / ADAPTER), save_embedding_layers=False)
    (made / ADAPTER / "README.md").unlink(missing_ok=True)  # an empty form
    merged = model.float().merge_and_unload().to(base.dtype)
    merged.save_pretrained(made)
    base.tokenizer.save_pretrained(made)
    with no_loading_bar():
        written = AutoModelForCausalLM.from_pretrained(made, dtype=base.dtype).to(device)
    loss = mean_loss(written, data.held_out, config)
    for part in sorted(made.iterdir(), key=lambda part: part.name == "config.json"):
        there = config.out / part.name
        if there.is_dir():
            shutil.rmtree(there)
        os.replace(part, there)
    made.rmdir()
    return loss


def _tried(base: Base, question: str, config: Config) -> str:
    """What `ls.load_model` reads from the folder writes on a question, with its prompt."""
    model = ls.load_model(config.out, dtype=config.dtype, device=config.device)
    assert models.thought_marks(model) == base.marks
    assert [i for mark in base.marks for i in models.encode(model, mark)] == list(base.rows) or not base.rows
    task = ls.Task("held-out", "given", "test", question)
    (trace,) = ls.generate_traces(model, [task], temperature=0.8, seed=config.seed, max_new_tokens=SAMPLE_TOKENS)
    return trace.prompt + trace.response


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Make the folder, and be the only process that works on it.

    Raises:
        LensteerError: it cannot be made, or another process is at work on it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LensteerError(f"cannot write to {str(folder)!r} ({error}): give a folder") from error
    place = digest(str(folder.resolve()).encode())
    lock = FileLock(Path(tempfile.gettempdir()) / f"lensteer-teach-{place}.lock", timeout=0)
    try:
        with lock:
            yield
    except Timeout as error:
        raise LensteerError(f"another process is at work on {str(folder)!r}: let it finish first") from error


def _settings(config: Config, base: Base, digests: Sequence[str]) -> dict[str, Any]:
    """What the losses depend on, apart from the machine."""
    own = {k: v for k, v in asdict(config).items() if k not in ("base", "chains", "out", "device", "license")}
    weights = {k: v for k, v in base.identity.to_dict().items() if k not in ("name", "revision")}
    return own | {f"base {name}": value for name, value in weights.items()} | {"digests of the chains": list(digests)}


def _continued(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What an earlier call left in the folder; nothing if it is empty.

    Raises:
        LensteerError: the folder holds something else, or a run with other settings or data.
    """
    if not any(folder.iterdir()):
        return {}
    path = folder / MANIFEST
    if not path.is_file():
        raise LensteerError(f"{str(folder)!r} holds something, but no {MANIFEST}: give a new or an empty folder")
    found: dict[str, Any] = json.loads(read_text(path))
    if differ := [k for k in settings if settings[k] != found["settings"].get(k)]:
        shown = "; ".join(f"{k} {found['settings'].get(k)!r}, now {settings[k]!r}" for k in differ[:3])
        raise LensteerError(f"{str(folder)!r} was begun with other settings or data ({shown}): give another folder")
    return found


def _read(values: Mapping[str, Any], folder: Path) -> Result:
    """A result from JSON values."""
    opens, closes = values["marks"]
    train, held = values["n_questions"]
    lists = dict(losses=tuple(values["losses"]), held_out=tuple((step, loss) for step, loss in values["held_out"]))
    return Result(**{**values, **lists, "folder": folder, "marks": (opens, closes), "n_questions": (train, held)})


def card(found: Result, config: Config, base: Base, digests: Sequence[str]) -> str:
    """The model's card."""
    files = [f"| `{path.name}` | `{name}` |" for path, name in zip(config.chains, digests, strict=True)]
    left = ", ".join(f"{n} {reason}" for reason, n in found.left_out.items() if n)
    losses = [f"| {step} | {loss:.3f} |" for step, loss in found.held_out]
    opens = "The chat template opens the thought." if base.opened else "The model opens the thought itself."
    enlarged = " The base's embedding was enlarged for the marks: enlarge it before loading `adapter/`."
    license_note = f"{config.license}." if config.license else "Not stated. The base's license and the chains' apply."
    return "\n".join(
        [
            front_matter(["lensteer", "thinking"], config.base, config.license),
            "",
            f"# {found.base}, taught to think",
            "",
            f"`{found.base}` (weights `{base.identity.weights}`), fine-tuned on chains of thought by lensteer's "
            "`analyses/teach_thinking.py`. It imitates how its teachers think. Whether more of its answers are right "
            "was not measured.",
            "",
            "## Use",
            "",
            f"`ls.load_model(folder)`, or whatever reads Hugging Face checkpoints. The marks of its thought are "
            f"`{found.marks[0]}` and `{found.marks[1]}` ({found.marks_from}). {opens} `adapter/` holds the update by "
            f"itself, for peft, to be used with the tokenizer of this folder.{enlarged if base.how == NEW else ''}",
            "",
            "## Data",
            "",
            "| file | SHA-256, first 16 digits |",
            "| --- | --- |",
            *files,
            "",
            f"{found.n_train} chains on {found.n_questions[0]} questions, {found.tokens:,} tokens. {found.n_held_out} "
            f"chains on {found.n_questions[1]} questions were held out. Cut, at {found.max_tokens:,} tokens: "
            f"{found.cut}. Left out: {left or 'none'}.",
            "",
            "## Training",
            "",
            f"{found.steps} steps; rank {config.rank} (scale 2) on all linear layers, and {len(base.rows)} token rows; "
            f"learning rate {config.learning_rate:g}, dropout {config.dropout:g}; {config.batches} batch(es) per step "
            f"of at most {config.batch_tokens:,} tokens; {config.dtype}, seed {config.seed}; {found.seconds:,.0f} s. "
            "The loss is of the responses only, in nats per token.",
            "",
            "| step | held-out loss |",
            "| --- | --- |",
            *losses,
            f"| weights as written | {found.merged:.3f} |",
            "",
            "## Sample",
            "",
            f"On a held-out question, temperature 0.8, {SAMPLE_TOKENS} tokens at most, not chosen among others:",
            "",
            *(f"    {line}" for line in found.sample.splitlines()),
            "",
            "## License",
            "",
            license_note,
            "",
            "## Limits",
            "",
            "- The loss says how well it predicts its teachers' chains, not whether what it writes is true.",
            "- Its chains' language, topics and errors are what it was taught. A chain that was cut teaches no ending, "
            "and a thought that was closed in mid-sentence teaches to close it there.",
            "- What the base could do may have become worse. That was not measured.",
            "",
        ]
    )


def table(found: Result) -> str:
    """The figures, one a line."""
    left = "".join(f", {n} {reason}" for reason, n in found.left_out.items() if n)
    lines = [
        f"{found.base}: {found.n_train} rows on {found.n_questions[0]} questions, {found.tokens:,} tokens; held out: "
        f"{found.n_held_out} rows on {found.n_questions[1]} questions; {found.cut} rows cut at {found.max_tokens} "
        f"tokens; left out: {left.removeprefix(', ') or 'none'}",
        f"marks {' '.join(found.marks)}: {found.marks_from}",
        f"{found.steps} steps, {found.seconds:,.0f} s",
        *(f"held-out loss at step {step}: {loss:.4f}" for step, loss in found.held_out),
        f"held-out loss of the weights as written: {found.merged:.4f}",
        f"sample:\n{found.sample}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--chains", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dtype", default=Config.dtype)
    parser.add_argument("--device")
    parser.add_argument("--license", default="")
    for name in ("rank", "epochs", "batch_tokens", "batches", "evaluations", "seed"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(Config, name))
    for name in ("steps", "max_tokens"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    for name in ("learning_rate", "dropout", "held_out"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=getattr(Config, name))
    options = vars(parser.parse_args())
    options["chains"] = tuple(options["chains"])
    print(table(main(Config(**options))))
