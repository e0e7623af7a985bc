"""Inference: Chiasm's engine against transformers' ``generate`` on the same weights, pictures and questions.

    python benchmarks/infer.py                          # 135M: tables and JSON in benchmarks/results
    python benchmarks/infer.py --shape 0.5B --threads 2 --output benchmarks/results/infer-0.5B
    python benchmarks/infer.py --clock cpu --threads 1  # a busy machine: processor seconds, which others disturb little

All peers run in one process, in turns, with the same number of threads; each time is the best of some runs. llama.cpp
is one of them where ``gguf`` and ``llama-cpp-python`` are installed: it gets the same decoder's weights and the ids of
the same prompt of text. The share of bandwidth is the bytes of the weights that a token reads, times tokens per second,
over the read bandwidth measured in the same run. Weights are random, so answers are as long as asked for; quality is
that of int8 and int4 against the bf16 model, where random weights are a hard case (distributions are flat).
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from infer_peers import LlamaCpp, missing, write_gguf
from machine import limits
from PIL import Image
from train_data import SHAPES, WORDS, write_model

import chiasm
from chiasm.infer.sampling import Sampling
from chiasm.infer.service import Request, Service
from chiasm.nn.quality import quality
from chiasm.nn.quant import Quantized, quantize_model
from chiasm.types import Image as Picture
from chiasm.types import Message, Text

HERE = Path(__file__).parent
SHAPES["0.5B"] = {
    "text": {
        **{"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
        **{"num_key_value_heads": 2, "vocab_size": 151_936},
    },
    "vision": SHAPES["135M"]["vision"],
}
QUESTIONS = [
    *("what is this", "which colour has the plate", "how many people hold a sign", "describe the picture please"),
    *("is the cat left of the tree", "what stands behind the window", "which number is on the old boat"),
    *("what lies under the table", "who walks near the water", "is the sky bright or dark"),
]
DECODED, SHORT, PROMPT = 64, 16, 230
WHOLE = f"request of {PROMPT} + {DECODED} tokens of text, s"
GUESSES = 7


class Clock:
    """Measures by wall time, or by processor seconds of this process."""

    def __init__(self, kind: str, repeats: int):
        self.now = time.process_time if kind == "cpu" else time.perf_counter
        self.repeats = repeats

    def best(self, run: Callable[[int], object]) -> float:
        """Seconds of the fastest of some runs; each is told its number."""
        found = []
        for number in range(self.repeats):
            gc.collect()
            begun = self.now()
            run(number)
            found.append(self.now() - begun)
        return min(found)


def picture(seed: int) -> Image.Image:
    """640 x 480 pixels of large coloured squares."""
    data = np.random.default_rng(seed).integers(0, 255, (12, 16, 3), dtype=np.uint8)
    return Image.fromarray(data).resize((640, 480), Image.Resampling.NEAREST)


class Transformers:
    """The peer."""

    name = "transformers bf16"

    def __init__(self, folder: Path):
        self.processor = transformers.AutoProcessor.from_pretrained(folder)
        self.model = transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).eval()

    def answer(self, image: Image.Image, question: str, tokens: int) -> None:
        """One whole request, from picture to text."""
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = self.processor(images=image, text=text, return_tensors="pt").to(torch.bfloat16)
        with torch.inference_mode():
            found = self.model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        self.processor.batch_decode(found[:, inputs["input_ids"].shape[1] :])

    def write(self, text: str, ids: list[int], tokens: int) -> None:
        """One request of text only, given as ids."""
        prompt = torch.tensor([ids])
        with torch.inference_mode():
            self.model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
            )

    def many(self, image: Image.Image, questions: list[str], tokens: int) -> None:
        """One call after the other."""
        for question in questions:
            self.answer(image, question, tokens)


class Ours:
    """A service on one model."""

    def __init__(self, name: str, vlm: Any, threads: int, slots: int = 16):
        self.name, self.vlm = name, vlm
        self.service = Service(vlm, slots=slots, max_length=640, threads=threads)
        self.service.start()

    def forget(self) -> None:
        """Empty caches, as for a picture never seen."""
        for kept in (self.service.prefixes, self.service.features):
            kept.clear()

    def ask(self, image: Image.Image | None, question: str, tokens: int, guesses: int = 0) -> Any:
        """Submit one request."""
        sampling = Sampling.parse({"max_new_tokens": tokens, "ignore_eos": True, "prompt_lookup": guesses})
        parts = (Text(question),) if image is None else (Picture(image), Text(question))
        return self.service.submit(Request([Message("user", parts)], sampling))

    def answer(self, image: Image.Image, question: str, tokens: int) -> None:
        """One whole request, from picture to text."""
        self.ask(image, question, tokens).result()

    def write(self, text: str, ids: list[int], tokens: int, guesses: int = 0) -> None:
        """One request of text only."""
        self.ask(None, text, tokens, guesses).result()

    def many(self, image: Image.Image, questions: list[str], tokens: int) -> None:
        """All at once."""
        for handle in [self.ask(image, question, tokens) for question in questions]:
            handle.result()

    def weight_bytes(self) -> int:
        """Bytes of the weights that every token reads."""
        lm, total = self.vlm.model.lm, 0
        for module in lm.modules():
            if isinstance(module, Quantized):
                total += sum(t.numel() * t.element_size() for t in (module.packed, module.scales))
            elif isinstance(module, torch.nn.Linear):
                total += module.weight.numel() * module.weight.element_size()
        if lm.lm_head is None:
            total += lm.embedding.weight.numel() * lm.embedding.weight.element_size()
        compiled = self.service.scheduler.slots.compiled
        listed = None if compiled is None else compiled.head  # of such a head a copy of eight bits is read instead
        return total if listed is None else total - listed.numel() * (listed.element_size() - 1)


def prompt_of(vlm: Any, length: int) -> tuple[str, list[int]]:
    """A question of words whose whole prompt has ``length`` ids, and those ids."""
    draw, text, ids = np.random.default_rng(0), "", []
    while len(ids) < length:
        kept, text = text, f"{text} {draw.choice(WORDS)}"
        batch = vlm.processor.batch([[Message("user", (Text(text),))]], add_generation_prompt=True)
        ids = batch.input_ids[0].tolist()
        text = kept if len(ids) > length else text
        ids = [] if len(ids) > length else ids
    return text, ids


def measure(peer: Any, clock: Clock, text: str, ids: list[int]) -> dict[str, float]:
    """First token, each further token, a second question, ten questions, a whole request of text."""
    fresh = getattr(peer, "forget", lambda: None)
    image, (first, second) = picture(1), QUESTIONS[:2]
    peer.answer(image, first, 2)  # warms up

    def begin(_: int) -> None:
        fresh()
        peer.answer(image, first, 1)

    def whole(_: int) -> None:
        fresh()
        peer.answer(image, first, 1 + DECODED)

    def ten(_: int) -> None:
        fresh()
        peer.many(image, QUESTIONS, SHORT)

    def written(_: int) -> None:
        fresh()
        peer.write(text, ids, DECODED)

    once, all_of_it = clock.best(begin), clock.best(whole)
    return {
        "first token, ms": once * 1e3,
        "token, ms": (all_of_it - once) / DECODED * 1e3,
        f"whole request of {1 + DECODED} tokens, s": all_of_it,
        "second question, first token, ms": clock.best(lambda n: peer.answer(image, f"{second} {n}", 1)) * 1e3,
        f"ten questions on one picture, {SHORT} tokens each, s": clock.best(ten),
        WHOLE: clock.best(written),
    }


def looked_up(peer: Ours, clock: Clock, text: str, ids: list[int]) -> str:
    """The request of text once more, guessing what follows from what was said before."""
    before = dict(peer.service.scheduler.totals)

    def run(_: int) -> None:
        peer.forget()
        peer.write(text, ids, DECODED, GUESSES)

    spent, now = clock.best(run), peer.service.scheduler.totals
    guessed, right = (now[name] - before[name] for name in ("guessed", "guessed_right"))
    return f"{spent:.3g} s, {right} of {guessed} guesses right"


def llama(lm: Any, kind: str, threads: int, clock: Clock, ids: list[int]) -> dict[str, float]:
    """llama.cpp on the same weights: a token after the prompt, and the request of text."""
    with tempfile.TemporaryDirectory() as place:
        write_gguf(lm, Path(place) / "model.gguf", kind)
        peer = LlamaCpp(Path(place) / "model.gguf", threads)
        with torch.inference_mode():
            at = torch.arange(len(ids)).unsqueeze(0)
            hidden = lm(lm.embed(torch.tensor([ids])), at, torch.ones_like(at))  # [1, T, D]
            ours = lm.head(hidden[0, -1]).float()  # [V]
        alike = float(np.corrcoef(ours.numpy(), peer.begin(ids))[0, 1])
        assert alike > (0.85 if kind == "Q4_0" else 0.99), (
            f"llama.cpp computes something else: correlation of logits {alike:.3f}"
        )
        once, whole = clock.best(lambda _: peer.answer(ids, 1)), clock.best(lambda _: peer.answer(ids, DECODED))
        token, weights = (whole - once) / (DECODED - 1), peer.weight_bytes()
        peer.close()
    return {"token, ms": token * 1e3, WHOLE: whole, "weights read a token, MB": weights / 1e6}


def mixed(peer: Ours, clock: Clock) -> dict[str, float]:
    """Sixteen requests of four pictures, unequal questions and answers of 16 to 88 tokens: one by one, then at once."""
    requests = [
        (picture(n % 4), QUESTIONS[n % len(QUESTIONS)] + " please" * (n % 5), 16 + 12 * (n % 7)) for n in range(16)
    ]

    def alone(_: int) -> None:
        peer.forget()
        for request in requests:
            peer.answer(*request)

    def together(_: int) -> None:
        peer.forget()
        for handle in [peer.ask(*request) for request in requests]:
            handle.result()

    return {"16 mixed requests one by one, s": clock.best(alone), "16 mixed requests at once, s": clock.best(together)}


def gate(original: Any, changed: Any) -> str:
    """What quantization did to the distributions at the text of some prompts."""

    def logits(vlm: Any) -> Any:
        for number in range(3):
            content = [{"type": "image", "image": picture(50 + number)}, {"type": "text", "text": QUESTIONS[number]}]
            batch = vlm.processor.batch([[{"role": "user", "content": content}]], add_generation_prompt=True)
            with torch.inference_mode():
                output = vlm.model(batch.to("cpu", vlm.dtype), logits=None)
                yield vlm.model.lm.head(output.hidden[0, -24:]).float()

    return str(quality(logits(original), logits(changed)))


def bandwidth_of(clock: Clock) -> float:
    """How fast memory is read, in GB/s, by the clock that everything else is measured with."""
    x = torch.ones(1 << 26)
    x.sum()
    return 4 * x.numel() * 4 / 1e9 / clock.best(lambda _: [x.sum() for _ in range(4)])


def run(shape: str, threads: int, clock: Clock, chosen: argparse.Namespace) -> dict[str, Any]:
    """All peers on one shape."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_model(folder, shape)
        bandwidth = bandwidth_of(clock)
        plain = chiasm.load(folder, dtype="bfloat16")
        text, ids = prompt_of(plain, PROMPT)
        rows: dict[str, dict[str, Any]] = {"transformers bf16": measure(peer := Transformers(folder), clock, text, ids)}
        print(json.dumps(rows), flush=True)
        del peer
        for kind in [] if missing() else chosen.llama:
            rows[f"llama.cpp {kind}"] = llama(plain.model.lm, kind, threads, clock, ids)
            print(json.dumps({kind: rows[f"llama.cpp {kind}"]}), flush=True)
        for how in ("bf16", *chosen.bits):
            vlm = plain if how == "bf16" else chiasm.VLM(plain.config, copy.deepcopy(plain.model), plain.processor)
            told = {}
            if how != "bf16":
                quantize_model(vlm.model, how)
                told["quality"] = gate(plain, vlm)
            peer = Ours(f"chiasm {how}", vlm, threads)
            row: dict[str, Any] = measure(peer, clock, text, ids)
            row |= {"prompt lookup": looked_up(peer, clock, text, ids)}
            row |= mixed(peer, clock) if how in chosen.mixed else {}
            weights = peer.weight_bytes()
            row |= {"weights read a token, MB": weights / 1e6, **told}
            rows[peer.name] = row
            peer.service.stop()
            print(json.dumps({peer.name: row}), flush=True)
        bandwidth = max(bandwidth, bandwidth_of(clock))  # the machine's best, before or after
        for row in rows.values():
            if "weights read a token, MB" in row:
                row["share of bandwidth"] = row["weights read a token, MB"] / row["token, ms"] / bandwidth
        return {"shape": shape, "memory read, GB/s": bandwidth, "rows": rows}


def table(found: dict[str, Any]) -> str:
    """Markdown: a row for each peer, ratios to transformers in brackets."""
    base = found["rows"]["transformers bf16"]
    names = list(base)
    lines = [f"| {found['shape']} | " + " | ".join(names) + " | share of bandwidth |", "|---" * (len(names) + 2) + "|"]
    for peer, row in found["rows"].items():
        cells = [f"{row[n]:.3g} ({base[n] / row[n]:.2f}×)" if n in row else "" for n in names]
        share = f"{row['share of bandwidth']:.0%}" if "share of bandwidth" in row else ""
        lines.append(f"| {peer} | " + " | ".join(cells) + f" | {share} |")
    lines.append("")
    if not any(peer.startswith("llama.cpp") for peer in found["rows"]):
        lines.append(f"- llama.cpp was left out: {' and '.join(missing())} not installed.")
    for peer, row in found["rows"].items():
        if peer.startswith("chiasm"):
            second = row["second question, first token, ms"] / row["first token, ms"]
            lines.append(f"- {peer}: the second question's first token takes {second:.2f} of the first's time.")
            lines.append(f"- {peer} with prompt lookup, the request of text: {row['prompt lookup']}.")
        if peer.startswith("chiasm") and "llama.cpp Q8_0" in found["rows"]:
            ratio = found["rows"]["llama.cpp Q8_0"][WHOLE] / row[WHOLE]
            lines.append(f"- {peer}: the request of text is {ratio:.2f}× as fast as llama.cpp's Q8_0.")
        if "16 mixed requests at once, s" in row:
            ratio = row["16 mixed requests one by one, s"] / row["16 mixed requests at once, s"]
            lines.append(f"- {peer}: 16 mixed requests at once are {ratio:.2f}× as fast as one by one.")
        if "quality" in row:
            lines.append(f"- {peer} against bf16: {row['quality']}.")
    return "\n".join(lines)


def main() -> None:
    """Reads the options, measures, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", choices=sorted(SHAPES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--bits", nargs="*", default=["int8", "int4"])
    parser.add_argument("--mixed", nargs="*", default=["bf16", "int8"], help="types that answer sixteen mixed requests")
    parser.add_argument("--llama", nargs="*", default=["BF16", "Q8_0", "Q4_0"], help="types of llama.cpp's weights")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "infer")
    parser.add_argument("--note", default="")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    clock = Clock(chosen.clock, chosen.repeats)
    found = [run(shape, chosen.threads, clock, chosen) for shape in chosen.shape or ["135M"]]
    record = {"machine": limits(), "clock": chosen.clock, "note": chosen.note, "shapes": found}
    chosen.output.with_name(f"{chosen.output.name}.json").write_text(json.dumps(record, indent=2) + "\n")
    seconds = "processor seconds" if chosen.clock == "cpu" else "wall time"
    head = f"# Inference against transformers' `generate`\n\n{chosen.threads} threads, {seconds}. {chosen.note}\n\n"
    page = head + "\n\n".join(table(shape) for shape in found) + "\n"
    chosen.output.with_name(f"{chosen.output.name}.md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
