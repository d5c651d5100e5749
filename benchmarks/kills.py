"""Kill a run of the organism at random moments, again and again: does it end with an unharmed run's artifacts?

Each round starts the run in a process of its own and kills it (SIGKILL) after a time drawn between its start and the
time that a whole run takes; the next round resumes in the same folder. When a round comes to its end, the artifacts are
compared with those of a run that nobody harmed, byte for byte but for the times in them, and a new folder is begun.

    python benchmarks/kills.py --folder kills --n 50 --json kills.json    # goes on after an interruption
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lensteer.errors import LensteerError
from lensteer.files import read_json, write_atomically
from lensteer.pipeline import ORGANISM

#: A whole run in seconds, so small that most kills are not in the imports.
SMALL: dict[str, Any] = dict(
    n_train=48, n_dev=4, n_test=3, n_samples=1, train_tokens=100, max_new_tokens=300, batch_size=16, max_spans=4,
    n_controls=2, n_score_controls=3,
)  # fmt: skip
RUN = """
import json, sys
from dataclasses import replace
from lensteer.pipeline import ORGANISM, Run, complete
settings = json.loads(sys.argv[2])
complete(Run.open(sys.argv[1], replace(ORGANISM, **settings, coefficients=(0.2,))), print)
"""
#: Files that hold times, versions or the page made of them.
TIMED = {"run.json", "report.html", ".lock"}


@dataclass(frozen=True)
class Kill:
    """One kill: in which folder, after how many seconds, and the stages that were done by then."""

    folder: str
    seconds: float
    stages: tuple[str, ...]


@dataclass(frozen=True)
class Result:
    """All kills, folders whose run came to its end, and the files of these that differ from an unharmed run's."""

    kills: tuple[Kill, ...]
    finished: tuple[str, ...]
    different: tuple[str, ...]


def started(folder: Path) -> subprocess.Popen[bytes]:
    """The run, begun or resumed in a process of its own."""
    return subprocess.Popen([sys.executable, "-c", RUN, str(folder), json.dumps(SMALL)], stdout=subprocess.DEVNULL)


def artifacts(folder: Path) -> dict[str, Any]:
    """What a run made, without the times that it took."""
    found: dict[str, Any] = {}
    for path in sorted(folder.iterdir()):
        if path.name in TIMED or path.suffix == ".lock":
            continue
        if path.suffix == ".json":
            values = read_json(path)
            found[path.name] = {
                k: v for k, v in values.items() if k != "cost" and "second" not in k and "minutes" not in k
            }
        else:
            found[path.name] = path.read_bytes()
    return found


def stages(folder: Path) -> tuple[str, ...]:
    """Those that a run's manifest names as done."""
    path = folder / "run.json"
    return tuple(json.loads(path.read_text())["stages"]) if path.exists() else ()


def main(n: int, folder: Path, seed: int = 0) -> Result:
    """Kill `n` times, then let the last folder come to its end.

    Raises:
        LensteerError: a run fails by itself.
    """
    replace(ORGANISM, **SMALL)  # a misspelled setting would be found in the processes only
    whole = folder / "unharmed"
    begun = time.monotonic()
    _ended(started(whole), whole)
    known, state = artifacts(whole), folder / "state.json"
    kept: dict[str, Any] = dict(length=time.monotonic() - begun, kills=[])
    if state.exists():
        kept = json.loads(state.read_text())
    kills = [Kill(**{**kill, "stages": tuple(kill["stages"])}) for kill in kept["kills"]]
    finished, different = list(kept.get("finished", [])), list(kept.get("different", []))

    def compared(run: Path) -> None:
        finished.append(run.name)
        mine = artifacts(run)
        different.extend(f"{run.name}/{name}" for name in sorted(known | mine) if known.get(name) != mine.get(name))

    while len(kills) < n:
        run = folder / f"run-{len(finished)}"
        wait = random.Random(f"{seed}/{len(kills)}").uniform(0, kept["length"])
        process = started(run)
        try:
            code: int | None = process.wait(wait)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills.append(Kill(run.name, round(wait, 2), stages(run)))
        else:
            _check(code, run)
            compared(run)
        kept |= dict(kills=[asdict(kill) for kill in kills], finished=finished, different=different)
        write_atomically(state, json.dumps(kept))
    if (last := folder / f"run-{len(finished)}").exists() or not finished:
        _ended(started(last), last)
        compared(last)
    return Result(tuple(kills), tuple(finished), tuple(different))


def _ended(process: subprocess.Popen[bytes], folder: Path) -> None:
    _check(process.wait(), folder)


def _check(code: int | None, folder: Path) -> None:
    if code:
        raise LensteerError(f"the run in {str(folder)!r} ended with {code}: see what it printed")


def table(result: Result) -> str:
    """How many kills fell into which stage, and what came of the runs."""
    where: dict[str, int] = {}
    for kill in result.kills:
        name = f"after {kill.stages[-1]!r}" if kill.stages else "before the first stage was done"
        where[name] = where.get(name, 0) + 1
    lines = [f"{count} kills {name}" for name, count in where.items()]
    return "\n".join(
        [
            *lines,
            f"{len(result.finished)} runs came to their end; files that differ: {list(result.different) or 'none'}",
        ]
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--n", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    found = main(given.n, given.folder, given.seed)
    print(table(found))
    if given.json:
        given.json.write_text(json.dumps(asdict(found), indent=1) + "\n")
