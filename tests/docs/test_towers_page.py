"""The page on two towers: its tables name parts, presets and files that are there, its commands have these options."""

from __future__ import annotations

import re
from pathlib import Path

from click.testing import CliRunner

from chiasm import registry
from chiasm.cli import main
from chiasm.presets import preset

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "towers.md").read_text(encoding="utf-8")


def test_parts_are_registered():
    table = PAGE[PAGE.index("| system |") : PAGE.index("`chiasm list`")]
    named = set(re.findall(r"`(\w+)`", table))
    assert named <= {*registry.names("encoder"), *registry.names("connector")} and len(named) == 9


def test_the_table_is_what_the_presets_are():
    for name, encoders, pools in (
        ("clip-vit-b32", ("vit", "text"), ("pooled", "pooled")),
        ("clip-rn50", ("resnet", "text"), ("clip_pool", "pooled")),
        ("siglip2-b16-224", ("vit", "text"), ("map_head", "pooled")),
        ("siglip2-b16-naflex", ("naflex", "text"), ("map_head", "pooled")),
        ("align-base", ("efficientnet", "bert"), ("pooled", "pooled")),
    ):
        model = preset(name).model
        assert tuple(model.encoders[k].type for k in ("image", "text")) == encoders
        assert tuple(model.connectors[k].type for k in ("image", "text")) == pools


def test_commands_have_these_options():
    shown = CliRunner().invoke(main, ["classify", "--help"]).output
    lines = [line for line in PAGE.splitlines() if line.startswith("chiasm classify")]
    assert len(lines) == 3
    for option in {option for line in lines for option in re.findall(r"--[a-z]+", line)}:
        assert option in shown
