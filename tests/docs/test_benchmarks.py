"""``make bench`` runs every benchmark, and ``make bench-quick`` its smallest form, away from the results."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def run(of_benchmarks):
    return of_benchmarks("run")


def test_every_benchmark_has_a_smallest_form_and_a_time(run):
    assert "train" in run.benchmarks() and "machine" not in run.benchmarks()
    assert sorted(run.SMALLEST) == sorted(run.MINUTES) == run.benchmarks()


def test_the_smallest_forms_use_options_that_are_there_and_keep_off_the_results(run):
    for name in run.benchmarks():
        text = (FOLDER / f"{name}.py").read_text()
        words = run.command(name, quick=True)[2:]
        for flag in (word for word in words if word.startswith("--")):
            assert f'"{flag}"' in text, f"{name}.py has no option {flag}"
        assert "--out" in words or "--output" in words or "results()" in text, f"{name}.py writes into results"
        assert not re.search(r"\{\w+\}", " ".join(words))
        assert run.command(name, quick=False)[2:] == []
