"""Two towers: embedding against transformers on the same weights, the index of a large folder, and search in it.

    python benchmarks/towers.py                 # all; about ten minutes on two quiet cores
    python benchmarks/towers.py --pictures 32 --repeats 1 --folder 1000      # a quick look

Weights are random, of CLIP ViT-B/32's shape: speed does not depend on them. Each peer reads the same JPEG files from
the disk and the same captions, takes its turn in each repeat, and its fastest turn counts.

Two peers are compared with. *As its pages show it*: transformers in the type of the checkpoint (float32), batch by
batch in one process. *At its best*: in bfloat16, with smaller batches (faster here) and a torch ``DataLoader`` whose
worker processes open and process the pictures meanwhile. The last row rounds the weights of the towers to 8 bits
(``VLM.quantize``), which the others do not; what that does to vectors and to their neighbours is printed beside.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import limits, results
from PIL import Image

import chiasm
from chiasm.lm.tokenizer import Tokenizer
from chiasm.nn.quality import nearness
from chiasm.retrieve.vectors import Exact, Faiss

ROOT = Path(__file__).parents[1]
TOKENIZER = ROOT.parent / "shared" / "data" / "weights" / "tokenizers" / "clip"
SIDES = (640, 480)
INT8 = "chiasm, bfloat16, weights int8"
FLOPS = {"image": 2 * 4.41e9, "text": 2 * 37.8e6}  # of ViT-B/32: a picture, and a token of a text


def pictures(folder: Path, count: int) -> list[str]:
    """JPEG files of 640 × 480: smooth colours with some noise, about 100 kB each."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    found = []
    for i in range(count):
        path = folder / f"{i:05}.jpg"
        small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
            SIDES, Image.Resampling.BICUBIC
        )
        noisy = np.clip(np.asarray(small).astype(np.int16) + rng.integers(-12, 12, (SIDES[1], SIDES[0], 1)), 0, 255)
        Image.fromarray(noisy.astype(np.uint8)).save(path, quality=88)
        found.append(str(path))
    return found


def captions(count: int) -> list[str]:
    """Texts of six to thirty words."""
    told = "a the red blue small large dog cat car tree house on under beside with two old man woman child river"
    words = told.split()
    rng = np.random.default_rng(1)
    return [" ".join(rng.choice(words, rng.integers(6, 30))) for _ in range(count)]


def transformers_folder(folder: Path) -> Path:
    """CLIP ViT-B/32 of transformers with random weights, its processor beside it."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig())
    model.config.text_config.eos_token_id = 49407
    model.save_pretrained(folder)
    Tokenizer.from_folder(TOKENIZER).save(folder)
    processing = {
        **{"image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": 224}},
        **{
            "do_center_crop": True,
            "crop_size": {"height": 224, "width": 224},
            "do_rescale": True,
            "do_normalize": True,
        },
        **{"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]},
        **{"resample": 3, "do_convert_rgb": True},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processing))
    return folder


class Peer:
    """transformers: open, process, embed, batch by batch; with ``workers`` processes that open and process ahead."""

    def __init__(self, folder: Path, dtype: torch.dtype, batch: int, workers: int = 0):
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        self.model = CLIPModel.from_pretrained(folder, dtype=dtype).eval()
        self.processor, self.tokenizer = (
            AutoImageProcessor.from_pretrained(folder),
            AutoTokenizer.from_pretrained(folder),
        )
        self.dtype, self.batch, self.workers = dtype, batch, workers
        self.loader: Any = None

    def processed(self, paths: list[str]) -> torch.Tensor:
        opened = [Image.open(p).convert("RGB") for p in paths]
        return self.processor(opened, return_tensors="pt")["pixel_values"]

    @torch.inference_mode()
    def images(self, paths: list[str]) -> torch.Tensor:
        batches: Any = map(self.processed, (paths[i : i + self.batch] for i in range(0, len(paths), self.batch)))
        if self.workers:
            options: Any = {"num_workers": self.workers, "persistent_workers": True, "collate_fn": self.processed}
            self.loader = self.loader or torch.utils.data.DataLoader(paths, self.batch, **options)  # starts once
            batches = self.loader
        found = [_pooled(self.model.get_image_features(pixel_values=x.to(self.dtype))) for x in batches]
        return torch.nn.functional.normalize(torch.cat(found).float(), dim=-1)

    @torch.inference_mode()
    def texts(self, texts: list[str]) -> torch.Tensor:
        found = []
        for start in range(0, len(texts), self.batch):
            given = self.tokenizer(texts[start : start + self.batch], padding=True, return_tensors="pt")
            found.append(_pooled(self.model.get_text_features(**given)))
        return torch.nn.functional.normalize(torch.cat(found).float(), dim=-1)


def _pooled(found: Any) -> torch.Tensor:
    return found if isinstance(found, torch.Tensor) else found.pooler_output


def embedding(work: Path, options: argparse.Namespace, rate: dict[str, float]) -> list[dict[str, Any]]:
    """Pictures and texts a second of both packages, from files and strings to vectors."""
    folder = transformers_folder(work / "hf")
    vlm = chiasm.load(folder)
    low = chiasm.load(folder).to(torch.bfloat16)
    rounded = chiasm.load(folder, dtype="bfloat16")
    paths, texts = pictures(work / "pictures", options.pictures), captions(2 * options.pictures)
    workers = os.cpu_count() or 1
    told = rounded.quantize("int8", images=paths, texts=texts[: len(paths)])
    print(f"int8 against bfloat16: {told}", flush=True)
    peers = {
        "transformers, float32": Peer(folder, torch.float32, 32),
        "transformers, bfloat16": Peer(folder, torch.bfloat16, 32),
        "transformers, bfloat16, at its best": Peer(folder, torch.bfloat16, 16, workers),
    }
    runs: dict[str, dict[str, Callable[[], torch.Tensor]]] = {"image": {}, "text": {}}
    for name, peer in peers.items():
        runs["image"][name], runs["text"][name] = (lambda p=peer: p.images(paths)), (lambda p=peer: p.texts(texts))
    for name, model in {"chiasm, float32": vlm, "chiasm, bfloat16": low, INT8: rounded}.items():
        runs["image"][name] = lambda m=model: m.embed(images=paths, batch=64)
        runs["text"][name] = lambda m=model: m.embed(texts=texts, batch=64)
    rows = []
    for kind, count in (("image", len(paths)), ("text", len(texts))):
        first = {name: run() for name, run in runs[kind].items()}
        wanted = first["transformers, float32"]
        apart = {name: float((wanted - x).norm(dim=1).max()) for name, x in first.items()}
        assert apart["chiasm, float32"] < 2e-4, f"the vectors are not those of transformers: {apart}"
        best = dict.fromkeys(runs[kind], float("inf"))
        for _ in range(options.repeats):
            for name, run in runs[kind].items():
                start = time.perf_counter()
                run()
                best[name] = min(best[name], time.perf_counter() - start)
            rate.update({name: max(value, rate[name]) for name, value in limits().items()})  # its best, as of the runs
        tokens = 1 if kind == "image" else sum(len(low.tokenizer.encode(t)) + 2 for t in texts) / len(texts)
        other = min(seconds for name, seconds in best.items() if name.startswith("transformers"))
        for name, seconds in best.items():
            limit = rate[
                "matrix product bfloat16, GFLOP/s" if "bfloat16" in name else "matrix product float32, GFLOP/s"
            ]
            done = count / seconds
            row = {
                "what": kind,
                "run": name,
                "per_s": round(done, 1),
                "times": round(best["transformers, float32"] / seconds, 2),
                "times_best": round(other / seconds, 2),
            }
            row |= {"ceiling": round(done * FLOPS[kind] * tokens / 1e9 / limit, 3), "apart": round(apart[name], 5)}
            rows.append(row)
            if name == INT8:
                near = nearness(first["chiasm, bfloat16"], first[name])
                row |= {"cosine": near.cosine, "worst": near.worst, "kept": near.kept}
            print(row, flush=True)
    return rows


INDEXING = """
import sys, time
from pathlib import Path
from chiasm.retrieve import Index
import chiasm
model, folder = sys.argv[1:3]
index = Index.open(Path(folder) / ".chiasm-index", chiasm.load(model))
update = index.update_folder(folder, batch=64, workers=2)
peak = next(int(l.split()[1]) / 1024 for l in open("/proc/self/status") if l.startswith("VmHWM"))
print(update.added, update.seconds, peak)
"""


def indexing(work: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A folder of many small pictures, and a tenth of it: the time a picture, and the peak of memory."""
    import yaml

    config = yaml.safe_load((ROOT / "recipes" / "clip-playground.yaml").read_text())["model"]["config"]
    model = chiasm.build(config, tokenizer=ROOT / "src" / "chiasm" / "weights" / "tiny-lm").save(work / "tiny")
    rng = np.random.default_rng(2)
    rows = []
    for count in (options.folder // 10, options.folder):
        folder = work / f"folder{count}"
        folder.mkdir()
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (96, 128, 3), dtype=np.uint8)).save(folder / f"{i}.jpg", quality=70)
        told = subprocess.run(
            [sys.executable, "-c", INDEXING, str(model), str(folder)], capture_output=True, text=True, check=True
        ).stdout.split()
        row = {"pictures": int(told[0]), "per_s": round(count / float(told[1]), 1), "peak_mb": round(float(told[2]))}
        rows.append(row)
        print(row, flush=True)
    return rows


def searching(work: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One query at a time among 100,000 vectors of CLIP's width."""
    torch.manual_seed(0)
    count, dim = options.vectors, 512
    centres = torch.randn(2000, dim)
    x = torch.nn.functional.normalize(centres[torch.randint(0, 2000, (count,))] + 0.7 * torch.randn(count, dim), dim=1)
    queries = torch.nn.functional.normalize(x[:50] + 0.03 * torch.randn(50, dim), dim=1)
    store = Exact(work, "x", dim, 0, cut=True)
    store.add(x)
    runs: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "torch, float32 product and top-k": lambda q: (q @ x.T).topk(10).indices,
        "chiasm, exact": lambda q: store.search(q, 10)[1],
    }
    try:
        import faiss

        flat, near = faiss.IndexFlatIP(dim), Faiss(store)
        flat.add(x.numpy())
        near.save()
        runs["faiss, flat"] = lambda q: torch.from_numpy(flat.search(q.numpy(), 10)[1])
        runs["chiasm, engine faiss"] = lambda q: near.search(q, 10)[1]
    except ImportError:
        print("faiss is not installed: its rows are left out")
    wanted, rows = (queries @ x.T).topk(10).indices, []
    for name, run in runs.items():
        found = torch.cat([run(q.unsqueeze(0)) for q in queries])
        hit = float((found.unsqueeze(2) == wanted.unsqueeze(1)).any(2).float().mean())
        times = []
        for q in list(queries) * options.repeats:
            start = time.perf_counter()
            run(q.unsqueeze(0))
            times.append(1e3 * (time.perf_counter() - start))
        times.sort()
        row = {
            "run": name,
            "ms_median": round(times[len(times) // 2], 2),
            "ms_best": round(times[0], 2),
            "recall": round(hit, 4),
        }
        rows.append(row)
        print(row, flush=True)
    return rows


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pictures", type=int, default=384)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=int, default=10_000)
    parser.add_argument("--vectors", type=int, default=100_000)
    parser.add_argument("--only", default="embedding,indexing,search")
    parser.add_argument("--note", default="", help="Written into the table: what else the machine did.")
    options = parser.parse_args()
    found = limits()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        parts = {
            "embedding": lambda: embedding(work, options, found),
            "indexing": lambda: indexing(work, options),
            "search": lambda: searching(work, options),
        }
        wanted = options.only.split(",")
        if "embedding" in wanted and not TOKENIZER.is_dir():
            print(f"towers: there is no {TOKENIZER}, so embedding is left out", flush=True)
            wanted.remove("embedding")
        file = results() / "towers.json"
        before = json.loads(file.read_text()) if file.is_file() else {}  # what is left out now stays as it was
        rows = {name: run() if name in wanted else before.get(name, []) for name, run in parts.items()}
    write(rows, options, found)


def write(rows: dict[str, list[dict[str, Any]]], options: argparse.Namespace, found: dict[str, Any]) -> None:
    """The results as JSON and as tables."""
    folder = results()
    settings = vars(options) | {"torch": torch.__version__, "limits": found}
    (folder / "towers.json").write_text(json.dumps({"settings": settings, **rows}, indent=1) + "\n")
    told = ", ".join(f"{name} {value}" for name, value in found.items())
    lines = [
        "# Two towers, measured",
        "",
        f"`python benchmarks/towers.py`. This machine: {told}. {options.note}".strip(),
        "",
    ]
    lines += [
        f"CLIP ViT-B/32, random weights; {options.pictures} JPEG files of {SIDES[0]}×{SIDES[1]}, {2 * options.pictures}"
        " texts of 6 to 29 words; decoding and tokenising included. *Times*: of transformers as its pages show it "
        "(float32, one process); *times best*: of the fastest way to use transformers here (bfloat16, batches of 16, "
        "decoding in worker processes). *Ceiling*: share of the matrix product's rate in the same type. *Apart*: "
        "largest distance of a vector from that of transformers in float32. *Weights int8*: rounded, which the peer "
        "does not do; its ceiling is that of bfloat16 too, which it may pass.",
        "",
        "| what | run | a second | times | times best | ceiling | apart |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {r['what']} | {r['run']} | {r['per_s']} | {r['times']} | {r['times_best']} | {r['ceiling']:.1%} "
        f"| {r['apart']} |"
        for r in rows["embedding"]
    ]
    lines += [
        f"\n{r['what']}: int8 weights against bfloat16: cosine {r['cosine']:.5f} (worst {r['worst']:.5f}), "
        f"{r['kept']:.1%} of the ten nearest are the same."
        for r in rows["embedding"]
        if "kept" in r
    ]
    lines += ["", "An index over a folder of 128×96 JPEG files, by the playground's towers, two decoding threads.", ""]
    lines += ["| pictures | a second | peak of memory, MB |", "|---:|---:|---:|"]
    lines += [f"| {r['pictures']:,} | {r['per_s']} | {r['peak_mb']} |" for r in rows["indexing"]]
    lines += ["", f"One query among {options.vectors:,} vectors of width 512, ten results.", ""]
    lines += ["| run | median, ms | best, ms | recall@10 |", "|---|---:|---:|---:|"]
    lines += [f"| {r['run']} | {r['ms_median']} | {r['ms_best']} | {r['recall']:.1%} |" for r in rows["search"]]
    (folder / "towers.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
