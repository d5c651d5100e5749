"""What works on a model and what does not: facts, checks of exactness, each feature tried, time and memory of a run."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lensteer import models, twins
from lensteer.activations import MAX_TOKENS
from lensteer.attention import sentence_attention
from lensteer.attribution import attribute
from lensteer.attribution.overlap import embedding_overlap
from lensteer.behaviors import Span
from lensteer.cache_steering import CachePlan, Pair, fit_cache_vector
from lensteer.caches import new_cache
from lensteer.errors import LensteerError
from lensteer.forward import Forward, left_padded
from lensteer.generation import Generated, generate
from lensteer.generation.jobs import Job, trace_of
from lensteer.pipeline import RunConfig
from lensteer.pipeline.stages import planned_chains
from lensteer.results import Result, by_topic
from lensteer.steering import SteeringPlan
from lensteer.tasks import Task
from lensteer.traces import Trace
from lensteer.vectors import fit_vectors

if TYPE_CHECKING:
    import pandas as pd
    from transformer_lens.model_bridge import TransformerBridge

QUESTION = "How many days are in two weeks?"
#: Sentences of the made-up chain that features are tried on.
TEXT = (" Let me think about it.", " A week has seven days.", " Wait, is that right?", " Two weeks have fourteen.")
LABELS = ("deduction", "adding-knowledge", "backtracking", "deduction")
#: Largest difference of logits that counts as rounding, as a share of their size.
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
#: Rows and new tokens of the speed measurement.
ROWS, NEW = 16, 16


@dataclass(frozen=True)
class Finding:
    """One line of a diagnosis.

    Attributes:
        topic: "model", "text", "check", "feature" or "cost".
        name: what was looked at.
        value: what was found, as text.
        ok: whether it is as it should be; None where there is nothing to judge.
    """

    topic: str
    name: str
    value: str
    ok: bool | None = None


@dataclass(frozen=True, repr=False)
class Diagnosis(Result):
    """All findings on a model, in order."""

    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether no check failed; features that a model lacks do not count."""
        return all(finding.ok is not False for finding in self.findings if finding.topic == "check")

    def to_dataframe(self) -> pd.DataFrame:
        """A row per finding."""
        import pandas as pd

        return pd.DataFrame([vars(finding) for finding in self.findings])

    def __str__(self) -> str:
        width = max(len(finding.name) for finding in self.findings)
        signs = {None: " ", True: "+", False: "-"}
        return "\n".join(by_topic((f.topic, f" {signs[f.ok]} {f.name:<{width}}  {f.value}") for f in self.findings))


def diagnose(model: TransformerBridge, *, config: RunConfig | None = None) -> Diagnosis:
    """Examine a model: what it is, whether its passes agree, which features work, and what a full run costs.

    Args:
        model: the bridge.
        config: of the run whose cost is estimated; None is the default one for language models.
    """
    config = RunConfig() if config is None else config
    return Diagnosis((*_facts(model), *_text(model), *_checks(model), *_features(model), *_cost(model, config)))


def _facts(model: TransformerBridge) -> Iterator[Finding]:
    original, limits = model.original_model, models.length_limits(model)
    shape = original.config
    heads = getattr(shape, "num_attention_heads", None)
    shared = getattr(shape, "num_key_value_heads", None) or heads
    parameters = list(original.parameters())
    n, size = sum(p.numel() for p in parameters), sum(p.numel() * p.element_size() for p in parameters)
    yield Finding("model", "architecture", f"{type(original).__name__} ({shape.model_type})")
    yield Finding(
        "model",
        "shape",
        f"{models.n_layers(model)} layers, d_model {models.d_model(model)}, {heads} heads, {shared} key-value heads, "
        f"d_vocab {int(model.cfg.d_vocab)}",
    )
    yield Finding(
        "model",
        "weights",
        f"{n / 1e6:,.0f} M parameters, {size / 2**20:,.0f} MiB, {str(original.dtype).removeprefix('torch.')} on "
        f"{models.device(model)}",
    )
    if limits.learned is not None:
        reach = f"{limits.learned} learned positions: longer texts are refused"
    elif limits.switching is not None:
        reach = f"{limits.switching} tokens; beyond, rotary frequencies depend on the batch: refused"
    elif limits.trained is not None:
        reach = f"trained on {limits.trained} tokens; longer texts get a warning"
    else:
        reach = "no limit stated"
    yield Finding("model", "context", reach)


def prompt_of(model: TransformerBridge, question: str = QUESTION) -> str:
    """A question in a model's chat template; the plain question where the tokenizer has none."""
    if not getattr(model.tokenizer, "chat_template", None):
        return question
    return models.chat_text(model, question)


def _text(model: TransformerBridge) -> Iterator[Finding]:
    tokenizer = model.tokenizer
    bos, ends = tokenizer.bos_token, sorted(models.end_ids(model))
    yield Finding("text", "BOS", repr(bos) if bos else "none")
    yield Finding(
        "text", "end of a response", ", ".join(repr(tokenizer.decode([i])) for i in ends) or "none", bool(ends)
    )
    prompt = prompt_of(model)
    template = bool(getattr(tokenizer, "chat_template", None))
    shown = repr(prompt[-60:]) if template else "none: give a chat model, or set one"
    yield Finding("text", "chat template", shown, template)
    opens, closes = models.thought_marks(model)
    if not opens:
        yield Finding("text", "thought marks", "none: the whole response is the chain (else --thought 'OPEN CLOSE')")
        return
    opened = models.opens_thought(model, prompt)
    who = "the template" if opened else "the model"
    yield Finding("text", "thought marks", f"{opens} {closes}, opened by {who}")
    if template:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            direct = models.chat_text(model, QUESTION, thinking=False)
        own = direct.removesuffix(f"\n{closes}\n\n") == prompt
        closing = "closed at once, because the template opens a thought" if opened and own else "by the template"
        yield Finding("text", "direct answers", closing if direct != prompt else "the model decides")


def _checks(model: TransformerBridge) -> Iterator[Finding]:
    """Passes that must agree up to rounding: over a cache, beside other rows, on the fast path."""
    ids = models.encode(model, prompt_of(model) + "".join(TEXT))[:128]
    limit = ROUNDING.get(model.original_model.dtype, 1e-1)
    with torch.inference_mode():
        plain = _logits(model, [ids], fast=False)[0]
        if not torch.isfinite(plain).all():
            yield Finding("check", "finite logits", "overflow in this dtype: load the model in another one", False)
            return
        scale = float(plain.abs().max())

        def compared(name: str, other: Callable[[], Tensor]) -> Finding:
            try:
                off = float((other() - plain).abs().max()) / scale
            except (LensteerError, NotImplementedError, ValueError, RuntimeError, TypeError, AttributeError) as error:
                return Finding("check", name, f"not possible: {_one_line(error)}", False)
            return Finding("check", name, f"logits differ by {off:.1e} of their size", off <= limit)

        yield compared("cached = full", lambda: _cached(model, ids))
        yield compared("padded = alone", lambda: _logits(model, [ids, ids * 2], fast=False)[0][-len(ids) :])
        if twins.plain_twin(model) is None:
            yield Finding("check", "fast path = bridge", "no fast path: slower, nothing else changes", None)
        else:
            yield compared("fast path = bridge", lambda: _logits(model, [ids], fast=True)[0])
        noise = _logits(model, [ids] * 5, fast=False)[2]
    off = float((noise - plain).abs().max()) / scale
    yield Finding("check", "noise of batching", f"{off:.1e} of the logits' size in {model.original_model.dtype}", None)


def _logits(model: TransformerBridge, rows: list[list[int]], *, fast: bool) -> list[Tensor]:
    forward = Forward(model, left_padded(model, rows), fast=fast)
    with forward.hooked():
        found = forward.run()
    return [logits[len(logits) - len(row) :].float() for logits, row in zip(found, rows, strict=True)]


def _cached(model: TransformerBridge, ids: list[int]) -> Tensor:
    """In two parts over a cache, by what generates text: the fast path, if there is one."""
    forward = Forward(model, left_padded(model, [ids]), cache=new_cache(model))
    half = len(ids) // 2
    with forward.hooked():
        return torch.cat([forward.run(0, half), forward.run(half)], 1)[0].float()


def example(model: TransformerBridge) -> Trace:
    """A made-up annotated chain in a model's own template."""
    prompt, ids = prompt_of(model), list[int]()
    prompt_ids = models.encode(model, prompt)
    spans, at = [], 0
    for label, text in zip(LABELS, TEXT, strict=True):
        new = models.encode_raw(model, text)
        begin = len(prompt_ids) + len(ids)
        spans.append(Span(label, begin, begin + len(new), at, at + len(text)))
        ids += new
        at += len(text)
    job = Job(Task("example", "example", "dev", QUESTION), 0, prompt, tuple(prompt_ids))
    return replace(trace_of(model, job, Generated(tuple(ids), False)), spans=tuple(spans))


def features(model: TransformerBridge) -> dict[str, Callable[[], object]]:
    """What lensteer does with a model, each as a function that tries it on a small example."""
    trace = example(model)
    ids = [list(trace.prompt_ids)]

    def vectors() -> Any:
        return fit_vectors(model, [trace], behaviors=sorted(set(LABELS)), window="span", negatives="all")

    def steered() -> object:
        plan = SteeringPlan(vectors()["deduction"], models.n_layers(model) // 2, 1.0)
        return generate(model, ids, max_new_tokens=2, plans=[plan])

    def cache_edit() -> object:
        longer = prompt_of(model, f"{TEXT[1]} {QUESTION}")
        vector = fit_cache_vector(model, [Pair(longer, trace.prompt)])
        return generate(model, ids, max_new_tokens=2, plans=[CachePlan(vector, 1.0)])

    return {
        "generate": lambda: generate(model, ids, max_new_tokens=2),
        "behavior vectors": vectors,
        "attribution": lambda: attribute(model, [trace], vectors(), behaviors=["deduction"]),
        "attribution by gradients": lambda: attribute(
            model, [trace], vectors(), method="fisher", behaviors=["deduction"]
        ),
        "embedding overlap": lambda: embedding_overlap(model, vectors()),
        "steering": steered,
        "cache steering": cache_edit,
        "attention between sentences": lambda: sentence_attention(model, trace),
    }


def _features(model: TransformerBridge) -> Iterator[Finding]:
    for name, attempt in features(model).items():
        try:
            attempt()
        except LensteerError as error:
            yield Finding("feature", name, f"no: {_one_line(error)}", False)
        else:
            yield Finding("feature", name, "yes", True)


def _cost(model: TransformerBridge, config: RunConfig) -> Iterator[Finding]:
    """Time and memory of a full run, from decoding a few tokens with few and with many rows."""
    prompt = models.encode(model, prompt_of(model))

    def decoded() -> int:
        seeds = list(range(ROWS))
        found = generate(model, [prompt] * ROWS, max_new_tokens=NEW, temperature=1.0, seeds=seeds)
        return sum(len(row.ids) for row in found)

    decoded()  # warm
    began = time.perf_counter()
    rate = decoded() / (time.perf_counter() - began)
    chains = sum(planned_chains(config, config.behaviors).values())
    tokens = chains * config.max_new_tokens + config.n_train * config.train_tokens
    shape = model.original_model.config
    heads = int(getattr(shape, "num_key_value_heads", None) or getattr(shape, "num_attention_heads", 1) or 1)
    width = int(getattr(shape, "head_dim", None) or models.d_model(model) // max(1, int(shape.num_attention_heads)))
    weights = list(model.original_model.parameters())
    item = weights[0].element_size()
    length = len(prompt) + config.max_new_tokens
    cache = 2 * models.n_layers(model) * heads * width * item * length * config.batch_size
    reading = MAX_TOKENS * int(model.cfg.d_vocab) * 4
    yield Finding("cost", "speed", f"{rate:,.0f} tokens/s at {ROWS} rows, {torch.get_num_threads()} thread(s)")
    yield Finding(
        "cost",
        "time of a full run",
        f"{chains:,} chains of at most {config.max_new_tokens} tokens, training chains included about "
        f"{tokens / rate / 3600:.1f} h at this speed (more rows per batch are faster)",
    )
    total = sum(p.numel() * p.element_size() for p in weights) + cache + reading
    yield Finding("cost", "memory of a full run", f"about {total / 2**30:.1f} GiB, {cache / 2**30:.1f} of them cache")
    free = _free(model)
    if free is not None:
        fits = total < free
        smaller = max(1, int(config.batch_size * max(free - total + cache, 0) / max(cache, 1)))
        advice = "" if fits else f"; lower batch_size to {smaller} or load in bfloat16"
        yield Finding("cost", "memory that is free", f"{free / 2**30:.1f} GiB{advice}", fits)


def _free(model: TransformerBridge) -> int | None:
    if models.device(model).type == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
