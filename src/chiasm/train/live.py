"""A page that shows a run while it runs: ``live.html``, one file that reloads itself, written every few seconds."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from chiasm.report.curve import curve
from chiasm.report.run import StageReport
from chiasm.train.usage import told

MOST_POINTS = 600  # of a curve


class LivePage:
    """The page of a whole run. ``stages`` are (name, steps, settings); each stage's folder lies in ``out``.

    A sink of every stage in turn (``of``); it reads the stages' own logs, so a resumed run shows what came before.
    """

    def __init__(self, out: Path, title: str, stages: Sequence[tuple[str, int, dict[str, Any]]], seconds: float):
        self.path, self.title, self.stages, self.seconds = out / "live.html", title, list(stages), seconds
        self.last = 0.0
        self.begun = time.time()
        env = Environment(loader=PackageLoader("chiasm.report", "pages"), autoescape=True, trim_blocks=True)
        self.template = env.get_template("live.html")

    def write(self, record: Mapping[str, Any]) -> None:
        """Write the page where the last one is old enough."""
        if time.monotonic() - self.last >= self.seconds:
            self.show("running")

    def close(self) -> None:
        """A stage ended, or broke off: its last records are shown."""
        self.show("running")

    def show(self, state: str, why: str = "") -> Path:
        """Write the page: ``running``, ``finished`` or ``stopped``; only a running one reloads itself."""
        begun = time.monotonic()
        page = self.template.render(
            title=self.title,
            state=state,
            why=why,
            seconds=max(1, round(self.seconds)),
            at=time.strftime("%Y-%m-%d %H:%M:%S"),
            stages=[self._stage(*stage) for stage in self.stages],
        )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        aside.write_text(page, encoding="utf-8")
        os.replace(aside, self.path)
        self.last = time.monotonic()
        # a page that is slow to draw (a file system far away) never takes more than a twentieth of the time
        self.last += max(0.0, 20 * (self.last - begun) - self.seconds) if self.seconds else 0.0
        return self.path

    def _stage(self, name: str, total: int, settings: dict[str, Any]) -> dict[str, Any]:
        folder = self.path.parent / name
        if not (folder / "log.jsonl").is_file():
            return {"name": name, "total": total, "step": 0}
        report = StageReport.read(folder, settings)
        each = report.last("seconds_per_step")
        usage: dict[str, Any] = next((r for r in reversed(report.log) if "usage/cpu_percent" in r), {})
        lines = [replace(line, points=thinned(line.points)) for line in report.lines()]
        return {
            "name": name,
            "total": total,
            "step": report.steps,
            "done": (folder / "done.json").is_file(),
            "left": _duration(each * (total - report.steps)) if each else "",
            "lines": lines,
            "svg": curve(lines, f"loss of stage {name} by step") if lines else Markup(""),
            "numbers": [(label, form.format(value)) for label, form, value in _numbers(report) if value is not None],
            "usage": told(usage),
            "reading": report.reading,
            "proof": report.proof,
        }


def thinned(points: Sequence[tuple[float, float]], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most ``most`` points: means over neighbours, so that no part of the curve is left out."""
    each = -(-len(points) // most)
    if each <= 1:
        return list(points)
    groups = [points[i : i + each] for i in range(0, len(points), each)]
    return [(g[-1][0], sum(y for _, y in g) / len(g)) for g in groups]


def _numbers(report: StageReport) -> list[tuple[str, str, Any]]:
    return [
        ("loss", "{:.4f}", report.last("loss")),
        ("held-out loss", "{:.4f}", report.last("held_out/loss")),
        ("learning rate", "{:.2e}", report.last("lr")),
        ("gradient norm", "{:.3f}", report.last("grad_norm")),
        ("samples/s", "{:.1f}", report.last("samples_per_s")),
        ("waiting for data", "{:.1%}", report.last("data_wait")),
        ("epoch", "{}", report.last("epoch")),
    ]


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{seconds:02.0f}"
