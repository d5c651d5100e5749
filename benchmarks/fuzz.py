"""Feed damaged inputs to all that reads a file or somebody's text: each is read, or refused by a `LensteerError`.

Targets read what may come from elsewhere: annotations, judges' replies, position expressions, answers, vectors, plans,
GGUF control vectors, classifiers, results, manifests, and JSONL of traces, texts, tasks and pairs. An input is a valid
one, damaged: bits flipped, bytes cut, copied and repeated, words of the formats put in, another value in JSON. It
depends on the target and its number alone. Any other exception, and an input that takes more than ten seconds or 300
MB, is a finding and is kept in `FOLDER/findings`.

    python benchmarks/fuzz.py --folder fuzz --n 100000     # per target; a killed run goes on
    python benchmarks/fuzz.py --folder fuzz --repeat fuzz/findings/gguf-1234
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import resource
import struct
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

import lensteer as ls
from lensteer.annotation import SentenceClassifier, fit_classifier
from lensteer.annotation.alignment import align
from lensteer.annotation.judge_questions import parse_reply, parse_score
from lensteer.annotation.published import parse_published, read_published
from lensteer.annotation.splitting import split_sentences
from lensteer.export.control_vectors import read_control_vector
from lensteer.export.plan_files import CONFIG, VECTORS, read_plan
from lensteer.expressions import parse_scope
from lensteer.files import SEAL, read_tensors, write_atomically
from lensteer.models import ModelId
from lensteer.pipeline import ORGANISM
from lensteer.pipeline.run import MANIFEST, Run
from lensteer.planner import shape_of
from lensteer.statistics import Estimate
from lensteer.steering.cache import CacheVector
from lensteer.steering.evidence import ControlRange, Evidence, Sample, TextMeasure
from lensteer.tasks.grading import final_answer
from lensteer.traces import load_traces
from lensteer.transcripts import read_transcripts
from lensteer.vectors import BehaviorVectors, Direction, Recipe

SLOW, LARGE = 10.0, 300 * 2**20  # seconds, bytes
#: Bytes beyond those in use at the start: what takes more ends with a `MemoryError` and leaves the machine alone.
ROOM = 4 * 2**30
SIX = ["One.", "Wait, no.", "Two.", "Maybe.", "For example, 3.", "So 4."]
WORDS = tuple(
    word.encode()
    for word in (
        '["backtracking"]', '["end-section"]', '{"labels": [', '"n": 1', '"label": "deduction"', "</think>", "<think>",
        "\\boxed{", "$", "####", "1/2", "nan", "1e999", "-0", "null", "true", "\\ud800", "\u2028", "\ufeff", "é", "🤔",
        "onsets", "first(8)", "at([1, -1])", " & ", "~(", "generated", "((((", "direction.0", "direction.99999999999",
        "F32", "[0, 18446744073709551615]", '"data_offsets"', "__metadata__", "../../etc/passwd", "[[[[[[", "{}", "\n",
        "Infinity", "NaN", "0.5", "-1", '"x"', "[" * 3000, '{"a":' * 3000,
    )
)  # fmt: skip
#: Values of every kind, for places of others.
ODD = (
    None,
    True,
    False,
    0,
    1,
    -1,
    0.5,
    2**63,
    10**400,
    float("inf"),
    float("nan"),
    "",
    "x",
    "12",
    [],
    [1],
    {},
    {"a": 1},
)


@dataclass(frozen=True)
class Target:
    """How a file is read, and valid inputs."""

    read: Callable[[Path], object]
    seeds: Sequence[bytes]


@dataclass(frozen=True)
class Row:
    """What came of a target's inputs."""

    target: str
    inputs: int = 0
    read: int = 0
    refused: int = 0
    findings: int = 0
    seconds: float = 0.0


def damaged(seed: bytes, rng: random.Random) -> bytes:
    """A valid input with one to six damages, or JSON with another value somewhere."""
    if rng.random() < 0.2 and (other := _other_value(seed, rng)) is not None:
        return other
    data = bytearray(seed)
    for _ in range(rng.choice((1, 1, 2, 3, 6))):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(7)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(data):
            data[at] = rng.randrange(256)
        elif kind == 2:
            del data[at : len(data) if rng.random() < 0.3 else at + rng.randrange(1, 9)]
        elif kind == 3:
            data[at:at] = data[at : at + rng.randrange(1, 40)] * rng.choice((1, 2, 30))
        elif kind == 4:
            data[at:at] = rng.choice(WORDS)
        elif kind == 5 and len(data) >= 8:
            at = rng.randrange(len(data) - 7)
            data[at : at + 8] = struct.pack("<Q", rng.choice((0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)))
        else:
            begin = min(at, rng.randrange(len(data) + 1))
            data[at:at] = data[begin : begin + rng.randrange(64)]
    return bytes(data[:20_000])


def _other_value(seed: bytes, rng: random.Random) -> bytes | None:
    """JSON, JSONL or a safetensors file's own JSON with another value somewhere, or one less; None for other files."""
    if seed[8:9] == b"{":
        size = int.from_bytes(seed[:8], "little")
        header = json.loads(seed[8 : 8 + size])
        texts = {name: text for name, text in header.get("__metadata__", {}).items() if text.startswith("{")}
        if texts and rng.random() < 0.8:
            name, text = rng.choice(list(texts.items()))
            header["__metadata__"][name] = json.dumps(_changed(json.loads(without_digest(text.encode())), rng))
        else:
            header = _changed(header, rng)
        written = json.dumps(header).encode()
        return len(written).to_bytes(8, "little") + written + seed[8 + size :]
    for lines in ([seed], seed.splitlines()):
        try:
            values = [json.loads(line) for line in lines]
        except ValueError:
            continue
        at = rng.randrange(len(lines))
        lines[at] = json.dumps(_changed(values[at], rng)).encode()
        return b"\n".join(lines)
    return None


def _changed(values: Any, rng: random.Random) -> Any:
    """The values with another one in the place of one of them, at any depth, or without it."""
    if not isinstance(values, dict | list) or not values or rng.random() < 0.1:
        return rng.choice(ODD)
    key = rng.choice(list(values) if isinstance(values, dict) else range(len(values)))
    if rng.random() < 0.1:
        del values[key]
    else:
        values[key] = _changed(values[key], rng)
    return values


def text_of(read: Callable[[str], object]) -> Callable[[Path], object]:
    """A reader of text, which bytes that are no UTF-8 become."""
    return lambda path: read(path.read_bytes().decode("utf-8", "replace"))


def _align(text: str) -> object:
    chain, *parts = text.split("\n")
    sentences = [ls.Sentence(ls.BEHAVIORS[i % len(ls.BEHAVIORS)], part) for i, part in enumerate(parts)]
    return align(sentences, chain, range(len(chain)), prompt_length=3)


def without_digest(data: bytes) -> bytes:
    """The same JSON without the digest, which would refuse most damages before the reader sees them."""
    return re.sub(rb',\s*"' + SEAL.encode() + rb'": "\w*"', b"", data)


def _plan(name: str, folder: Path) -> Callable[[Path], object]:
    """Reads a plan's folder in which one file is the given one; its settings have the right digest of the tensors."""
    settings = json.loads(without_digest((folder / CONFIG).read_bytes()))

    def read(path: Path) -> object:
        data = path.read_bytes()
        (folder / name).write_bytes(data)
        if name == VECTORS:
            (folder / CONFIG).write_text(json.dumps({**settings, "sha256": hashlib.sha256(data).hexdigest()}))
        return read_plan(folder)

    return read


def _placed(name: str, folder: Path, read: Callable[[Path], object]) -> Callable[[Path], object]:
    """Reads a folder in which a file is the given one."""

    def read_there(path: Path) -> object:
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(path.read_bytes())
        return read(folder)

    return read_there


def targets(folder: Path) -> dict[str, Target]:
    """All targets; `folder` is for the files of plans."""
    direction = Direction("backtracking", torch.arange(24.0).reshape(3, 8) + 1, torch.ones(3), (0, 1, 2))
    plan = ls.SteeringPlan(direction, 1, 2.0, ls.everywhere)
    model = ModelId("tiny", "", 3, 8, "0" * 16, "1" * 16, "2" * 16)
    gguf = ls.export.gguf(plan, folder / "plan.gguf").read_bytes()
    share = Estimate(0.2, 0.1, 0.3, 9, 0)
    evidence = Evidence(
        asdict(model), "backtracking", 1, 1, 2.0, "difference", 3.0, "everywhere", "sentences", "rules", 9, 1,
        share, share, share, None, 0.01, (ControlRange("isotropic", 5, -0.1, 0.1, 1),), "more", True,
        (TextMeasure("nll", 2.0, 1.9, 2.5, True),), share, share, (Sample("t-1", "a", "b"),), {"temperature": 0.8}, "0",
    )  # fmt: skip
    evidence.save(folder / "evidence.json")
    plan = replace(plan, evidence=evidence)
    gated = replace(plan, gate=ls.Gate(0.1), schedule=ls.Schedule.half_life(8.0), scope=ls.onsets & ls.first(9))
    plans = []
    for name, each in (("plain", plan), ("gated", gated)):
        made = ls.export.folder(each, folder / name, model=model)
        plans.append(without_digest((made / CONFIG).read_bytes()))
    raw = torch.randn((2, 3, 8), generator=torch.Generator().manual_seed(0))
    counts = {"backtracking": 3, "deduction": 4}
    vectors = BehaviorVectors(raw, torch.ones(3), tuple(counts), (0, 1, 2), counts, 5, Recipe())
    vectors.save(folder / "vectors.safetensors")
    tensors, header = read_tensors(folder / "vectors.safetensors")
    plain = save(tensors, {"lensteer": json.dumps(header)})
    task = ls.Task("t-1", "math", "dev", "How many?", "18", "numeric")
    span = ls.Span("deduction", 4, 9, 0, 12)
    ids = (1, 2, 3), (4, 5, 6, 7), (0, 4, 8, 12)
    trace = ls.Trace(task, "How many?", "Wait, it is 18.", *ids, finished=True, spans=(span,))
    ls.save_traces([trace, replace(trace, sample=1)], folder / "traces.jsonl")
    traces = (folder / "traces.jsonl").read_bytes()
    pairs = [
        {"prompt": "Hi", "positive": "Hello, dear friend.", "negative": "What."},
        {"prompt": "Hm?", "positive": "Gladly.", "negative": "No."},
    ]
    chain = "First, 2 + 2. Wait, no: it is 5.\nMaybe it is 4. For example, 3."
    texts = [{"prompt": f"{i} + 2?", "response": f"<think>\n{chain} So {i}.\n</think>\n\n{i}"} for i in range(6)]
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    labeled = ls.annotate(read_transcripts(folder / "texts.jsonl"), ls.rules)
    fit_classifier(labeled).save(folder / "classifier.safetensors")
    published = [{**texts[0], "annotated": '["deduction"] First, 2 + 2. ["end-section"]'}]
    cached = CacheVector("steps", torch.ones(3, 2, 4), torch.ones(3, 2, 4), "last_prompt", {"n_pairs": 3})
    cached.save(folder / "cache.safetensors")
    Run(folder, ORGANISM, {"traces": {"chains": 3, "seconds": 0.5}}, asdict(model), ["A note."]).write()
    shape = dict(num_attention_heads=4, num_hidden_layers=3, hidden_size=8, intermediate_size=16, vocab_size=99)
    replies = [
        '{"labels": [{"n": 1, "label": "deduction"}, {"n": 2, "label": "backtracking"}]}',
        "1. deduction\n2. backtracking\n3: uncertainty-estimation",
        '["deduction"] One. ["end-section"] ["backtracking"] Wait, no. ["end-section"]',
        "I think so. Score: 85/100",
    ]
    answers = [
        "So it is \\boxed{\\frac{1}{2}}.",
        "She makes $18 every day.\n#### 18",
        "The answer is (B), 1,200 apples.",
    ]
    return {
        "annotations": Target(text_of(parse_published), [replies[2].encode(), chain.encode()]),
        "alignment": Target(text_of(_align), [chain.encode(), f"{chain}\n{chain}".encode()]),
        "sentences": Target(text_of(split_sentences), [chain.encode(), b"a. b! $x = 1.5$ (c.) d...\n\n* e"]),
        "judge": Target(
            text_of(lambda text: (parse_reply(text, SIX), parse_score(text))), [r.encode() for r in replies]
        ),
        "scopes": Target(text_of(parse_scope), [b"onsets & first(8)", b"~(thinking | at([1, 2]))", b"sentence_starts"]),
        "answers": Target(
            text_of(lambda text: [final_answer(text, g, question="How many?") for g in ("numeric", "choice", "exact")]),
            [a.encode() for a in answers],
        ),
        "vectors": Target(BehaviorVectors.load, [(folder / "vectors.safetensors").read_bytes(), plain]),
        "plan settings": Target(_plan(CONFIG, folder / "plain"), plans),
        "plan tensors": Target(_plan(VECTORS, folder / "gated"), [(folder / "gated" / VECTORS).read_bytes()]),
        "gguf": Target(read_control_vector, [gguf]),
        "traces": Target(
            lambda path: [(t.thinking, t.answer, t.correct, t.prompt_length) for t in load_traces(path)],
            [traces, without_digest(traces)],
        ),
        "tasks": Target(
            lambda path: ls.load_tasks(path),
            [
                json.dumps(asdict(task)).encode() + b"\n",
                b'{"question": "2+2?", "answer": "It is 4.\\n#### 4"}\n{"question": "3?", "answer": "#### 3"}\n',
            ],
        ),
        "cache vector": Target(CacheVector.load, [(folder / "cache.safetensors").read_bytes()]),
        "classifier": Target(
            lambda path: SentenceClassifier.load(path)(labeled[:1]), [(folder / "classifier.safetensors").read_bytes()]
        ),
        "results": Target(Evidence.load, [without_digest((folder / "evidence.json").read_bytes())]),
        "manifest": Target(
            _placed(MANIFEST, folder / "other", Run.open), [without_digest((folder / MANIFEST).read_bytes())]
        ),
        "texts": Target(read_transcripts, [(folder / "texts.jsonl").read_bytes()]),
        "published": Target(read_published, [json.dumps(row).encode() for row in published]),
        "shapes": Target(
            _placed("config.json", folder / "shape", lambda at: shape_of(str(at))), [json.dumps(shape).encode()]
        ),
        "pairs": Target(
            ls.load_pairs,
            ["\n".join(map(json.dumps, pairs)).encode(), b"".join(json.dumps(p).encode() + b"\n" for p in pairs[:1])],
        ),
    }


SUFFIX = {"vectors": ".safetensors", "gguf": ".gguf", "traces": ".jsonl", "tasks": ".jsonl", "pairs": ".jsonl"}
SUFFIX |= {"texts": ".jsonl", "published": ".jsonl"}


def tried(target: Target, data: bytes, path: Path) -> tuple[str, str]:
    """What an input does: "read", "refused", or "findings" with the reason."""
    path.write_bytes(data)
    begun, peak = time.monotonic(), _peak()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target.read(path)
        outcome = "read"
    except ls.LensteerError:
        outcome = "refused"
    except Exception:  # what the fuzzer looks for
        return "findings", traceback.format_exc()
    took, bytes_more = time.monotonic() - begun, _peak() - peak
    if took < SLOW and bytes_more < LARGE:
        return outcome, ""
    return "findings", f"{took:.0f} s, {bytes_more / 2**20:.0f} MB"


def _peak() -> int:
    """Most bytes that this process has had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _limit_memory() -> None:
    """Give this process `ROOM`, whatever an input says (on Linux)."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, resource.getrlimit(resource.RLIMIT_AS)[1]))


def main(n: int, folder: Path, only: Sequence[str] = ()) -> list[Row]:
    """Try `n` inputs of each target; goes on from what the folder's `state.json` says.

    Raises:
        LensteerError: an unknown target.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = folder / "state.json"
    done = json.loads(state.read_text()) if state.exists() else {}
    with tempfile.TemporaryDirectory() as scratch:
        known = targets(Path(scratch))
        if unknown := [name for name in only if name not in known]:
            raise ls.LensteerError(f"no target {unknown[0]!r}: choose from {', '.join(known)}")
        for name in only or known:
            row = Row(**done[name]) if name in done else Row(name)
            path = Path(scratch) / f"input{SUFFIX.get(name, '.txt')}"
            begun = time.monotonic()
            for number in range(row.inputs, n):
                rng = random.Random(f"{name}/{number}")
                data = damaged(rng.choice(known[name].seeds), rng)
                outcome, why = tried(known[name], data, path)
                if why:
                    kept = folder / "findings" / f"{name.replace(' ', '-')}-{number}"
                    kept.parent.mkdir(exist_ok=True)
                    kept.write_bytes(data)
                    kept.with_suffix(".txt").write_text(why, encoding="utf-8", errors="backslashreplace")
                counts: dict[str, Any] = dict(inputs=number + 1, seconds=row.seconds + time.monotonic() - begun)
                row, begun = replace(row, **counts, **{outcome: getattr(row, outcome) + 1}), time.monotonic()
                if (number + 1) % 1000 == 0:
                    write_atomically(state, json.dumps({**done, name: asdict(row)}, indent=1))
            done[name] = asdict(row)
            write_atomically(state, json.dumps(done, indent=1))
    return [Row(**row) for row in done.values()]


def table(rows: Sequence[Row]) -> str:
    """A line per target, and the sum."""
    lines = ["target | inputs | read | refused | findings | seconds |", "---|---|---|---|---|---|"]
    total = Row("all", *(sum(getattr(row, name) for row in rows) for name in ("inputs", "read", "refused", "findings")))
    for row in (*rows, replace(total, seconds=sum(row.seconds for row in rows))):
        lines.append(
            f"{row.target} | {row.inputs:,} | {row.read:,} | {row.refused:,} | {row.findings} | {row.seconds:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for counts and findings")
    parser.add_argument("--n", type=int, default=100_000, help="inputs of each target")
    parser.add_argument("--only", nargs="+", default=[], help="targets")
    parser.add_argument("--repeat", type=Path, help="read one kept input again, with its traceback")
    given = parser.parse_args()
    _limit_memory()
    if given.repeat:
        with tempfile.TemporaryDirectory() as scratch:
            known = targets(Path(scratch))
            named = next(name for name in known if given.repeat.name.startswith(name.replace(" ", "-")))
            again = Path(scratch) / f"again{SUFFIX.get(named, '.txt')}"
            again.write_bytes(given.repeat.read_bytes())
            print(known[named].read(again))
    else:
        print(table(main(given.n, given.folder, given.only)))
