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
import json
import random
import resource
import struct
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fuzz_targets import SUFFIX, Target, targets, without_digest

import lensteer as ls
from lensteer.files import write_atomically

SLOW, LARGE = 10.0, 300 * 2**20  # seconds, bytes
#: Bytes beyond those in use at the start: what takes more ends with a `MemoryError` and leaves the machine alone.
ROOM = 4 * 2**30
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
    "I32",
    "F8_E4M3",
    "C64",
)


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
    if rng.random() < 0.4 and (other := _other_value(seed, rng)) is not None:
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


def tried(target: Target, data: bytes, path: Path) -> tuple[str, str]:
    """What an input does: "read", "refused", or "findings" with the reason."""
    path.write_bytes(data)
    begun, peak, reading = time.monotonic(), _peak(), True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = target.read(path)
            reading = False
            target.use(found)
        outcome = "read"
    except ls.LensteerError as error:
        if reading and target.named and str(path.parent) not in str(error):
            return "findings", f"a message that does not name the file: {error}"
        outcome = "refused"
    except Exception:  # what the fuzzer looks for
        return "findings", traceback.format_exc()
    took, bytes_more = time.monotonic() - begun, _peak() - peak
    if took < SLOW and bytes_more < LARGE:
        return outcome, ""
    return "findings", f"{took:.0f} s, {bytes_more / 2**20:.0f} MB"


def named(target: str) -> str:
    """A target in names of files."""
    return target.replace(" ", "-").replace(".", "-")


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
            for number in range(row.inputs, -(-n // known[name].every)):
                rng = random.Random(f"{name}/{number}")
                data = damaged(rng.choice(known[name].seeds), rng)
                outcome, why = tried(known[name], data, path)
                if why:
                    kept = folder / "findings" / f"{named(name)}-{number}"
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
            target = next(name for name in known if named(name) == given.repeat.name.rpartition("-")[0])
            again = Path(scratch) / f"again{SUFFIX.get(target, '.txt')}"
            again.write_bytes(given.repeat.read_bytes())
            print(known[target].use(known[target].read(again)))
    else:
        print(table(main(given.n, given.folder, given.only)))
