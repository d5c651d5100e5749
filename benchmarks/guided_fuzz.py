"""`fuzz.py`, guided by coverage: atheris keeps the inputs that reach code of lensteer's that no earlier one reached.

One reader per call. The inputs that were kept lie in `FOLDER/TARGET`, and a later call goes on from them; a finding is
written to `FOLDER/findings` by atheris, which then ends.

    pip install atheris
    python benchmarks/guided_fuzz.py --folder guided --target traces --n 200000
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["lensteer"]):
    import fuzz


def main(folder: Path, target: str, n: int) -> None:
    """Try `n` inputs of a target; does not return, as atheris ends the process.

    Raises:
        LensteerError: an unknown target.
    """
    scratch = Path(tempfile.mkdtemp(prefix="lensteer-fuzz-"))
    known = fuzz.targets(scratch, runs=target.startswith("r"))  # those of a run's folder make one first
    if target not in known:
        raise fuzz.ls.LensteerError(f"no target {target!r}: choose from {', '.join(known)}")
    own, findings = folder / fuzz.named(target), folder / "findings"
    for each in (own, findings):
        each.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(known[target].seeds):
        (own / f"seed-{number}").write_bytes(seed)
    path = scratch / f"input{fuzz.SUFFIX.get(target, '.txt')}"

    def once(data: bytes) -> None:
        _, why = fuzz.tried(known[target], data, path)
        if why:
            raise RuntimeError(why)

    options = [f"-runs={n}", "-max_len=20000", f"-artifact_prefix={findings}/{own.name}-", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *options, str(own)], once)
    atheris.Fuzz()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="of kept inputs and findings")
    parser.add_argument("--target", required=True)
    parser.add_argument("--n", type=int, default=100_000, help="inputs")
    given = parser.parse_args()
    main(given.folder, given.target, given.n)
