"""The pages of docs/presets, and what ``chiasm show`` prints.

    python -m chiasm.presets.page docs/presets      # what ``make docs`` runs

Every number on a page is computed from the configuration (``anatomy``) or stands in the preset's record.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from chiasm import registry
from chiasm.compose import build_model
from chiasm.fusion.classifier import Classifier
from chiasm.fusion.dual_tower import DualTower
from chiasm.fusion.pair import PairConfig
from chiasm.model_config import VLMConfig
from chiasm.presets import preset, presets
from chiasm.presets.anatomy import FRAMES, PICTURE, SIZES, Step, count_tokens, flow, parts, walkable
from chiasm.presets.page_fused import fused
from chiasm.presets.page_towers import compared, steps, texts
from chiasm.presets.record import Preset, Stage
from chiasm.processing.messages import parse
from chiasm.processing.templates import TEMPLATES

MADE = "<!-- Made by `make docs` from src/chiasm/presets. Change it there. -->"
UNSEEN = (
    "Not verified: the released weights. Where this was built no checkpoint could be fetched, so equality was shown "
    "on small random models of the reference libraries, and sizes on the meta device."
)
TALK = (
    {"role": "user", "content": [{"type": "image", "image": ""}, {"type": "text", "text": "What is this?"}]},
    {"role": "assistant", "content": "A cat."},
    {"role": "user", "content": "Is it asleep?"},
    {"role": "assistant", "content": "Yes."},
)


# ------------------------------------------------------------------------------------------------------ chiasm show


def describe(config: VLMConfig) -> str:
    """Parts, sizes, the way of a 640 x 480 picture and token counts of any configuration, for a terminal."""
    model = build_model(config.model, device="meta")
    rows = parts(config, model)
    table = [(row.place, row.type, f"{row.parameters:,}", row.options) for row in rows]
    table.append(("total", "", f"{sum(row.parameters for row in rows):,}", ""))
    lines = [config.provenance.preset or config.model.type, config.provenance.paper or "", ""]
    lines += columns(("part", "type", "parameters", "options"), table, right={2})
    if isinstance(config.model, DualTower.Config):
        for which in ("image", "text"):
            lines += ["", f"the way of a{'n' if which == 'image' else ''} {which}", *diagram(steps(config, which))]
        lines += ["", compared(config.model), texts(config)]
    if isinstance(config.model, Classifier.Config):
        lines += ["", "the way of an image", *diagram(steps(config, "image"))]
    if isinstance(config.model, PairConfig):
        lines += ["", *fused(config)]
    for kind in walkable(config):
        lines += ["", _opening(kind), *diagram(flow(config, kind, model=model))]
        if kind == "image":
            lines += ["", "tokens of a picture, by width x height in pixels"]
            lines += columns(
                ("picture", "tokens"), [(f"{w} x {h}", str(n)) for (w, h), n in _counts(config)], right={1}
            )
    if config.provenance.licences:
        lines += ["", "licences"] + [f"  {part}: {words}" for part, words in config.provenance.licences.items()]
    return "\n".join(line.rstrip() for line in lines)


def columns(head: Sequence[str], rows: Iterable[Sequence[str]], right: set[int] | None = None) -> list[str]:
    """Lines of a plain table; the columns numbered in ``right`` are set to the right."""
    cells = [list(head), *map(list, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    side = [str.rjust if i in (right or ()) else str.ljust for i in range(len(head))]
    return ["  " + "  ".join(side[i](row[i], widths[i]) for i in range(len(head))) for row in cells]


def diagram(steps: Sequence[Step]) -> list[str]:
    """The steps under each other, with the shape each leaves behind."""
    width = max(len(step.what) for step in steps)
    marks = ["│"] * (len(steps) - 1) + ["▼"]
    shapes = ["[" + ", ".join(map(str, step.shape)) + "]" for step in steps]
    return [f"  {mark}  {step.what.ljust(width)}   {shape}" for mark, step, shape in zip(marks, steps, shapes)]


# ------------------------------------------------------------------------------------------------------ pages


def page(record: Preset) -> str:
    """The page of one preset, in Markdown."""
    config = record.config()
    model = build_model(config.model, device="meta")
    rows = parts(config, model)
    total = sum(row.parameters for row in rows)
    tiny = sum(row.parameters for row in parts(preset(record.name, tiny=True)))
    blocks = [
        f"# {record.name}",
        MADE,
        record.function.__doc__ or "",
        f"**Paper**: {_linked(record)}. **Released**: {record.system.released}. "
        f"**Reference**: {record.system.reference}.",
        f"```python\nconfig = chiasm.preset({record.name!r})              # {total:,} parameters\n"
        f"config = chiasm.preset({record.name!r}, tiny=True)   # the same structure, {tiny:,} parameters\n```",
        "## Parts",
        _table(
            ("part", "type", "parameters", "options that differ from the type's own"),
            [
                *((f"`{row.place}`", row.type, f"{row.parameters:,}", row.options) for row in rows),
                ("**all**", "", f"**{total:,}**", ""),
            ],
        ),
        *_middle(config, model),
        "## Recipe",
        _table(("", *(stage.name for stage in record.stages)), _recipe(record.stages)),
        "Starts from " + ("; ".join(f"`{place}`: {name}" for place, name in record.base.items()) or "nothing") + ".",
        *_list("## Notes", record.notes),
        *_list("## Differences by design", record.differences),
        *_list("## Choices where the publication is open", record.system.choices),
        *_list("## What was verified, and how", (_counted(record, total), *record.verified)),
        UNSEEN,
        *_list("## Licences", [f"{part}: {words}" for part, words in record.licences.items()]),
        "As their publishers state them; read them before you use or pass on any weights.",
    ]
    return "\n\n".join(blocks) + "\n"


def _middle(config: VLMConfig, model: Any) -> list[str]:
    """What a page shows between parts and recipe."""
    if isinstance(config.model, DualTower.Config):
        return _compares(config)
    if isinstance(config.model, Classifier.Config):
        way = "```\n" + "\n".join(diagram(steps(config, "image"))) + "\n```"
        return ["## From a picture to its class", way, "A softmax over the scores; the names are `processing.labels`."]
    if isinstance(config.model, PairConfig):
        return ["## What is read, and what comes out", *fused(config)]
    return _writes(config, model)


def _writes(config: VLMConfig, model: Any) -> list[str]:
    """The middle of the page of a model that writes: the way of its media, token counts, the prompt."""
    ways = [
        f"{_opening(kind)}:\n\n```\n" + "\n".join(diagram(flow(config, kind, model=model))) + "\n```"
        for kind in config.processing.media
    ]
    return [
        "## From a picture to the next word",
        *ways,
        "## Tokens",
        _tokens(config),
        "## Prompt",
        f"Template {_template(config)}, at most {config.processing.max_length:,} tokens. What is learned from stands "
        "between ⟦ and ⟧, ⏎ is a line break, and `<image>` is the picture:",
        f"```\n{_prompt(config)}\n```",
    ]


def _compares(config: VLMConfig) -> list[str]:
    """The middle of the page of a model of two towers: the ways of a picture and of a text, and the score."""
    ways = ["```\n" + "\n".join(diagram(steps(config, which))) + "\n```" for which in ("image", "text")]
    return ["## From a picture to its vector", ways[0], "## From a text to its vector", ways[1], texts(config),
            "## Score", compared(config.model)]  # type: ignore[arg-type]  # fmt: skip


def index(records: Sequence[Preset]) -> str:
    """The table of all presets, in Markdown."""
    rows, others = [], []
    for record in records:
        config = record.config()
        if not hasattr(config.model, "lm"):
            others.append((f"[{record.name}]({record.name}.md)", record.family, f"{record.parameters:,}", record.paper))
            continue
        video = count_tokens(config, "video", PICTURE) if "video" in config.processing.media else None
        rows.append(
            (
                f"[{record.name}]({record.name}.md)",
                record.family,
                f"{record.parameters:,}",
                str(count_tokens(config, "image", PICTURE)),
                f"{video} ({config.processing.media['video'].frames} frames)" if video else "",
                record.paper,
            )
        )
    head = ("preset", "system", "parameters", "tokens of 640 x 480", "of a clip", "paper")
    words = (
        "A preset is a published system as a configuration. `chiasm show NAME` prints what stands on its page, "
        "`chiasm.preset(NAME)` returns it, and `tiny=True` gives a small form with the same structure."
    )
    blocks = ["# Presets", MADE, words, "## Models that write", _table(head, rows)]
    if others:
        blocks += ["## Models that compare or fuse", _table(("preset", "system", "parameters", "paper"), others)]
    return "\n\n".join(blocks) + "\n"


def pages() -> dict[str, str]:
    """File name → text of every page and of the index."""
    records = presets()
    return {f"{record.name}.md": page(record) for record in records} | {"README.md": index(records)}


def _opening(kind: str) -> str:
    size = f"{PICTURE[0]} x {PICTURE[1]}"
    return f"A clip of {FRAMES} frames of {size} pixels" if kind == "video" else f"A picture of {size} pixels"


def _counts(config: VLMConfig) -> list[tuple[tuple[int, int], int]]:
    return [(size, count_tokens(config, "image", size)) for size in SIZES]


def _tokens(config: VLMConfig) -> str:
    """Tokens by size of the picture; the two columns are equal where nothing depends on the number of pictures."""
    head = ("picture, width x height", "tokens alone", "tokens each, with another")
    rows = [(f"{w} x {h}", str(n), str(count_tokens(config, "image", (w, h), of=2))) for (w, h), n in _counts(config)]
    return _table(head, rows)


def _prompt(config: VLMConfig) -> str:
    """A short conversation as the template writes it, with what is learned from between brackets."""
    settings = config.processing.template
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    template = registry.get("template", settings.type)(settings, tokens, {"image": "<image>"})
    text = ""
    for piece in template.render(parse(TALK, "page"), False, "page"):
        words = "<image>" if piece.medium is not None else piece.text
        text += f"⟦{words}⟧" if piece.train and words else words
    return text.replace("⟧⟦", "").replace("\n", "⏎\n")


def _template(config: VLMConfig) -> str:
    """The names under which the template is published."""
    names = [f"`{name}`" for name, data in TEMPLATES.items() if data == config.processing.template]
    return " or ".join(names) + (" (the same)" if len(names) > 1 else "") if names else "of its own"


def _recipe(stages: Sequence[Stage]) -> list[tuple[str, ...]]:
    def row(name: str, *cells: str) -> tuple[str, ...]:
        return (f"**{name}**", *cells)

    def known(value: float | None, form: str = "g") -> str:
        return "not published" if value is None else format(value, form)

    return [
        row("data", *("<br>".join(s.data) for s in stages)),
        row("learns", *(", ".join(f"`{p}`" for p in s.trains) for s in stages)),
        row("learning rate", *(known(s.lr) for s in stages)),
        row("rates of their own", *(", ".join(f"`{p}` {r:g}" for p, r in s.rates.items()) or "none" for s in stages)),
        row("schedule", *(f"{s.schedule} to {s.last_lr:g} after {_warmup(s.warmup)} warm-up" for s in stages)),
        row("batch", *(known(s.batch) for s in stages)),
        row("epochs", *(known(s.epochs) for s in stages)),
        row("maximal length", *(known(s.max_length) for s in stages)),
        row("template", *(f"`{s.template}`" if " " not in s.template else s.template for s in stages)),
        row("weight decay", *(known(s.weight_decay) for s in stages)),
        row("stands in", *(s.source for s in stages)),
    ]


def _warmup(share: float | None) -> str:
    if share is None:
        return "an unpublished"
    return f"{share:.0%}" if share < 1 else f"{share:,.0f} steps of"


def _counted(record: Preset, total: int) -> str:
    """The line on parameters, in which ``total`` is what was built just now."""
    words = f"Parameters: {total:,} built here, {record.parameters:,} expected: {record.counted}."
    if record.transformers:
        number, rows = record.transformers
        words += f" The checkpoint in the transformers layout has {number:,}, with {rows:,} rows of vocabulary."
    if isinstance(record.function().model, DualTower.Config | Classifier.Config):
        return words + " `tests/contracts/test_tower_presets.py`"
    if isinstance(record.function().model, PairConfig):
        return words + " `tests/contracts/test_fused_presets.py`"
    return words + " `tests/contracts/test_presets.py`"


def _linked(record: Preset) -> str:
    link = record.system.link or (f"https://arxiv.org/abs/{record.system.arxiv}" if record.system.arxiv else None)
    return f"[{record.paper}]({link})" if link else record.paper


def _list(title: str, lines: Iterable[str]) -> list[str]:
    found = [f"* {line}" for line in lines]
    return [title, "\n".join(found)] if found else []


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(folder: str) -> None:
    """Writes every page to ``folder`` and removes pages of presets that are no more."""
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    texts = pages()
    for old in {p.name for p in place.glob("*.md")} - texts.keys():
        (place / old).unlink()
    for name, text in texts.items():
        (place / name).write_text(text, encoding="utf-8")
    print(f"{len(texts)} pages in {place}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "docs/presets")
