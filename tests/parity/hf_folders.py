"""Folders as transformers writes them: tiny random models of its LLaVA classes, processors and a tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

TEXTS = [
    "What is shown in this picture? A cat sits on a sofa, and two dogs run across the green field.",
    "USER: ASSISTANT: The quick brown fox jumps over the lazy dog. 0123456789 (a+b)*c = d; <tag> [INST]",
    "Describe the image in detail: colours, shapes, numbers and the words that are written on the sign.",
]
VICUNA = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% if message['content'] is string %}{{ message['content'] + ' ' }}{% else %}"
    "{% for c in message['content'] if c['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in message['content'] if c['type'] == 'video' %}{{ '<video>\n' }}{% endfor %}"
    "{% for c in message['content'] if c['type'] == 'text' %}{{ c['text'] + ' ' }}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for c in message['content'] if c['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in message['content'] if c['type'] == 'video' %}{{ '<video>\n' }}{% endfor %}"
    "{% for c in message['content'] if c['type'] == 'text' %}{{ c['text'] }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIALS = ["<s>", "</s>", "<unk>", "<pad>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"]


def small_tokenizer() -> Any:
    """A byte-level BPE of 400 tokens trained here on a few sentences; BOS before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIALS])
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", bos)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def randomise(model: torch.nn.Module, seed: int = 0, scale: float = 0.2) -> torch.nn.Module:
    """Every parameter random and not small, so that nothing is degenerate and a wrong tensor shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            norm = "norm" in name and name.endswith("weight")
            parameter.copy_(1 + 0.2 * noise if norm else scale * noise)
    return model.eval()


VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "vocab_size": 448,
}
PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
OV_PINPOINTS = [[28 * i, 28 * j] for i in range(1, 5) for j in range(1, 5)]
CLASSES = {
    "llava": "Llava",
    "llava_next": "LlavaNext",
    "llava_next_video": "LlavaNextVideo",
    "llava_onevision": "LlavaOnevision",
}


def make_model(kind: str, tokenizer: Any, text: dict[str, Any] | None = None, **changes: Any) -> Any:
    """A tiny random model of one of the four classes, for this tokenizer."""
    vocab = max(TEXT["vocab_size"], len(tokenizer) + 16)
    text_config = {"model_type": "llama", **TEXT, "vocab_size": vocab, **(text or {})}
    tower = "siglip_vision_model" if kind == "llava_onevision" else "clip_vision_model"
    vision = {"model_type": tower, **VISION, **({"vision_use_head": False} if kind == "llava_onevision" else {})}
    values: dict[str, Any] = {"image_token_index": tokenizer.convert_tokens_to_ids("<image>")}
    if kind in ("llava_next", "llava_next_video"):
        values["image_grid_pinpoints"] = PINPOINTS
    if kind == "llava_onevision":
        text_config["model_type"] = "qwen2"
        values |= {"image_grid_pinpoints": OV_PINPOINTS, "vision_aspect_ratio": "anyres_max_4"}
    if kind in ("llava_next_video", "llava_onevision"):
        values["video_token_index"] = tokenizer.convert_tokens_to_ids("<video>")
    text_config |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = getattr(transformers, CLASSES[kind] + "Config")(
        text_config=text_config, vision_config=vision, **(values | changes)
    )
    model = getattr(transformers, CLASSES[kind] + "ForConditionalGeneration")(config)
    return randomise(model)


def image_processor(kind: str, **changes: Any) -> Any:
    """The PIL image processor of a class, for pictures of 28 pixels."""
    clip = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    if kind == "llava":
        return transformers.CLIPImageProcessorPil(**(clip | changes))
    if kind == "llava_onevision":
        values = {"size": {"height": 28, "width": 28}, "image_grid_pinpoints": OV_PINPOINTS}
        stats = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        return transformers.LlavaOnevisionImageProcessorPil(**(values | stats | changes))
    return transformers.LlavaNextImageProcessorPil(**(clip | {"image_grid_pinpoints": PINPOINTS} | changes))


def make_processor(kind: str, tokenizer: Any, **changes: Any) -> Any:
    """The processor of Llava or LlavaNext; the other two need torchvision (see ``expand``)."""
    cls = {"llava": transformers.LlavaProcessor, "llava_next": transformers.LlavaNextProcessor}[kind]
    return cls(
        image_processor=image_processor(kind, **changes),
        tokenizer=tokenizer,
        patch_size=VISION["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=VICUNA,
    )


def save_folder(folder: Path, kind: str, model: Any, tokenizer: Any, layout: str = "saved", **changes: Any) -> Path:
    """The folder with model, tokenizer and processor files. ``layout``: "saved" (as version 5 writes), "v4", "v5"."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    if layout != "saved":
        relayout(folder, model, layout)
    if kind in ("llava", "llava_next"):
        make_processor(kind, tokenizer, **changes).save_pretrained(folder)
    else:
        tokenizer.save_pretrained(folder)
        (folder / "chat_template.jinja").write_text(CHATML if kind == "llava_onevision" else VICUNA)
        image_processor(kind, **changes).save_pretrained(folder)
        write_processor_config(folder, kind)
    return folder


def write_processor_config(folder: Path, kind: str) -> None:
    """What the processors that need torchvision would write."""
    values: dict[str, Any] = {
        "image_token": "<image>",
        "video_token": "<video>",
        "processor_class": CLASSES[kind] + "Processor",
    }
    if kind == "llava_onevision":
        values |= {
            "num_image_tokens": 16,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": "anyres_max_4",
        }
        video = {"size": {"height": 28, "width": 28}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    else:
        values |= {"patch_size": 7, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}
        video = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}, "do_center_crop": True}
    video |= {"video_processor_type": CLASSES[kind] + "VideoProcessor", "resample": 3, "do_sample_frames": False}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video))
    (folder / "processor_config.json").write_text(json.dumps(values))


def relayout(folder: Path, model: Any, layout: str) -> None:
    """Write the tensors under version 4's names on disk, or under the names of version 5's modules."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    if layout == "v4":
        renamed = {}
        for name, tensor in tensors.items():
            head = "vision_tower."
            if name.startswith(head) and not name.startswith(head + "vision_model."):
                name = head + "vision_model." + name.removeprefix(head)
            renamed[name] = tensor
    else:
        renamed = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        if model.config.tie_word_embeddings:
            renamed.pop("lm_head.weight")
    save_file({k: v.clone() for k, v in renamed.items()}, path, {"format": "pt"})


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """A random picture with large and small structure."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (5, 5, 3), generator=generator, dtype=torch.uint8).numpy()
    fine = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8).numpy()
    picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    return Image.blend(picture, Image.fromarray(fine), 0.3)


def copy(folder: Path, to: Path) -> Path:
    """A copy of a folder, to change something in."""
    shutil.copytree(folder, to)
    return to
