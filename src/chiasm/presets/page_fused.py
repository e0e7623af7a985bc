"""What a page says of a model that reads words and pictures together: its input, its heads, in a few lines."""

from __future__ import annotations

from typing import Any

from chiasm.model_config import VLMConfig

ORDERS = {
    "single_stream": "[ text | class vector of the picture | patches ] through one stack of blocks; the text's first "
    "position is pooled.",
    "albef": "[ class vector | patches ] through the picture's tower, [ text ] through the text's; then the text looks "
    "at the picture in every fusion layer, and its first position is read.",
    "modality_experts": "[ text | class vector of the picture | patches ] through shared attention and a perceptron "
    "for each modality; the text's first position is pooled. A picture or a text alone goes through its own.",
    "multiway": "[ class vector of the picture | patches | text ] through attention over all and weights for each of "
    "the two; the picture's class vector is read. A picture or a text alone goes the same way.",
}
HEADS = {
    "classes": "`model.classify(batch)`: {} classes",
    "words": "`model.fill(batch)`: hidden words",
    "match": "`model.match(batch)`: does the text belong to the picture",
    "rank": "`model.match(batch)`: one score for ranking",
}


def fused(config: VLMConfig) -> list[str]:
    """Order of the sequence, sizes of its input, and the heads, a paragraph each."""
    model: Any = config.model
    front: Any = config.processing.media["image"]
    template: Any = config.processing.template
    if front.type == "proportional":
        seen = f"shorter side {front.shortest_edge} pixels, proportions kept, both sides multiples of {front.multiple}"
    else:
        patch = getattr(model, "patch", None) or model.vision.patch
        side = front.size // patch
        seen = f"{front.size} x {front.size} pixels, {side} x {side} patches of {patch}"
    read = "the user's last turn" if template.read == "user" else "the last turn that has text"
    pictures = "2 pictures" if model.images == 2 else "a picture"
    heads = [words.format(getattr(model.tasks, name)) for name, words in HEADS.items() if getattr(model.tasks, name)]
    if getattr(model, "contrast", None):
        heads.append("`vlm.embed(images=…)`, `vlm.embed(texts=…)`: vectors that are compared")
    if getattr(model, "answer_depth", 0):
        heads.append(f"`model.rank_answers(…)`: a decoder of {model.answer_depth} layers ranks a list of answers")
    if getattr(model, "picture_classes", None):
        heads.append(f"`model.picture_logits(…)`: {model.picture_classes:,} classes of a picture alone")
    if getattr(model, "codes", None):
        heads.append(f"`model.code_head(…)`: {model.codes:,} visual words of hidden patches")
    return [
        ORDERS[model.type],
        f"A sample is {pictures} ({seen}) and a text of at most {template.length} tokens: {read}.",
        "Heads: " + "; ".join(heads) + ".",
    ]
