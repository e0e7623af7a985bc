"""The Python of the pages runs as printed, on tiny models that stand where the pages name large ones."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import chiasm
import chiasm.vlm

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ROOT / "src" / "chiasm" / "weights" / "tiny-lm"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
# Pages with tests of their own, and blocks that need files of other projects: (page, number of the block) → reason.
ELSEWHERE = {
    "docs/tour.md": "test_tour.py",
    "CONTRIBUTING.md": "test_contributing.py",
    "docs/cross-attention.md": "test_cross_attention_page.py",
    "docs/data.md": "test_data_page.py",
}
NOT_HERE = {
    ("docs/serving.md", 0): "needs a server; tests/serving/test_clients.py talks to one with that client",
    ("docs/query-transformers.md", 0): "MiniGPT-5's tiny form is run by tests/parity/test_vokens.py",
    ("docs/query-transformers.md", 1): "a clip with sound; tests/parity/test_imagebind_sound.py asks the same",
    ("docs/query-transformers.md", 2): "two kinds of models; ranks and pairs are run in tests/parity/test_blip2_hf.py",
    ("docs/query-transformers.md", 3): "reads a file of LAVIS; tests/parity/test_lavis.py",
    ("docs/fused-models.md", 0): "test_fused_page.py",
    ("docs/fused-models.md", 1): "needs two models and a protocol file; tests/retrieve/test_recall.py",
    ("docs/fused-models.md", 2): "reads files of other projects; tests/contracts/test_fused_files.py",
    ("docs/training/methods.md", 0): "reads adapters; tests/recipes/test_methods.py",
}
PAGES = [*ROOT.glob("*.md"), *sorted(ROOT.glob("docs/**/*.md"))]
BLOCKS = [
    (name, number, code)
    for page in PAGES
    for name in [page.relative_to(ROOT).as_posix()]
    if name not in ELSEWHERE
    for number, code in enumerate(BLOCK.findall(page.read_text(encoding="utf-8")))
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model that answers and one of two towers, saved."""
    root = tmp_path_factory.mktemp("models")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = {
            "answers": chiasm.preset("llava-1.5-7b", tiny=True, vocab=1024),
            "vectors": chiasm.preset("clip-vit-b32", tiny=True, vocab=1024),
        }
        return {name: chiasm.build(c, tokenizer=TOKENIZER).save(root / name) for name, c in made.items()}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the pictures that the pages name."""
    for name in ("cat.jpg", "a.jpg", "b.jpg", "photos/one.jpg", "photos/deep/two.jpg", "other/car.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.linear_gradient("L").convert("RGB").resize((40 + len(name), 30)).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def stand_in(folders: dict[str, Path]) -> Callable[..., Any]:
    """``chiasm.load`` with all its options, where a name with "clip" in it is the model of two towers."""
    real = chiasm.vlm.load

    def load(name: str, *args: Any, **options: Any) -> Any:
        return real(folders["vectors" if "clip" in str(name) else "answers"], *args, **options)

    return load


@pytest.mark.parametrize(
    ("page", "number", "code"), [b for b in BLOCKS if b[:2] not in NOT_HERE], ids=lambda v: str(v)[:30].split("\n")[0]
)
def test_a_block_runs(
    page: str, number: int, code: str, folders: dict[str, Path], here: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(chiasm, "load", stand_in(folders), raising=False)
    question = [{"role": "user", "content": [{"type": "image", "image": "cat.jpg"}, {"type": "text", "text": "What?"}]}]
    names: dict[str, Any] = {"chiasm": chiasm, "messages": question, "conversations": [question]}
    names["vlm"] = chiasm.load("a clip" if page == "docs/retrieval.md" else "a model that answers")
    names |= {"paths": ["a.jpg", "b.jpg"], "captions": ["a cat", "a dog"]}
    code = re.sub(r"max_new_tokens=\d+", "max_new_tokens=2", code)
    code = code.replace(", workers=4", "")
    exec(compile(code, f"{page}, block {number}", "exec"), names)


def test_what_is_left_out_is_there():
    places = {b[:2] for b in BLOCKS}
    assert set(NOT_HERE) <= places, f"no such blocks: {set(NOT_HERE) - places}"
    assert all((ROOT / name).is_file() for name in ELSEWHERE)
    named = re.findall(r"[\w/]*test_\w+\.py", " ".join([*NOT_HERE.values(), *ELSEWHERE.values()]))
    missing = [n for n in named if not (ROOT / n).is_file() and not (ROOT / "tests" / "docs" / n).is_file()]
    assert not missing
