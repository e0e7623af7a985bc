"""All benchmarks: the limits of this machine, then every comparison with a named peer. ``make bench`` calls this.

    python benchmarks/run.py            # all, about four hours on two quiet cores
    python benchmarks/run.py train      # some, by file name
    python benchmarks/run.py --quick    # the smallest form of each, to see that it runs: minutes

Results go to ``benchmarks/results``; those of ``--quick`` say nothing about speed and go to ``runs/bench-quick``. One
that fails does not stop the others: it is named at the end, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
QUICK = HERE.parent / "runs" / "bench-quick"
HELPERS = {"run", "machine"}

MINUTES = {  # of the whole form on two quiet cores, about
    "bridges": 75,
    "data_wait": 8,
    "infer": 10,
    "look": 1,
    "matching": 15,
    "methods": 60,
    "serve": 20,
    "stage1": 5,
    "towers": 10,
    "train": 25,
}
SMALLEST = {  # what makes each as short as it can be
    "bridges": "--align 2 --instruct 2 --limit 40 --rows mlp --runs {runs}/bridges --out {results}",
    "data_wait": "--shape tiny --epochs 0.25 --workers 0",
    "infer": "--shape tiny --repeats 1 --bits int8 --output {results}/infer",
    "look": "--questions 4 --output {results}/look.json",
    "matching": "--samples 64 --held 32 --steps 2 --only ViLT --out {results}",
    "methods": "--steps 2 --base-steps 2 --limit 9 --only lora-r=4 --runs {runs}/methods",
    "serve": "--size tiny --clients 1 --requests 1 --tokens 4 --folder {runs}/serve",
    "stage1": "--samples 48 --held 24 --steps 2 --lr 1e-3 --hardness 1 --out {results}",
    "towers": "--pictures 4 --repeats 1 --folder 32 --vectors 500",
    "train": "--case parity-tiny-1 --repeats 1",
}


def benchmarks() -> list[str]:
    """The files of this folder that can be run by themselves, in the order of their names."""
    return sorted(
        path.stem
        for path in HERE.glob("*.py")
        if path.stem not in HELPERS and "def main(" in path.read_text() and "_peers" not in path.stem
    )


def command(name: str, quick: bool) -> list[str]:
    """What runs a benchmark."""
    told = SMALLEST[name].format(runs=QUICK, results=QUICK) if quick else ""
    return [sys.executable, str(HERE / f"{name}.py"), *told.split()]


def machine(folder: Path) -> None:
    """Measure the machine's limits, and write and print them."""
    from machine import limits

    found = limits()
    (folder / "machine.json").write_text(json.dumps(found, indent=1) + "\n")
    print("\n".join(f"{name}: {value}" for name, value in found.items()), flush=True)


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(benchmarks())}; none: all")
    parser.add_argument("--quick", action="store_true", help="the smallest form of each")
    options = parser.parse_args()
    names = options.names or benchmarks()
    unknown = sorted(set(names) - set(benchmarks()))
    if unknown:
        raise SystemExit(f"unknown: {', '.join(unknown)}; there are {', '.join(benchmarks())}")
    folder = QUICK if options.quick else HERE / "results"
    folder.mkdir(parents=True, exist_ok=True)
    machine(folder)
    ended: dict[str, tuple[float, int]] = {}
    for number, name in enumerate(names, 1):
        expected = "" if options.quick else f", about {MINUTES[name]} minutes on two quiet cores"
        print(f"\n[{number}/{len(names)}] {name}{expected}; begun {time.strftime('%H:%M:%S')}", flush=True)
        begun = time.perf_counter()
        there = os.environ | {"CHIASM_BENCH_RESULTS": str(folder)}
        done = subprocess.run(command(name, options.quick), env=there)
        ended[name] = (time.perf_counter() - begun, done.returncode)
    print(f"\nResults in {folder}")
    for name, (seconds, code) in ended.items():
        print(f"  {name:10} {seconds / 60:6.1f} min  {'done' if code == 0 else f'failed with status {code}'}")
    if any(code for _, code in ended.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
