"""What a run says while it works: a JSONL log, the plan's table, progress bars."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from chiasm.train.plan import Plan
from chiasm.train.usage import told

FILE_WIDTH = 120  # columns of what is written to a file or a pipe
WIDE = 110  # columns from which a progress bar has room for all there is to say


def terminal(quiet: bool = False) -> Console:
    """The console of a run. A file or a pipe has no width of its own: rich would break its lines at 80 columns."""
    known = sys.stdout.isatty() or os.environ.get("COLUMNS")
    return Console(quiet=quiet, width=None if known else FILE_WIDTH)


class JsonLog:
    """One JSON object a line. On resume the lines after the checkpoint's step are removed."""

    def __init__(self, path: Path, resume_at: int | None = None):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        kept = []
        if resume_at is not None and path.is_file():
            kept = [r for r in read_log(path) if r["step"] <= resume_at]
        aside = path.with_name(f".{path.name}")
        aside.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        os.replace(aside, path)  # in one step, so that a kill here loses nothing
        self.file = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """Append a record and flush it."""
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a log; a last line cut by a kill is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def print_plan(console: Console, stage: str, plan: Plan) -> None:
    """The plan as a table: part, parameters, what happens to them, learning rate."""
    share = 100 * plan.trainable / plan.total
    console.print(f"[bold]Stage {stage}[/] trains {plan.trainable:,} of {plan.total:,} parameters ({share:.1f} %)")
    table = Table(header_style="bold", box=None)
    table.add_column("part")
    table.add_column("parameters", justify="right")
    table.add_column("plan")
    table.add_column("learning rate", justify="right")
    for row in plan.rows:
        style = None if row.trainable else "dim"
        table.add_row(row.part, f"{row.parameters:,}", row.action, f"{row.lr:g}" if row.lr else "", style=style)
    console.print(table)


class Bars:
    """A progress bar of a stage; where the output is no terminal, about ten plain lines instead."""

    def __init__(self, console: Console, stage: str, total: int, done: int = 0):
        self.console, self.stage, self.total = console, stage, total
        self.every, self.printed = max(1, total // 10), done
        self.narrow = console.is_terminal and console.width < WIDE
        self.progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=8 if self.narrow else 20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            *(() if self.narrow else (TimeElapsedColumn(),)),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task(stage, total=total, completed=done, note="")

    def __enter__(self) -> Bars:
        self.progress.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.progress.stop()

    def advance(self, step: int) -> None:
        """Show that ``step`` steps are done."""
        self.progress.update(self.task, completed=step)

    def update(self, step: int, record: dict[str, Any]) -> None:
        """Show loss, rate and speed after ``step`` steps."""
        loss, speed = f"loss {record['loss']:.3f}", f"{record['samples_per_s']:.0f} samples/s"
        whole = f"{loss}  lr {record['lr']:.1e}  {speed}  {told(record)}"
        note = f"{loss}  {speed}" if self.narrow else whole
        self.progress.update(self.task, note=note)
        if not self.console.is_terminal and (step - self.printed >= self.every or step == self.total):
            self.printed = step
            left = (self.total - step) * record["seconds_per_step"]
            self.console.print(f"  {self.stage} {step}/{self.total}  {note}  {left:.0f} s left", highlight=False)
