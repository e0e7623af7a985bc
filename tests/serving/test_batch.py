"""``chiasm batch``: every line has one answer, whatever the other lines are, and a run that was cut goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from click.testing import CliRunner
from serving_kit import Running, shows

from chiasm.cli import main
from chiasm.errors import ChiasmError
from chiasm.serve import batch
from chiasm.serve.options import Served, ServeOptions

SCHEMA = {
    "type": "object",
    "properties": {"sure": {"type": "boolean"}},
    "required": ["sure"],
    "additionalProperties": False,
}


def request(name: str, content="What is it?", **body) -> dict:
    values = {"messages": [{"role": "user", "content": content}], "max_tokens": 4, "temperature": 0, **body}
    return {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": values}


def write(path: Path, rows: list) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(vlm, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("batch") / "tiny"
    vlm.save(path)
    return path


def run(folder: Path, source: Path, out: Path, *words: str):
    words = ("batch", str(source), "--model", str(folder), "--out", str(out), "--max-length", "480", *words)
    return CliRunner().invoke(main, list(words))


def test_every_line_has_one_answer_as_the_server_gives_it(running: Running, folder, tmp_path):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    good = [
        request("text"),
        request("picture", shows(None)),
        request("named", model="tiny"),
        request("two", n=2, temperature=1, seed=3),
        request("schema", response_format=form, max_tokens=60, temperature=1, seed=1),
        request("probabilities", logprobs=True, top_logprobs=1),
    ]
    refused = [
        request("model", model="another"),
        request("field", temperature=9),
        request("address", shows("http://127.0.0.1/x.png")),
        request("file", shows("file:///etc/hosts")),
        request("broken picture", shows("data:image/png;base64,AAAA")),
        request("vectors") | {"url": "/v1/embeddings", "body": {"input": "x"}},
        request("infinite", temperature=float("inf")),
    ]
    bad: list = [
        "{",
        "[1]",
        request("text"),
        {"custom_id": 7},
        request("stream", stream=True),
        request("get") | {"method": "GET"},
        request("url") | {"url": "/v1/files"},
        request("body") | {"body": []},
        "[" * 100_000,
    ]
    source = write(tmp_path / "in.jsonl", [*bad[:2], *good, "", *bad[2:], *refused])
    result = run(folder, source, tmp_path / "out.jsonl")
    assert result.exit_code == 1, result.output
    failed = len(bad) + len(refused)
    assert f"{failed} of {len(good) + failed} lines failed; see its lines" in result.output.splitlines()[-1]
    rows = read(tmp_path / "out.jsonl")
    assert len(rows) == len(good) + len(bad) + len(refused)
    assert all(set(row) == {"id", "custom_id", "response", "error"} for row in rows)
    found = {row["custom_id"]: row for row in rows if row["response"] is not None}
    assert set(found) == {row["custom_id"] for row in [*good, *refused]}
    for row in good:
        reply = found[row["custom_id"]]["response"]
        assert reply["status_code"] == 200 and reply["request_id"], reply
        direct = running.post("/v1/chat/completions", {"model": "tiny", **row["body"]}).json
        assert reply["body"]["choices"] == direct["choices"] and reply["body"]["usage"]["completion_tokens"]
    jsonschema.validate(json.loads(found["schema"]["response"]["body"]["choices"][0]["message"]["content"]), SCHEMA)
    for row in refused:
        reply = found[row["custom_id"]]["response"]
        assert reply["status_code"] in (400, 404) and reply["body"]["error"]["message"]
    wrong = [row for row in rows if row["response"] is None]
    assert all(row["error"]["code"] == "invalid_line" and "line " in row["error"]["message"] for row in wrong)
    assert "stands in a line before" in next(row for row in wrong if row["custom_id"] == "text")["error"]["message"]


def test_the_exit_status_says_whether_lines_failed(folder, tmp_path):
    """Also on a second run, which asks nothing: what was refused then is refused still."""
    source = write(tmp_path / "in.jsonl", [request("a", temperature=9), request("b", max_tokens=0), "{"])
    for _ in range(2):
        result = run(folder, source, tmp_path / "all.jsonl")
        assert result.exit_code == 1 and "3 of 3 lines failed" in result.output, result.output
        assert "the first that failed" in result.output and "temperature" in result.output
    result = run(folder, write(tmp_path / "good.jsonl", [request("a")]), tmp_path / "good-out.jsonl")
    assert result.exit_code == 0 and result.output.splitlines()[-1].endswith("all 1 answered")


def test_a_killed_run_goes_on(folder, tmp_path):
    rows = [request(str(i), f"Number {i}?", max_tokens=20) for i in range(60)]
    source, out = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    words = ["batch", str(source), "--model", str(folder), "--out", str(out), "--flying", "2", "--slots", "2"]
    cut = subprocess.Popen([sys.executable, "-m", "chiasm", *words], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (out.exists() and out.read_bytes().count(b"\n") >= 3):
        assert cut.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(cut.pid, signal.SIGKILL)
    cut.wait(20)
    before = out.read_bytes()
    whole = before[: before.rindex(b"\n") + 1]
    assert 3 <= whole.count(b"\n") < 60, "the run was not cut"
    out.write_bytes(before + b'{"id": "batch_req_1", "custom_id": "5')
    assert run(folder, source, out).exit_code == 0
    assert out.read_bytes().startswith(whole)
    assert sorted(row["custom_id"] for row in read(out)) == sorted(row["custom_id"] for row in rows)
    at_once = tmp_path / "at once.jsonl"
    assert run(folder, write(tmp_path / "other order.jsonl", rows[::-1]), at_once).exit_code == 0

    def texts(path: Path) -> dict[str, str]:
        return {r["custom_id"]: r["response"]["body"]["choices"][0]["message"]["content"] for r in read(path)}

    assert texts(out) == texts(at_once)
    again = out.read_bytes()
    assert run(folder, source, out).exit_code == 0 and out.read_bytes() == again


def test_passing_faults_are_asked_again_and_foreign_files_are_left_alone(folder, tmp_path):
    source, out = write(tmp_path / "in.jsonl", [request("a"), request("b")]), tmp_path / "out.jsonl"
    fault = {"id": "x", "custom_id": "a", "response": {"status_code": 503, "body": {}}, "error": None}
    line = {"id": "y", "custom_id": None, "response": None, "error": {"code": "invalid_line"}}
    write(out, [fault, line])
    assert run(folder, source, out).exit_code == 0
    assert sorted(row["response"]["status_code"] for row in read(out)) == [200, 200]
    for text in ("my notes\n", '{"a": 1}\n{"b": 2}\n'):
        out.write_text(text)
        result = run(folder, source, out)
        assert result.exit_code == 1 and "--out" in result.output and out.read_text() == text
    other = {"status_code": 200, "body": {"system_fingerprint": "chiasm-0-other"}}
    text = write(out, [{"id": "z", "custom_id": "a", "response": other, "error": None}]).read_text()
    assert "another model" in run(folder, source, out).output and out.read_text() == text


def test_a_model_that_dies_ends_the_run(vlm):
    class Dying:
        healthy = True

        def __init__(self):
            self.vlm, self.asked, self.max_queue_requests = vlm, 0, 8

        def stats(self):
            self.asked += 1
            self.healthy = self.asked < 3
            return {"slots": 1, "running": 0, "waiting": 0}

        def submit(self, request):
            raise ChiasmError("no")

    found: list[dict] = []
    lines = [(i, json.dumps(request(str(i))), "") for i in range(9)]
    with pytest.raises(ChiasmError, match="run again"):
        batch.run(Served.ready("tiny", Dying()), ServeOptions(), lines, found.append, flying=1)
    assert [row["custom_id"] for row in found] == ["0", "1"]


@pytest.mark.slow
def test_a_local_cluster_of_ray(folder, tmp_path, monkeypatch):
    """Two actors answer as one process does, paths are found although the cluster began elsewhere, errors are short."""
    ray = pytest.importorskip("ray")
    rows = [request(str(i), f"Number {i}?") for i in range(20)]
    source = write(tmp_path / "in.jsonl", [*rows[:7], "{", *rows[7:], rows[0]])
    write(tmp_path / "out.jsonl", [])
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text((folder / "config.json").read_text())  # and no weights
    try:
        monkeypatch.chdir(folder.parent)
        result = run(Path(folder.name), source, tmp_path / "out.jsonl", "--ray", "2", "--flying", "4")
        wrong = run(tmp_path / "broken", source, tmp_path / "wrong.jsonl", "--ray", "1")
    finally:
        ray.shutdown()
    assert wrong.exit_code == 1 and len(wrong.output.splitlines()) < 8, wrong.output
    assert "an actor of the Ray cluster failed" in wrong.output and "holds no weights" in wrong.output
    assert result.exit_code == 1 and "2 of 22 lines failed" in result.output, result.output
    assert run(folder, source, tmp_path / "alone.jsonl").exit_code == 1

    def answers(path: Path) -> dict[str, object]:
        found = [row for row in read(path) if row["response"] is not None]
        return {row["custom_id"]: row["response"]["body"]["choices"] for row in found}

    assert len(read(tmp_path / "out.jsonl")) == 22
    assert (
        answers(tmp_path / "out.jsonl") == answers(tmp_path / "alone.jsonl")
        and len(answers(tmp_path / "out.jsonl")) == 20
    )


def test_without_ray_the_extra_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    result = run(folder, write(tmp_path / "in.jsonl", [request("a")]), tmp_path / "out.jsonl", "--ray", "1")
    assert result.exit_code == 1 and "chiasm[ray]" in result.output


def test_what_an_actor_of_ray_does(folder, tmp_path):
    """Without a cluster: lines come by their numbers, answers go as text."""
    from chiasm.cli.batch import open_batch
    from chiasm.serve.batch_ray import Answering

    source = write(tmp_path / "in.jsonl", [request("größer"), "", "{", request("b")])
    settings = dict.fromkeys(("device", "dtype", "quantize", "media_root"))
    settings |= {"media_host": (), "ignore_fingerprint": False, "flying": 2, "slots": 2}
    settings |= {"max_length": 480, "max_new_tokens": 8}
    actor = Answering(partial(open_batch, str(folder), settings), str(source), 2)
    try:
        told = actor({"number": np.array([1, 3, 4]), "problem": np.array(["", "", ""])})
    finally:
        actor.served.service.stop()
    rows = [json.loads(answer) for answer in told["answer"]]
    broken = Answering(partial(open_batch, str(tmp_path), settings), str(source), 2)
    assert "config.json is missing" in broken({"number": np.array([1]), "problem": np.array([""])})["why"][0]
    assert {row["custom_id"] for row in rows if row["response"]} == {"größer", "b"}
    assert [row["error"]["message"] for row in rows if row["error"]] == ["line 3: it is not JSON"]
