"""One training run of one peer, in a process of its own: prints its losses, times and peak memory as JSON."""

from __future__ import annotations

import io
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from train_profile import UPDATE, Steps


def memory(key: str) -> float:
    """A line of this process's memory in MiB: ``VmRSS`` is what is resident now, ``VmHWM`` the most there ever was."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1024
    return 0.0


def chiasm_run(setting: dict[str, Any], profiled: bool = False) -> dict[str, Any]:
    """Chiasm's own loop over the setting's data."""
    from chiasm import vlm as models
    from chiasm.data.loader import Renderer
    from chiasm.train.log import read_log
    from chiasm.train.loop import StageRun

    base, stage = memory("VmRSS"), stage_of(setting)
    vlm = models.load(setting["model"], dtype="float32")
    out, clock, told = Path(setting["out"]), Clock(), io.StringIO()

    class Timed(StageRun):
        def update(self, *args: Any) -> Any:
            with torch.profiler.record_function(UPDATE):
                result = super().update(*args)
            clock.step()
            if profiled:
                steps.step(setting["steps"])
            return result

    run = Timed(vlm.model, Renderer(vlm.processor, None, stage.pack), stage, mixture(setting), out, None, quiet(told))
    steps = Steps(run, vlm.config.model.lm.vocab, setting["since"]) if profiled else None
    run.fit()
    records = read_log(out / "log.jsonl")
    found = {"losses": [r["loss"] for r in records], **clock.times(), "told": told.getvalue().splitlines()[-2:]}
    found |= {"base_mib": base, "data_wait": run.waits.share}
    return found | ({"profile": steps.table(), "profiled_s": steps.seconds} if steps else {})


def stage_of(setting: dict[str, Any]) -> Any:
    """The setting as a stage of a recipe."""
    from chiasm.train.recipe import Stage

    plan: Any = {1: "align", 2: "instruct"}[setting["stage"]]
    if setting["method"]:
        plan = {"*": "freeze", "connectors": "train", "lm": setting["method"]}
    return Stage(
        name="bench",
        plan=plan,
        steps=setting["steps"],
        batch_size=setting["batch"],
        lr=setting["lr"],
        dtype="bf16" if setting["precision"] == "bf16" else "float32",
        workers=setting["workers"],
        log_every=1,
        **setting.get("options", {}),
    )


class Clock:
    """Wall time and processor time at the end of each step. On a machine that others use, the second says more."""

    def __init__(self) -> None:
        self.wall, self.processor = [], []  # type: ignore[var-annotated]
        self.step()

    def step(self) -> None:
        """Note that a step ended."""
        self.wall.append(time.perf_counter())
        self.processor.append(time.process_time())

    def times(self) -> dict[str, list[float]]:
        """Seconds of each step, from the end of the one before."""
        wall, processor = ([b - a for a, b in itertools.pairwise(t)] for t in (self.wall, self.processor))
        return {"seconds": wall, "cpu_seconds": processor}


def quiet(told: io.StringIO) -> Any:
    """A console that writes to a text."""
    from rich.console import Console

    return Console(file=told, width=200)


def mixture(setting: dict[str, Any]) -> Any:
    """The setting's data."""
    from chiasm.data.mixture import Entry, Mixture

    folder = Path(setting["data"])
    source = {"type": "llava_json", "file": str(folder / "data.json"), "images": str(folder)}
    return Mixture({"data": Entry(source=source, limit=setting["limit"])})


def rendered(setting: dict[str, Any]) -> list[dict[str, Any]]:
    """The samples in the order in which Chiasm sees them: ids, labels and the picture's path, ready for the peer."""
    from chiasm import vlm as models
    from chiasm.data.loader import BatchPlan, Renderer

    vlm = models.load(setting["model"], dtype="float32")
    data, renderer = mixture(setting), Renderer(vlm.processor)
    samples: list[dict[str, Any]] = []
    for spec in BatchPlan(data, setting["batch"]).specs(0, setting["steps"]):
        for ref in spec.refs:
            example = data[ref]
            sample = renderer.sample(example)
            labels = sample.input_ids.masked_fill(~sample.loss_mask, -100)
            paths = [str(m.data) for message in example.messages for m in message.media]
            samples.append({"input_ids": sample.input_ids, "labels": labels, "paths": paths})
    if setting["method"]:
        write_adapter(vlm, setting)
    return samples


def write_adapter(vlm: Any, setting: dict[str, Any]) -> None:
    """The adapter that Chiasm's run will begin with, as a folder that ``peft`` reads."""
    from chiasm.train.methods.files import save_adapter
    from chiasm.train.plan import apply, prepare, resolve

    stage = stage_of(setting)
    prepare(vlm.model, stage.table(), 0)
    apply(vlm.model, resolve(vlm.model, stage.table(), stage.lr))
    save_adapter(vlm, setting["adapter"], layout="llava")


def transformers_run(setting: dict[str, Any]) -> dict[str, Any]:
    """``Trainer`` over the same samples, already tokenized; pictures are decoded by its image processor as it runs."""
    import transformers
    from PIL import Image
    from torch.utils.data import SequentialSampler
    from transformers import Trainer  # each is imported when it is named first: before the base is taken
    from transformers.models.llava import modeling_llava  # noqa: F401

    if setting["method"]:
        import peft  # noqa: F401
    base = memory("VmRSS")
    samples = torch.load(setting["samples"])
    images = transformers.CLIPImageProcessorPil.from_pretrained(setting["model"])
    model, pad = peer_model(setting)

    def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
        def pad_with(name: str, value: int) -> torch.Tensor:
            rows = [s[name] for s in batch]
            return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

        ids = pad_with("input_ids", pad)
        mask = pad_with("input_ids", -1) != -1
        made = {"input_ids": ids, "attention_mask": mask.long(), "labels": pad_with("labels", -100)}
        pictures = [Image.open(path).convert("RGB") for s in batch for path in s["paths"]]
        if pictures:
            made["pixel_values"] = images(pictures, return_tensors="pt")["pixel_values"]
        return made

    class InOrder(Trainer):
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return SequentialSampler(samples)

    clock, losses = Clock(), []

    class Report(transformers.TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.step()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                losses.append(float(logs["loss"]))

    arguments = transformers.TrainingArguments(
        output_dir=setting["out"],
        max_steps=setting["steps"],
        per_device_train_batch_size=setting["batch"],
        learning_rate=setting["lr"],
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        weight_decay=0.0,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        bf16=setting["precision"] == "bf16",
        use_cpu=True,
        dataloader_num_workers=setting["workers"],
        remove_unused_columns=False,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    InOrder(model, arguments, data_collator=collate, train_dataset=samples, callbacks=[Report()]).train()
    return {"losses": losses, **clock.times(), "base_mib": base}


def peer_model(setting: dict[str, Any]) -> tuple[Any, int]:
    """The model of transformers, with the setting's parameters trained, and its padding token.

    With adapters in bf16 the base weights are bfloat16, as LLaVA's own script has them; else float32 under autocast.
    """
    from transformers import LlavaForConditionalGeneration

    low = setting["method"] and setting["precision"] == "bf16"
    dtype = torch.bfloat16 if low else torch.float32
    model = LlavaForConditionalGeneration.from_pretrained(setting["model"], dtype=dtype)
    pad = model.config.text_config.pad_token_id
    if setting["method"]:
        from peft import PeftModel

        return PeftModel.from_pretrained(model, setting["adapter"], is_trainable=True), pad
    for name, parameter in model.named_parameters():
        trained = "multi_modal_projector" in name or (setting["stage"] == 2 and "vision_tower" not in name)
        parameter.requires_grad_(trained)
    return model, pad


def main() -> None:
    """``train_peers.py PEER SETTING.json``."""
    peer, setting = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    torch.set_num_threads(setting["threads"])
    if peer == "render":
        torch.save(rendered(setting), setting["samples"])
        return
    begun = time.perf_counter()
    peers = {"chiasm": chiasm_run, "transformers": transformers_run, "profile": lambda s: chiasm_run(s, profiled=True)}
    result = peers[peer](setting)
    result |= {"peak_mib": memory("VmHWM"), "total_s": time.perf_counter() - begun}
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()
