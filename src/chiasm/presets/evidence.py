"""What was compared with what, and by which test: the lines that the pages of several presets share.

``tests/docs/test_pages.py`` checks that every test named here is there.
"""

CLIP = (
    "The tower: every hidden state of a small random CLIP within 1e-5 of transformers' `CLIPVisionModel`, and the "
    "picture in, patches out of the last block but one. `tests/parity/test_vit.py`"
)
SIGLIP = (
    "The tower: every hidden state of a small random SigLIP within 1e-5 of transformers' `SiglipVisionModel`. "
    "`tests/parity/test_vit.py`"
)
LM = (
    "The language model: logits of small random models within 1e-5 of those of transformers; cached equals uncached, "
    "packed and padded equal separate. `tests/parity/test_decoder.py`"
)
PIXELS = (
    "Pixels: equal, bit by bit, to those of the PIL image processor of transformers with the same options. "
    "`tests/parity/test_image_processors.py`"
)
TOKENS = (
    "Tokens: the published table over eleven sizes of pictures, `tests/contracts/test_presets.py`; counted equals "
    "produced over random sizes, `tests/contracts/test_visual_counts.py`"
)
MERGE = (
    "The order of tiles, the cut border and the newlines: equal to transformers' `pack_image_features` on numbered "
    "vectors. `tests/parity/test_merge_references.py`"
)
FRAMES = "Frames, their pooling and newlines: `tests/golden/test_visual_tokens.py`, `tests/contracts/test_video.py`"
AUTHORS = (
    "Every option: the 7B preset of the family equals what the reader of the authors' layout, which was written apart "
    "from the presets, makes of their `config.json`. `tests/contracts/test_presets.py`"
)
WHOLE = (
    "The whole model: token ids and pixels equal to those of the transformers class, logits within 1e-5 and the same "
    "greedy text, on small random models saved by transformers, with one picture, several, none, and rows of unequal "
    "lengths; export and reading back likewise. `tests/parity/test_llava_hf.py`"
)
PROMPT = (
    "The prompt's text, its token ids and what is learned from, for several tokenizers and one to five turns. "
    "`tests/golden/test_templates.py`"
)
TINY = (
    "The tiny form: a batch of one picture, none, two and a clip equals each alone, and an answer depends on its own "
    "picture only; every parameter that runs gets a gradient. `tests/contracts/test_presets.py`"
)
SINGLE = (CLIP, LM, PIXELS, TOKENS, PROMPT, TINY)
TILED = (CLIP, LM, PIXELS, TOKENS, MERGE, PROMPT, TINY)
IN_CLASS = (AUTHORS, WHOLE)  # where transformers has a class for the system
