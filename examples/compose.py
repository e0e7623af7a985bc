"""Compose a vision-language model from parts, look at its shapes, and let it answer (nonsense: it is untrained).

python examples/compose.py
"""

from pathlib import Path

from PIL import Image, ImageDraw

import chiasm

TOKENIZER = Path(chiasm.__file__).parent / "weights" / "tiny-lm"  # the small tokenizer that the demo ships

config = {
    "model": {
        "type": "splice",  # pictures spliced into the sequence of a language model
        "encoders": {
            "image": {"type": "vit", "image_size": 64, "patch": 8, "dim": 64, "depth": 2, "heads": 2, "mlp": 128}
        },
        "connectors": {"image": {"type": "pixel_shuffle", "factor": 2, "depth": 2}},
        "lm": {"type": "decoder", "vocab": 2048, "dim": 96, "depth": 2, "heads": 4, "mlp": 256, "max_positions": 512},
    },
    "processing": {
        "template": {
            "type": "turns",
            "user_turn": {"prefix": "<|user|>"},
            "answer": {"prompt": "<|assistant|>", "end": "<|end|>"},
        },
        "media": {"image": {"type": "image", "size": 64, "fit": "squash"}},
    },
    "tokenizer": str(TOKENIZER),
}

vlm = chiasm.build(config)
print(vlm)

picture = Image.new("RGB", (120, 80), "white")
ImageDraw.Draw(picture).ellipse((30, 10, 90, 70), fill="crimson")
messages = [
    {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What is this?"}]}
]

batch = vlm.processor.batch([messages], add_generation_prompt=True)
output = vlm.model(batch, logits="last")
print("ids", list(batch.input_ids.shape), "of them the picture's", batch.media["image"].counts[0])
print(
    "features", list(output.named["image/features"].x.shape), "projected", list(output.named["image/projected"].x.shape)
)
print("hidden", list(output.hidden.shape), "logits", list(output.logits.shape))
print("answer", repr(vlm.generate(messages, max_new_tokens=8, temperature=1.0, seed=1)))
