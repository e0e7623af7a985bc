"""``chiasm merge``: an adapter merged into its base, with the proof that the model answers as before."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("merge")
@click.argument("model", metavar="ADAPTER|FOLDER")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--base", default=None, help="The base model, where the adapter names none or it was moved.")
@click.option("--dtype", default="float32", type=click.Choice(["float32", "bfloat16", "float16"]), show_default=True)
@click.option("--tolerance", default=1e-5, show_default=True, help="How far logits may move, relative to the largest.")
@click.option("--device", default="cpu", show_default=True)
def command(model: str, out: Path, base: str | None, dtype: str, tolerance: float, device: str) -> None:
    """Merge the adapter in MODEL into its base and write an ordinary model folder to OUT.

    Merging is done and proved in float32; --dtype rounds the merged weights afterwards.
    """
    import torch

    import chiasm
    from chiasm.checkpoints.folder import is_adapter
    from chiasm.train.methods.files import load_adapter
    from chiasm.train.methods.merge import distance, merge, probe_logits

    if is_adapter(Path(model)):
        vlm = load_adapter(model, base, dtype=torch.float32, device=device)
    else:
        vlm = chiasm.load(model, dtype=torch.float32, device=device)
    proof = merge(vlm, tolerance)
    click.echo(str(proof))
    if dtype != "float32":
        exact = probe_logits(vlm)
        vlm.to(getattr(torch, dtype))
        gap = max(distance(a, b) for a, b in zip(exact, probe_logits(vlm), strict=True))
        click.echo(f"rounded to {dtype}: logits moved by at most {gap:.1e}")
    provenance = vlm.config.provenance.add(f"merged from {model}: {proof}")
    vlm.config = vlm.config.model_copy(update={"provenance": provenance})
    vlm.save(out)
    click.echo(f"wrote {out}")
