"""What a model is, as a table in a notebook."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import TYPE_CHECKING

from chiasm.presets.anatomy import parts

if TYPE_CHECKING:
    from chiasm.vlm import VLM


def card(vlm: VLM) -> str:
    """Parts with their sizes and how much of each is trained, tokens it writes and reads with, where it comes from."""
    trained: dict[str, int] = {}
    for name, parameter in vlm.named_parameters():
        place = ".".join(name.split(".")[:2]) if name.startswith(("encoders.", "connectors.")) else name.split(".")[0]
        trained[place] = trained.get(place, 0) + parameter.numel() * parameter.requires_grad
    told = [
        (row.place, row.type, f"{row.parameters:,}", f"{trained.get(row.place, 0):,}", row.options)
        for row in parts(vlm.config, vlm.model)
    ]
    processing, origin = vlm.config.processing, vlm.config.provenance
    lines = [f"template {processing.template.type}"] if vlm.has_processor else ["no tokenizer"]
    lines += [f"{kind}: front end {config.type}" for kind, config in processing.media.items()]
    lines += [origin.paper or "", *(f"licence of {what}: {words}" for what, words in origin.licences.items())]
    lines += [f"ignored: {words}" for words in origin.ignored_fingerprint]
    return (
        f"<div><b>{escape(repr(vlm))}</b>"
        f"<table>{_row('th', ('part', 'type', 'parameters', 'need a gradient', 'options'))}"
        f"{''.join(_row('td', row) for row in told)}</table>"
        f"{'<br>'.join(escape(line) for line in lines if line)}</div>"
    )


def _row(cell: str, values: Iterable[str]) -> str:
    return "<tr>" + "".join(f"<{cell} style='text-align:left'>{escape(v)}</{cell}>" for v in values) + "</tr>"
