"""``chiasm env``: what a bug report needs to say about the machine."""

from __future__ import annotations

import click

PACKAGES = (
    "torch",
    "numpy",
    "pillow",
    "safetensors",
    "tokenizers",
    "sentencepiece",
    "pydantic",
    "transformers",
    "av",
    "scikit-learn",
)


@click.command("env")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def command(as_json: bool) -> None:
    """Versions, processors and memory of this machine."""
    import json
    import os
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    import chiasm

    facts: dict[str, object] = {
        "chiasm": chiasm.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed"
    facts["cpu"] = (
        f"{os.cpu_count()} cores, {torch.get_num_threads()} torch threads, {torch.backends.cpu.get_cpu_capability()}"
    )
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        facts["memory"] = f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB"
    cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    facts["gpu"] = ", ".join(f"{c.name} {c.total_memory / 2**30:.0f} GiB" for c in cards) or "none"
    facts["mps"] = torch.backends.mps.is_available()
    if as_json:
        click.echo(json.dumps(facts, indent=1))
        return
    for key, value in facts.items():
        click.echo(f"{key:14} {value}")
