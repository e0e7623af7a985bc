"""Servers side by side: ``chiasm serve`` and ``transformers serve`` with the same weights, questions and pictures.

    python benchmarks/serve.py [--clients 1 4 16] [--requests 3] [--peer-requests 1] [--tokens 32] [--threads 2]

A random LLaVA of a given size is written once in each layout. Each server runs in a process of its own, one after the
other, with the same number of threads. Every client asks one streamed question after the other, each with a picture of
its own; tokens are counted by the servers' usage. ``transformers serve`` needs ``pip install fastapi``; where it is not
installed the table has Chiasm alone and says so.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import importlib.util
import io
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from machine import limits, results
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

ROOT = Path(__file__).resolve().parents[1]
SPECIALS = ["<s>", "</s>", "<pad>", "<image>"]
SIZES = {
    "0.1B": {"dim": 768, "depth": 12, "heads": 12, "kv_heads": 4, "mlp": 2048, "vocab": 32000},
    "tiny": {"dim": 64, "depth": 2, "heads": 4, "kv_heads": 2, "mlp": 128, "vocab": 512},
}


def tokenizer(folder: Path) -> Path:
    """Every byte is a token, so that a random model writes text."""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate([*SPECIALS, *alphabet])}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    made.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return folder


def write_models(folder: Path, size: str) -> tuple[Path, Path, int]:
    """The same random weights in both layouts, and how many they are."""
    import chiasm

    lm = {"type": "decoder", "max_positions": 2048, "tied": False, **SIZES[size]}
    side = 224 if size == "0.1B" else 56
    vit = {"dim": lm["dim"] // 2, "depth": lm["depth"] // 2, "heads": lm["heads"] // 2, "mlp": lm["mlp"]}
    config = chiasm.preset("llava-1.5-7b", tiny=True).edit(
        **{"model.lm": {**chiasm.preset("llava-1.5-7b", tiny=True).dump()["model"]["lm"], **lm}},
        **{f"model.encoders.image.{key}": value for key, value in {**vit, "image_size": side, "patch": 14}.items()},
        **{"processing.media.image.size": side, "processing.media.image.shortest_edge": side},
    )
    vlm = chiasm.build(config, tokenizer=tokenizer(folder / "tokenizer"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in vlm.parameters():
            parameter.normal_(0, 0.05, generator=generator)
        letters = [vlm.tokenizer.encode(letter)[0] for letter in "abcdefghijklmnopqrstuvwxyz"]
        head = vlm.state_dict()["lm.lm_head.weight"]
        head[[i for i in range(len(head)) if i not in letters]] = 0  # an answer is letters: it never ends, and streams
    vlm.to(torch.bfloat16)
    return vlm.save(folder / "chiasm"), vlm.export(folder / "hf", format="hf"), vlm.num_parameters()


class Server:
    """A server as a process; left with the process gone."""

    def __init__(self, words: list[str], threads: int, log: Path):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        self.log = log.open("wb")
        self.process = subprocess.Popen(
            [sys.executable, *words, "--port", str(self.port)], env=environment, stdout=self.log, stderr=self.log
        )

    def __enter__(self) -> Server:
        deadline = time.monotonic() + 300
        while True:
            try:
                if self._health() == 200:
                    return self
            except OSError:
                pass
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"a server did not start; see {self.log.name}")
            time.sleep(0.2)

    def __exit__(self, *args: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def _health(self) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        connection.request("GET", "/health")
        return connection.getresponse().status

    def memory(self) -> float:
        """Largest resident memory so far, in MB."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) / 1024
        return 0.0


def url(seed: int) -> str:
    """A picture that no other request has."""
    pixels = torch.randint(0, 256, (240, 320, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    stream = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(stream, "JPEG")
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def ask(port: int, model: str, seed: int, tokens: int) -> dict[str, float]:
    """One streamed question: seconds to the first text and to the end, tokens by usage."""
    content = [
        {"type": "image_url", "image_url": {"url": url(seed)}},
        {"type": "text", "text": "Describe the picture in detail, and say how many objects are in it."},
    ]
    values = {"model": model, "messages": [{"role": "user", "content": content}], "stream": True, "temperature": 0}
    values |= {"max_tokens": tokens, "stream_options": {"include_usage": True}}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    begun = time.perf_counter()
    connection.request("POST", "/v1/chat/completions", json.dumps(values), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise SystemExit(f"{response.status}: {response.read()[:300]!r}")
    first, count = 0.0, 0
    for line in response:
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        if "error" in event:
            raise SystemExit(str(event))
        if not first and any(choice["delta"].get("content") for choice in event["choices"]):
            first = time.perf_counter() - begun
        count = (event.get("usage") or {}).get("completion_tokens") or count
    return {"first": first, "whole": time.perf_counter() - begun, "tokens": count}


def load(port: int, model: str, clients: int, requests: int, tokens: int) -> dict[str, float]:
    """``clients`` at a time, each asking one question after the other."""

    def client(number: int) -> list[dict[str, float]]:
        return [ask(port, model, 1000 * clients + 100 * number + i, tokens) for i in range(requests)]

    begun = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        found = [one for many in pool.map(client, range(clients)) for one in many]
    passed = time.perf_counter() - begun
    firsts = sorted(one["first"] for one in found)
    gaps = [(one["whole"] - one["first"]) / max(1, one["tokens"] - 1) for one in found]
    return {
        "clients": clients,
        "requests": len(found),
        "tokens": sum(one["tokens"] for one in found),
        "requests_per_s": len(found) / passed,
        "tokens_per_s": sum(one["tokens"] for one in found) / passed,
        "ttft_median_s": statistics.median(firsts),
        "ttft_p95_s": firsts[min(len(firsts) - 1, int(0.95 * len(firsts)))],
        "tpot_median_ms": 1000 * statistics.median(gaps),
    }


def servers(own: Path, hf: Path) -> dict[str, tuple[list[str], str]]:
    """The words that start each server, and the name its model has there."""
    chiasm = ["-c", "from chiasm.cli import main; main()", "serve", f"bench={own}", "--no-page", "--device", "cpu"]
    found = {"chiasm serve": ([*chiasm, "--slots", "16"], "bench")}
    if importlib.util.find_spec("fastapi"):
        peer = ["-c", "from transformers.cli.transformers import main; main()", "serve", str(hf), "--device", "cpu"]
        found["transformers serve"] = (peer, str(hf))
    return found


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--requests", type=int, default=3, help="of each client")
    parser.add_argument("--peer-requests", type=int, default=None, help="of each client, to a slower peer")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--size", choices=list(SIZES), default="0.1B")
    parser.add_argument("--note", default="", help="what the table should say about the machine")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "bench-serve")
    options = parser.parse_args()
    own, hf, parameters = write_models(options.folder, options.size)
    rows = []
    for name, (words, model) in servers(own, hf).items():
        with Server(words, options.threads, options.folder / "log.txt") as server:
            ask(server.port, model, 0, 4)  # loads and compiles what is left to load
            many = options.requests if model == "bench" else options.peer_requests or options.requests
            for clients in options.clients:
                row = {"server": name, **load(server.port, model, clients, many, options.tokens)}
                rows.append({**row, "peak_mb": server.memory()})
                print(json.dumps(rows[-1]), flush=True)
                write(rows, options, parameters)


def write(rows: list[dict], options: argparse.Namespace, parameters: int) -> None:
    """The results as JSON and as a table."""
    folder = results()
    facts = {key: getattr(options, key) for key in ("requests", "tokens", "threads", "size", "note")}
    facts |= {"parameters": parameters, "dtype": "bfloat16", "torch": torch.__version__, "limits": limits()}
    try:
        import transformers

        facts["transformers"] = transformers.__version__
    except ImportError:
        pass
    (folder / "serve.json").write_text(json.dumps({"settings": facts, "rows": rows}, indent=1) + "\n")
    lines = [
        "# Servers, measured",
        "",
        f"`python benchmarks/serve.py`: a random LLaVA of {parameters / 1e6:.0f} M parameters in bfloat16, "
        f"threads: {options.threads}, each client asks one streamed question after the other, with a picture of its "
        f"own, {options.tokens} tokens each. {options.note}".strip(),
        "",
        "| server | clients | asked | tokens/s | requests/s | TTFT median, s | TTFT p95, s | a token, ms | peak, MB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        speeds = f"{row['tokens_per_s']:.1f} | {row['requests_per_s']:.2f}"
        times = f"{row['ttft_median_s']:.2f} | {row['ttft_p95_s']:.2f} | {row['tpot_median_ms']:.0f}"
        lines.append(
            f"| {row['server']} | {row['clients']} | {row['requests']} | {speeds} | {times} | {row['peak_mb']:.0f} |"
        )
    if not importlib.util.find_spec("fastapi"):
        lines += ["", "`transformers serve` was not installed (it needs fastapi)."]
    (folder / "serve.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
