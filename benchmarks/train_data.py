"""Model folders and data for the training benchmark: random weights, pictures, and conversations of mixed lengths."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

SHAPES: dict[str, dict[str, Any]] = {
    # The tower of each is a CLIP tower read at the last block but one.
    "tiny": {
        "text": {
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 6,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "vocab_size": 8192,
        },
        "vision": {
            "hidden_size": 192,
            "intermediate_size": 768,
            "num_hidden_layers": 8,
            "num_attention_heads": 3,
            "image_size": 224,
            "patch_size": 16,
        },
    },
    "135M": {
        "text": {
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "vocab_size": 49152,
        },
        "vision": {
            "hidden_size": 384,
            "intermediate_size": 1536,
            "num_hidden_layers": 12,
            "num_attention_heads": 6,
            "image_size": 224,
            "patch_size": 16,
        },
    },
}
# A small language model behind a larger tower: where the first stage spends its time on the tower.
SHAPES["small-lm"] = {"text": SHAPES["tiny"]["text"], "vision": SHAPES["135M"]["vision"]}

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for c in message['content'] %}"
    "{% if c['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = re.findall(
    r"\w+",
    "the a red green small large dog cat tree street table with on under near two three people sign window and "
    "sky water boat plate fruit left right behind stands lies holds walks old new bright dark picture shows "
    "because number letter answer which colour how many what is in this image describe please short detail",
)


def write_model(folder: Path, shape: str, seed: int = 0) -> None:
    """A LLaVA folder of transformers with random weights, its tokenizer and processor."""
    tokenizer = write_tokenizer()
    text = {"model_type": "llama", "tie_word_embeddings": True, "max_position_embeddings": 2048}
    text |= SHAPES[shape]["text"] | {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    text["pad_token_id"] = tokenizer.pad_token_id
    config = transformers.LlavaConfig(
        text_config=text,
        vision_config={"model_type": "clip_vision_model", **SHAPES[shape]["vision"]},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = transformers.LlavaForConditionalGeneration(config)
    model.save_pretrained(folder)
    side = SHAPES[shape]["vision"]["image_size"]
    transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessorPil(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        ),
        tokenizer=tokenizer,
        patch_size=SHAPES[shape]["vision"]["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)


def write_tokenizer() -> Any:
    """A byte-level BPE over the benchmark's own words; the model's vocabulary is larger."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|im_end|>", "<pad>", "<|im_start|>", "<image>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in specials])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<pad>", padding_side="right"
    )


def write_data(folder: Path, count: int, stage: int, seed: int = 0) -> None:
    """``data.json`` in LLaVA's form with pictures of 640 x 480 beside it.

    Stage 2: 30 % have no picture; half of the answers are a few words, half are 30 to 90, some have two turns. Stage 1:
    every sample has its own picture and a caption of 8 to 20 words.
    """
    draw = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)

    def words(low: int, high: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(low, high)))

    records = []
    for i in range(count):
        record: dict[str, Any] = {"id": f"s{i}"}
        pictured = stage == 1 or i % 10 not in (2, 5, 9)
        if pictured:
            record["image"] = f"{i}.jpg"
            photo(640, 480, seed * 10000 + i).save(folder / f"{i}.jpg", quality=90)
        turns = []
        for turn in range(1 if stage == 1 else draw.choice((1, 1, 2))):
            question = ("<image>\n" if pictured and turn == 0 else "") + (words(4, 6) if stage == 1 else words(6, 40))
            short = draw.random() < 0.5
            answer = words(8, 20) if stage == 1 else words(1, 5) if short else words(30, 90)
            turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        records.append(record | {"conversations": turns})
    (folder / "data.json").write_text(json.dumps(records))


def photo(width: int, height: int, seed: int) -> Image.Image:
    """Large smooth structure and some noise, so that its JPEG is as long as a photograph's."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    noise = rng.normal(0, 6, (height, width, 3))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)) + noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
