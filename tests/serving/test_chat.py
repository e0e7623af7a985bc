"""``chiasm chat``: its commands through click's runner, and once on a real terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from PIL import Image
from serving_kit import picture, tiny

import chiasm
from chiasm.cli import chat, main
from chiasm.cli.talk import Talk
from chiasm.cli.terminal import BLOCK, clean, files_in, overlay, preview
from chiasm.errors import ChiasmError, ConfigError, DataError
from chiasm.processing.messages import parse


@pytest.fixture
def red(tmp_path: Path) -> Path:
    path = tmp_path / "my red.png"
    picture((16, 12)).save(path)
    return path


@pytest.fixture
def run(vlm, monkeypatch: pytest.MonkeyPatch):
    """Runs ``chiasm chat tiny`` on some lines; gives what it wrote."""
    monkeypatch.setattr(chat, "open_model", lambda *_: vlm)

    def run(*lines: str, arguments: tuple[str, ...] = (), fails: bool = False) -> str:
        words = ["chat", "tiny", "--max-new-tokens", "6", *arguments]
        done = CliRunner().invoke(main, words, input="".join(line + "\n" for line in lines))
        assert (done.exit_code != 0) == fails, done.output
        return done.output

    return run


class Scripted:
    """A model that says what it is told to, and remembers what it was asked."""

    def __init__(self, vlm: Any, *answers: str | Exception):
        self.processor, self.asked, self.answers, self.options = vlm.processor, [], list(answers), {}

    def generate(self, messages: Any, stream: bool, **options: Any):
        self.asked.append(json.loads(json.dumps(messages, default=str)))
        self.options = options
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return iter(re.findall(r"\S+\s*", answer)) if stream else answer


# ------------------------------------------------------------------------------------------------------ files in lines


def test_a_dragged_path_is_a_picture_however_it_is_written(red: Path, monkeypatch: pytest.MonkeyPatch):
    path = str(red)
    forms = [
        path,
        path.replace(" ", "\\ "),
        f"'{path}'",
        f'"{path}"',
        red.as_uri(),
        f"  {path.replace(' ', chr(92) + ' ')}  ",
    ]
    for form in forms:
        assert files_in(form) == ([path], ""), form
    for form in forms[1:5]:
        assert files_in(f"{form} what's this?") == ([path], "what's this?")
        assert files_in(f"what is this? {form}") == ([path], "what is this?")
        assert files_in(f"compare {form} and {form} please") == ([path, path], "compare and please")
    monkeypatch.chdir(red.parent)
    assert files_in("'my red.png' don't guess") == (["my red.png"], "don't guess")
    monkeypatch.setenv("HOME", str(red.parent))
    assert files_in("~/my\\ red.png")[0] == [str(red)]


@pytest.mark.parametrize(
    "line",
    ["what is 'this'?", "don't and can't", "no.png", "/etc/passwd", "file:///no/such.png", "file://host/my red.png",
     "a\\b \\", "'", '"', "\0.png", "x" * 9000 + ".png", "~nobody/x.png", "file://%00.png"],
)  # fmt: skip
def test_everything_else_stays_text(line: str):
    assert files_in(line) == ([], line.strip())


def test_a_folder_that_is_named_like_a_picture_is_text(tmp_path: Path):
    (tmp_path / "a.png").mkdir()
    assert files_in(str(tmp_path / "a.png"))[0] == []


def test_previews_are_half_blocks():
    image = Image.new("RGB", (4, 4), (255, 0, 0))
    image.paste((0, 0, 255), (0, 2, 4, 4))
    shown = preview(image)
    assert shown.plain == f"{BLOCK * 4}\n{BLOCK * 4}"
    styles = [str(span.style) for span in shown.spans]
    assert styles[0] == "rgb(255,0,0) on rgb(255,0,0)" and styles[-1] == "rgb(0,0,255) on rgb(0,0,255)"
    wide = preview(Image.new("L", (4000, 100)), 40, 12)
    assert max(map(len, wide.plain.split("\n"))) == 40
    assert len(preview(Image.new("RGBA", (10, 4000))).plain.split("\n")) == 12


def test_an_overlay_is_dark_where_nothing_was_looked_at():
    import torch

    values = torch.zeros(2, 2)
    values[0, 1] = 0.5
    shown = overlay(Image.new("RGB", (8, 8), (200, 200, 200)), values)
    assert shown.getpixel((7, 0))[0] > 190 and shown.getpixel((0, 7))[0] < 40


def test_no_control_code_reaches_the_terminal(vlm):
    bad = "a\x1b[2J\x1b]0;title\x07b\x9bm\tc\nd\rx\x00"
    assert clean(bad) == "a[2J]0;titlebm\tc\ndx"


# ------------------------------------------------------------------------------------------------------------ commands


def test_one_shot_is_the_answer_and_nothing_else(run, vlm, red: Path):
    expected = vlm.generate(
        [{"role": "user", "content": [{"type": "image", "image": str(red)}, {"type": "text", "text": "What?"}]}],
        max_new_tokens=6,
    )
    assert run(arguments=(str(red), "What?")) == clean(expected) + "\n"


def test_quantized_weights_answer(red: Path, tmp_path: Path):
    sizes = {"model.lm.dim": 64, "model.lm.mlp": 128}
    folder = tiny(tmp_path / "tokenizer", **sizes).save(tmp_path / "model")
    words = [str(folder), str(red), "What is it?", "--max-new-tokens", "6", "--device", "cpu", "--dtype", "bfloat16"]
    done = CliRunner().invoke(main, ["chat", *words, "--quantize", "int8"])
    vlm = chiasm.load(folder, dtype="bfloat16", quantize="int8")
    asked = {"role": "user", "content": [{"type": "image", "image": str(red)}, "What is it?"]}
    assert done.exit_code == 0 and done.output.rstrip("\n") == vlm.generate([asked], max_new_tokens=6).rstrip("\n")


@pytest.mark.parametrize("verb", ["chat", "eval", "generate"])
def test_verbs_hand_the_width_of_weights_on(verb: str, red: Path, monkeypatch: pytest.MonkeyPatch):
    def load(name: str, **options: object) -> None:
        raise ConfigError(f"asked for {options['quantize']}")

    monkeypatch.setattr(chiasm, "load", load)
    recipe = Path(__file__).parents[2] / "recipes" / "llava-1.5.yaml"  # eval reads it before the model
    words = [str(recipe), "--tiny"] if verb == "eval" else [str(red), "?"]
    done = CliRunner().invoke(main, [verb, "model", *words, "--quantize", "int4"])
    assert "asked for int4" in done.output + str(done.exception)


def test_a_conversation(run, red: Path):
    told = run(f"'{red}' What is it?", "And now?", "/history", "/image", "/quit", "never read")
    assert "my red.png, 16×12" in told and BLOCK not in told  # no terminal: no preview
    assert "user: [image] What is it?" in told and "user: And now?" in told
    assert told.count("assistant: ") == 2 and len(re.findall(r"(?<![\d.])6 tokens(?!/)", told)) == 2
    assert "waiting: none" in told and "never read" not in told


def test_pictures_wait_for_the_next_message(run, red: Path):
    told = run(f"/image '{red}' '{red}'", "/image", str(red), "hello", "/history", "/image nothing.png")
    assert f"waiting: {red}, {red}" in told
    assert "user: [image] [image] [image] hello" in told and "no picture or clip 'nothing.png'" in told


def test_previews_where_they_are_asked_for(run, red: Path):
    assert BLOCK in run(str(red), arguments=("--preview",))


def test_settings(run):
    told = run(
        "/set temperature 0.5", "/set seed 3", "/set", "/set temperature none", "/set system Be brief.", "/set tempo 1"
    )
    assert "seed=3" in told and "temperature=0.5" in told and "system=Be brief." in told
    assert "temperature=0.5" not in told.splitlines()[-3]
    assert "no setting 'tempo'; did you mean" in told


def test_mistakes_are_told_and_the_conversation_goes_on(run):
    told = run("/nonsense", "/save", "/load", "/load nothing.json", "/retry", "/look", "Hi", "/look nowhere")
    assert "unknown command /nonsense" in told and told.count("give a file") == 2
    assert "nothing.json cannot be read" in told and "nothing to try again" in told and "no answer to look" in told
    assert "no picture" in told or "no word" in told


def test_a_picture_that_is_not_there_is_told_of(run):
    """A path is surely one, so nothing is sent; a bare name may be a word."""
    told = run("/nope.png what is it?", "no/such.jpg what?", "what is nope.png?", "/history")
    assert told.count("nothing was sent") == 2 and "no file /nope.png" in told and "unknown command" not in told
    assert "(there is no file nope.png here: the message goes without it)" in told and told.count("user: ") == 1


def test_look_tells_the_word(run, vlm, red: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Talk, "_written", lambda *_: (piece for piece in ("A red ", "fox.")))
    told = run(f"'{red}' What?", "/look red", "/look", arguments=("--preview",))
    assert re.search(r"image 1: \d+ % of all attention \(attention, 'red'\)", told)
    assert "'A red fox.'" in told


def test_a_saved_conversation_loads_again(run, red: Path, tmp_path: Path):
    first = run(f"'{red}' What is it?", "And now?", "/set seed 5", f"/save {tmp_path / 'talk.json'}", "/history")
    values = json.loads((tmp_path / "talk.json").read_text())
    assert values["messages"][0]["content"][0]["image"].startswith("data:image/png;base64,")
    parse(values["messages"])  # ordinary messages: ``chiasm generate --input`` reads them too
    red.unlink()  # the pictures are inside
    again = run("/history", "/set", "/retry", "More?", arguments=("--load", str(tmp_path / "talk.json")))
    for line in (line for line in first.splitlines() if line.startswith(("assistant: ", "user: "))):
        assert line in again
    assert "seed=5" in again and again.count("tokens ·") == 2


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": "chiasm-chat-1"}', '{"format": "chiasm-chat-1", "messages": [{"role": "x"}]}',
             '{"format": "chiasm-chat-1", "messages": [], "settings": {"temperature": "hot"}}',
             '{"format": "chiasm-chat-1", "messages": [], "settings": [1]}', "\x80"],
)  # fmt: skip
def test_a_broken_file_changes_nothing(vlm, tmp_path: Path, text: str):
    path = tmp_path / "talk.json"
    path.write_bytes(text.encode("latin-1"))
    talk = Talk(vlm, {"temperature": 0.0}, "system", [{"role": "user", "content": "x"}])
    with pytest.raises(ChiasmError):
        talk.load(path)
    assert (talk.settings, talk.system, len(talk.turns)) == ({"temperature": 0.0}, "system", 1)


def test_a_failed_turn_is_forgotten_and_its_pictures_wait_again(vlm):
    talk = Talk(Scripted(vlm, DataError("too long"), "Fine."), {"num_beams": 1}, waiting=["a.png"])
    with pytest.raises(DataError):
        list(talk.say("Hi"))
    assert (talk.turns, talk.waiting) == ([], ["a.png"])
    assert "".join(talk.say("Hi")) == "Fine."
    assert [turn["role"] for turn in talk.turns] == ["user", "assistant"] and talk.waiting == []
    talk.vlm.answers = [DataError("no")]
    with pytest.raises(DataError):
        list(talk.retry())
    assert talk.turns[-1]["content"] == "Fine."
    talk.vlm.answers = ["Better."]
    assert "".join(talk.retry()) == "Better." and len(talk.turns) == 2 and len(talk.vlm.asked[-1]) == 1


def test_an_answer_that_is_stopped_is_kept_as_far_as_it_came(vlm):
    talk = Talk(Scripted(vlm, "One two three."), {})
    pieces = talk.say("Count")
    assert next(pieces) == "One "
    pieces.close()
    assert [turn["content"] for turn in talk.turns[1:]] == ["One "]


def test_settings_that_do_not_go_together_are_refused(vlm):
    talk = Talk(vlm, {"temperature": 0.0})
    with pytest.raises(ConfigError, match="temperature"):
        talk.set("top_p", "0.5")
    assert talk.settings == {"temperature": 0.0}


def test_beams_are_not_streamed(vlm):
    talk = Talk(Scripted(vlm, "All at once."), {"num_beams": 2})
    assert list(talk.say("Hi")) == ["All at once."]


# ---------------------------------------------------------------------------------------------------------- a terminal


class Terminal:
    """A process on a terminal of its own."""

    def __init__(self, *command: str):
        ours, theirs = pty.openpty()
        env = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=env, start_new_session=True
        )
        os.close(theirs)
        self.screen, self.text = ours, ""

    def wait(self, pattern: str, seconds: float = 180) -> str:
        """Read until a pattern has come since the last one."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.text)):
            assert time.monotonic() < end, f"{pattern!r} never came: {self.text[-800:]!r}"
            if select.select([self.screen], [], [], 0.2)[0]:
                try:
                    self.text += os.read(self.screen, 65536).decode("utf-8", "replace")
                except OSError:  # the other side has ended
                    raise AssertionError(f"{pattern!r} never came: {self.text[-800:]!r}") from None
        before, self.text = self.text[: found.end()], self.text[found.end() :]
        return before

    def type(self, text: str) -> None:
        os.write(self.screen, text.encode())


@pytest.mark.slow
def test_on_a_terminal(vlm, red: Path, tmp_path: Path):
    vlm.save(tmp_path / "model")
    program = "from chiasm.cli import main; main()"
    terminal = Terminal(
        sys.executable, "-c", program, "chat", str(tmp_path / "model"), "--max-new-tokens", "300", "--device", "cpu"
    )
    try:
        terminal.wait("> ")
        terminal.type(str(red).replace(" ", "\\ ") + "\n")
        assert "16×12" in terminal.wait("38;2;[0-9;]+48;2;[0-9;]+m▀+[\\s\\S]*> ")
        terminal.type("/set max_new_tokens 5\n")
        terminal.wait("max_new_tokens=5[\\s\\S]*> ")
        terminal.type("What is it?\n")
        terminal.wait("\\d tokens · first after[\\s\\S]*> ")
        terminal.type("/set max_new_tokens 100000\nMore?\n")
        terminal.wait("More\\?")
        terminal.type("\x03")  # at any moment: in an answer it is stopped, at the prompt the program ends
        terminal.type("/quit\n")
        terminal.process.wait(timeout=180)
    finally:
        if terminal.process.poll() is None:
            os.killpg(terminal.process.pid, signal.SIGKILL)
        os.close(terminal.screen)
    assert terminal.process.returncode == 0
