"""Where the log goes beside ``log.jsonl``, by the recipe's ``log``: TensorBoard, Weights & Biases, trackio, live page.

Each is a package of its own that is imported only when it is asked for. ``log.jsonl`` is always written and is what the
report, the live page and a resumed run read; the others get its numbers, and are never read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from pydantic import Field, field_validator

from chiasm.config import Config
from chiasm.errors import ConfigError

NEEDS = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}
SECONDS = 10.0


class LogSpec(Config):
    """``wandb`` and ``trackio`` hold the arguments of their ``init``, ``project`` at least; ``true``: the run's."""

    tensorboard: bool = False
    wandb: bool | dict[str, Any] = False
    trackio: bool | dict[str, Any] = False
    live: bool | float = Field(default=False, ge=0)  # live.html, written anew each so many seconds; true: every ten

    @field_validator("wandb", "trackio")
    @classmethod
    def _project(cls, value: Any) -> Any:
        if isinstance(value, dict) and not isinstance(value.get("project"), str):
            raise ValueError(f"needs a project, got {sorted(value)}; write {{project: name}}")
        return value

    def check(self) -> None:
        """Raise ConfigError, before a run begins, where a package that is asked for is missing."""
        for name, package in NEEDS.items():
            if getattr(self, name) and find_spec(package) is None:
                raise ConfigError(
                    f"log.{name} needs the package {package!r}, which is not installed; "
                    f"pip install 'chiasm[{name}]', or take log.{name} out of the recipe (log.jsonl is always written)"
                )

    @property
    def seconds(self) -> float | None:
        """Seconds between two live pages; None: there is none."""
        if self.live is False:
            return None
        return SECONDS if self.live is True else float(self.live)


class Sink(Protocol):
    """Takes records as they are logged."""

    def write(self, record: Mapping[str, Any]) -> None:
        """A record with its ``step``."""
        ...

    def close(self) -> None:
        """No more records come."""
        ...


OpenSinks = Callable[[int], Sequence[Sink]]  # given the step that a run goes on from, 0 at the beginning


class Log:
    """One log for the loop: each record into the file first, then to the sinks."""

    def __init__(self, *sinks: Any):
        self.all = list(sinks)

    def write(self, record: Mapping[str, Any]) -> None:
        """Write a record everywhere."""
        for sink in self.all:
            sink.write(record)

    def close(self) -> None:
        """Close all; a second call does nothing."""
        closing, self.all = self.all, []
        for sink in closing:
            sink.close()


def open_sinks(
    spec: LogSpec, run: str, stage: str, folder: Path, settings: Mapping[str, Any], start: int
) -> list[Sink]:
    """The sinks of a stage whose folder is ``folder``. Raises ConfigError where a package is missing."""
    spec.check()
    found: list[Sink] = []
    if spec.tensorboard:
        found.append(TensorBoard(folder / "tensorboard", start))
    for name in ("wandb", "trackio"):
        options = getattr(spec, name)
        if options:
            given = dict(options) if isinstance(options, dict) else {"project": run}
            found.append(Tracker(name, given, run, stage, folder, settings, start))
    return found


class TensorBoard:
    """Event files under a folder. On resume, what was written after the checkpoint is hidden (``purge_step``)."""

    def __init__(self, folder: Path, start: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=start + 1 if start else None)

    def write(self, record: Mapping[str, Any]) -> None:
        """Every number of the record under its own name."""
        for name, value in numbers(record).items():
            self.writer.add_scalar(name, value, record["step"])
        self.writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self.writer.close()


class Tracker:
    """Weights & Biases, or trackio, which takes the same calls. A run of the tracker for each stage.

    The run's id is kept beside the log, so that a resumed stage goes on in the same run.
    """

    def __init__(
        self,
        package: str,
        options: dict[str, Any],
        run: str,
        stage: str,
        folder: Path,
        settings: Mapping[str, Any],
        start: int,
    ):
        from importlib import import_module

        self.module: Any = import_module(package)
        options = {"name": f"{run}/{stage}", "config": dict(settings)} | options
        kept = folder / f"{package}.id"
        if start and kept.is_file():
            options |= {"resume": "allow"} | ({"id": kept.read_text().strip()} if package == "wandb" else {})
        self.run: Any = self.module.init(**options)
        folder.mkdir(parents=True, exist_ok=True)
        kept.write_text(str(getattr(self.run, "id", "")))

    def write(self, record: Mapping[str, Any]) -> None:
        """Every number of the record."""
        self.module.log(numbers(record), step=record["step"])

    def close(self) -> None:
        """End the tracker's run."""
        self.module.finish()


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record but its step."""
    return {k: float(v) for k, v in record.items() if k != "step" and isinstance(v, int | float)}
