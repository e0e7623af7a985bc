"""All benchmarks: the limits of this machine, then every comparison with a named peer. ``make bench`` calls this.

python benchmarks/run.py            # all
python benchmarks/run.py train      # some, by file name
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from machine import limits

HERE = Path(__file__).parent
HELPERS = {"run", "machine"}


def benchmarks() -> list[str]:
    """The files of this folder that can be run by themselves, in the order of their names."""
    return sorted(
        path.stem
        for path in HERE.glob("*.py")
        if path.stem not in HELPERS and "def main(" in path.read_text() and "_peers" not in path.stem
    )


def main() -> None:
    """Run what is asked for; stops at the first that fails."""
    names = sys.argv[1:] or benchmarks()
    unknown = sorted(set(names) - set(benchmarks()))
    if unknown:
        raise SystemExit(f"unknown: {', '.join(unknown)}; there are {', '.join(benchmarks())}")
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    found = limits()
    (results / "machine.json").write_text(json.dumps(found, indent=1) + "\n")
    print("\n".join(f"{name}: {value}" for name, value in found.items()), flush=True)
    for name in names:
        print(f"\n{name}", flush=True)
        subprocess.run([sys.executable, str(HERE / f"{name}.py")], check=True)


if __name__ == "__main__":
    main()
