"""``chiasm check``: planted faults are found, each at its place; quarantine and policy do what they say."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from faults import LONG, dataset, talk, truncated
from PIL import Image
from rich.console import Console
from tiny_run import model_config, tokenizer_folder

from chiasm.cli import main
from chiasm.data.check import Rules, check_all
from chiasm.data.check import run as check_run
from chiasm.data.mixture import Entry, Mixture
from chiasm.data.quarantine import Quarantine, Quarantined
from chiasm.errors import ConfigError, DataError
from chiasm.train import Recipe, train
from chiasm.train.ways import everything, open_processor, ways

QUIET = Console(file=io.StringIO())


def recipe(folder: Path, **changes: Any) -> Recipe:
    source = {"type": "llava_json", "file": str(folder / "train.jsonl"), "images": str(folder / "pictures")}
    values = {
        "model": {"config": model_config(), "tokenizer": str(tokenizer_folder(folder / "tokenizer"))},
        "data": {"colors": {"source": source}},
        "stages": [
            {"name": "align", "plan": "align", "steps": 3, "batch_size": 4, "lr": 1e-3, "max_length": LONG},
        ],
        "out": str(folder / "run"),
    }
    return Recipe.parse(values).edit(**changes)


def looked(recipe: Recipe, **options: Any) -> Any:
    return check_all(Mixture(recipe.data, recipe.seed), ways(recipe), **{"workers": 0, **options})


def by_kind(summary: Any) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {}
    for finding in summary.findings:
        found.setdefault(finding.kind, set()).add(finding.index)
    return found


@pytest.fixture(scope="module")
def faulty(tmp_path_factory) -> tuple[Path, dict[str, set[int]]]:
    folder = tmp_path_factory.mktemp("faulty")
    return folder, dataset(folder, 400)


def test_every_planted_fault_is_found_and_nothing_else(faulty):
    folder, planted = faulty
    assert len(planted) == 10 and sum(map(len, planted.values())) == 20  # 5 %
    summary = looked(recipe(folder))
    assert by_kind(summary) == planted
    assert summary.bad == 20 and summary.samples == 400
    ids = {f.index: f.id for f in summary.findings}
    unreadable = planted["record"]
    assert all(ids[i] == (str(i) if i in unreadable else f"s{i}") for i in ids)
    stats = summary.sources[0]
    assert stats.pictures == 400 - len(planted["record"] | planted["placeholders"] | planted["role"])
    assert stats.longest == summary.longest.tokens <= LONG and summary.longest.id.startswith("s")


def test_lengths_are_those_of_the_samples(tmp_path):
    dataset(tmp_path, 40, share=0.0)
    spec = recipe(tmp_path)
    way = ways(spec)["colors"]
    mixture = Mixture(spec.data)
    summary = looked(spec)
    bad = {f.index for f in summary.findings}
    lengths, media, targets = [], 0, 0
    for i in set(range(40)) - bad:
        sample = way.processor(mixture[0, i].messages, id=str(i), train=True)
        lengths.append(len(sample))
        media += sum(len(m.slots) for m in sample.media)
        targets += int(sample.loss_mask.sum())
    stats = summary.sources[0]
    assert stats.longest >= max(lengths) and stats.median == sorted(lengths)[(len(lengths) - 1) // 2]
    assert stats.media == pytest.approx(4.0) and media == 4 * len(lengths)
    assert stats.targets == pytest.approx(targets / len(lengths), abs=1.0)


def test_training_stops_with_the_name_and_finishes_with_the_quarantine_file(faulty):
    folder, _ = faulty
    spec = recipe(folder, out=str(folder / "stopped"))
    with pytest.raises(DataError, match=r"20 of the 400 samples cannot be used"):
        train(spec, console=QUIET)
    unlooked = spec.edit(
        **{"stages.0.check_samples": 0, "stages.0.epochs": 1, "stages.0.steps": None, "stages.0.batch_size": 20}
    )
    with pytest.raises(DataError, match=r"sample 's\d+'|line \d+"):
        train(unlooked, console=QUIET)
    shutil.rmtree(folder / "stopped", ignore_errors=True)
    file = looked(spec).quarantine().write(folder / "quarantine.jsonl")
    assert len(Quarantine.read(str(file))) == 20
    kept = unlooked.edit(**{"data.quarantine": str(file), "out": str(folder / "finished")})
    assert kept.quarantine == str(file)
    train(kept, console=QUIET)
    seen = json.loads((folder / "finished" / "align" / "log.jsonl").read_text().splitlines()[-1])
    assert seen["step"] == 19  # (400 - 20) / 20


def test_a_bad_sample_is_skipped_counted_and_capped(tmp_path):
    """The others keep their places: the losses are those of a run whose bad samples stand alone in their batches."""
    dataset(tmp_path, 20, share=0.0)
    one = {"stages.0.check_samples": 0, "stages.0.batch_size": 1, "stages.0.steps": 20, "stages.0.log_every": 1}
    spec = recipe(tmp_path, **one, **{"data.bad": {"do": "skip", "cap": 10}})
    planted = {f.index for f in looked(spec).findings}
    assert len(planted) == 10
    train(spec, console=QUIET)
    folder = tmp_path / "run" / "align"
    skipped = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
    assert {r["index"] for r in skipped} == planted and all(r["reason"] and r["message"] for r in skipped)
    order = [i for _, i in Mixture(spec.data, spec.seed).order(0).tolist()]
    assert [r["step"] for r in skipped] == [1 + order.index(r["index"]) for r in skipped]
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in log if r.get("tokens") == 0] == [r["step"] for r in skipped]
    with pytest.raises(DataError, match=r"9 bad samples were skipped before, 9 may be"):
        train(spec.edit(**{"bad.cap": 9, "out": str(tmp_path / "capped")}), console=QUIET)
    assert recipe(tmp_path, **{"data.bad": "skip"}).bad.most(40_000) == 40  # the default: one in a thousand
    assert recipe(tmp_path).bad.most(40_000) == 0
    with pytest.raises(DataError):
        train(spec.edit(**{"bad.do": "stop", "out": str(tmp_path / "stopped")}), console=QUIET)


def test_skips_survive_a_resume(tmp_path):
    from chiasm.data.quarantine import Skips

    path, error = tmp_path / "skipped.jsonl", DataError("sample 'x': bad", "record")
    first = Skips(path, 2)
    first.add(3, Quarantined("a", 1, "x", "record"), error)
    first.add(3, Quarantined("a", 1, "x", "record"), error)  # the next epoch: the same sample counts once
    first.add(9, Quarantined("a", 2, "y", "record"), error)
    again = Skips(path, 2, resume_at=5)
    assert again.seen == {("a", 1)} and len(path.read_text().splitlines()) == 1
    again.add(9, Quarantined("a", 2, "y", "record"), error)
    with pytest.raises(DataError, match=r"sample 'x': bad \(2 bad samples were skipped before, 2 may be"):
        again.add(10, Quarantined("a", 3, "z", "record"), error)


def test_remarks(tmp_path):
    """Odd, repeated and cut: told, and nothing stops."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    sizes = [(20, 20), (20, 20), (900, 30), (4, 40), (20, 20), (21, 20)]
    for i, size in enumerate(sizes):
        Image.effect_noise(size, 60).convert("RGB").save(pictures / f"{i}.png")
    (pictures / "4.png").write_bytes((pictures / "0.png").read_bytes())
    records = [{"id": f"r{i}", "image": f"{i}.png", "conversations": talk("<image>\nA?", f"red {i}")} for i in range(6)]
    records[5]["id"] = "r0"
    records.append({"id": "r6", "image": "1.png", "conversations": talk("<image>\nA?", "red 1")})  # sample 1 again
    records.append({"id": "r7", "image": "0.png", "conversations": talk("<image>\nB?", "two " * 60)})
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, records)))
    summary = looked(recipe(tmp_path))
    assert by_kind(summary) == {
        "odd_picture": {2, 3},
        "duplicate_picture": {4},
        "duplicate_id": {5},
        "duplicate_sample": {6},
        "truncated": {7},
    }
    assert summary.bad == 0 and not len(summary.quarantine())
    assert set(summary.quarantine(["odd_picture"]).entries["colors"]) == {2, 3}
    said = {f.index: f.message for f in summary.findings}
    assert "4.png' is picture 1" in said[4] and "0.png' of sample 'r0'" in said[4]
    assert "number 5: has the id of number 0" in said[5] and "as sample 'r1', number 1" in said[6]


def test_deep_decodes(tmp_path):
    dataset(tmp_path, 20, share=0.0)
    before = by_kind(looked(recipe(tmp_path)))
    good = next(i for i in range(20) if not any(i in places for places in before.values()))
    truncated(tmp_path / "pictures" / f"{good}.png")
    assert good not in by_kind(looked(recipe(tmp_path))).get("broken_picture", set())
    assert good in by_kind(looked(recipe(tmp_path), rules=Rules(deep=True)))["broken_picture"]


def test_workers_give_the_same(faulty, monkeypatch):
    monkeypatch.setattr(check_run, "SIZE", 50)
    spec = recipe(faulty[0])
    alone, together = looked(spec), looked(spec, workers=2)
    assert alone.findings == together.findings and alone.sources == together.sources


def test_a_killed_check_redoes_nothing(faulty, monkeypatch, tmp_path):
    monkeypatch.setattr(check_run, "SIZE", 40)
    spec = recipe(faulty[0])
    whole = looked(spec)

    def kill(done: int, of: int) -> None:
        if done >= of // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        looked(spec, out=tmp_path, advance=kill)
    state = tmp_path / "check-progress.jsonl"
    with state.open("ab") as file:
        file.write(b'{"source": 0, "start": 360, "rows": "AAA')  # a line that the kill cut
    done: list[int] = []
    again = looked(spec, out=tmp_path, advance=lambda n, of: done.append(n))
    assert again.resumed == 200 and done == [200, 240, 280, 320, 360, 400]
    assert again.findings == whole.findings and again.sources == whole.sources and again.longest == whole.longest
    assert not state.exists()
    with pytest.raises(KeyboardInterrupt):
        looked(spec, out=tmp_path, advance=kill)
    assert looked(spec, out=tmp_path, rules=Rules(deep=True)).resumed == 0  # another look begins anew


def test_command_line(faulty, tmp_path):
    folder, planted = faulty
    source = f"type=llava_json,file={folder / 'train.jsonl'},images={folder / 'pictures'},name=mine"
    ran = CliRunner().invoke(main, ["check", source, "--out", str(tmp_path), "--workers", "0"])
    assert ran.exit_code == 1, ran.output
    assert f"{20 - len(planted['too_long'])} of 400 samples" in ran.output  # without a model there are no lengths
    page, found = (tmp_path / "check.html").read_text(), json.loads((tmp_path / "check.json").read_text())
    assert found["counts"]["missing_picture"] == 2 and "404" not in page and "mine" in page
    assert "http" not in page.replace("http-equiv", "")
    file = tmp_path / "bad.jsonl"
    ran = CliRunner().invoke(
        main, ["check", source, "--out", str(tmp_path), "--workers", "0", "--write-quarantine", str(file)]
    )
    assert ran.exit_code == 0 and len(file.read_text().splitlines()) == 18
    ran = CliRunner().invoke(main, ["check", source, "--also", "odd_pictures"])
    assert ran.exit_code == 1 and "did you mean 'odd_picture'" in ran.output


def test_recipe_on_the_command_line(faulty, tmp_path):
    import yaml

    folder, _ = faulty
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe(folder).dump()))
    words = ["check", str(tmp_path / "r.yaml"), f"out={tmp_path}", "--workers", "2"]
    ran = CliRunner().invoke(main, words)
    assert ran.exit_code == 1 and "20 of 400 samples" in ran.output, ran.output
    assert (tmp_path / "check" / "check.html").is_file()


def test_held_out_sources_are_looked_at_apart(tmp_path):
    """A held-out source may have the name of a training source; a sample that is in both is told."""
    (tmp_path / "pictures").mkdir()
    for i in range(6):
        Image.effect_noise((20, 20), 60).convert("RGB").save(tmp_path / "pictures" / f"{i}.png")
    for name, numbers in (("train", range(4)), ("test", (4, 2, 5))):
        turns = [(i, talk("<image>\nA?", f"red {i}")) for i in numbers]
        rows = [{"id": f"{name}{i}", "image": f"{i}.png", "conversations": said} for i, said in turns]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "pictures" / "5.png").write_bytes(b"")
    spec = recipe(tmp_path)
    source = spec.dump()["data"]["colors"]["source"] | {"file": str(tmp_path / "test.jsonl")}
    spec = spec.edit(held_out={"colors": {"source": source}})
    summary = check_all(everything(spec), ways(spec), workers=0)
    found = {(f.source, f.index): f.kind for f in summary.findings}
    assert found == {("held_out/colors", 1): "leaked", ("held_out/colors", 2): "empty_picture"}
    assert "number 2 of colors" in next(f.message for f in summary.findings if f.kind == "leaked")
    file = summary.quarantine().write(tmp_path / "q.jsonl")
    left = spec.edit(**{"data.quarantine": str(file)}).left_out()
    assert len(Mixture(spec.data, quarantine=left)) == 4 and len(left) == 1
    assert Mixture(spec.held_out, quarantine=left.held_out()).first() == [(0, 0), (0, 1)]


def test_quarantine_of_other_data_is_refused(faulty, tmp_path):
    folder, _ = faulty
    entries = {"colors": recipe(folder).data["colors"]}
    with pytest.raises(DataError, match=r"number 3 of 'colors' was 'x' and is now 's\d+'; the data changed"):
        Mixture(entries, quarantine=Quarantine([Quarantined("colors", 3, "x", "record")]))
    with pytest.raises(DataError, match=r"number 900 of 'colors', which has 400"):
        Mixture(entries, quarantine=Quarantine([Quarantined("colors", 900, "x", "record")]))
    with pytest.raises(ConfigError, match="unknown data source 'colrs'; did you mean 'colors'"):
        Quarantine([Quarantined("colrs", 1, "x", "record")]).known(["colors"])
    (tmp_path / "q.jsonl").write_text('{"source": "colors", "indx": 3}\n')
    with pytest.raises(DataError, match="line 1: unknown key 'indx'; did you mean 'index'"):
        Quarantine.read(str(tmp_path / "q.jsonl"))


def test_without_quarantine_the_order_is_as_before(faulty):
    entries = {"colors": Entry.parse(recipe(faulty[0]).data["colors"].dump())}
    plain, empty = Mixture(entries, 3), Mixture(entries, 3, Quarantine())
    assert plain.order(2).equal(empty.order(2))


def test_no_worker_outlives_a_killed_check(tmp_path):
    """SIGKILL of the command: its workers end by themselves."""
    dataset(tmp_path, 3000, share=0.0)
    words = f"type=llava_json,file={tmp_path / 'train.jsonl'},images={tmp_path / 'pictures'}"
    code = "import sys; from chiasm.cli import main; main(sys.argv[1:])"
    run = [sys.executable, "-c", code, "check", words, "--out", str(tmp_path), "--workers", "2"]
    process = subprocess.Popen(run, stdout=subprocess.DEVNULL)
    children: list[int] = []
    until = time.time() + 60
    while len(children) < 2 and time.time() < until and process.poll() is None:
        listed = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        if not listed.exists():
            pytest.skip("children are listed in /proc only on Linux")
        children = [int(pid) for pid in listed.read_text().split()]
        time.sleep(0.01)
    assert process.poll() is None and len(children) >= 2
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    while time.time() < until and any(_alive(pid) for pid in children):
        time.sleep(0.05)
    assert not any(_alive(pid) for pid in children)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_skips_come_out_of_workers_in_order(faulty, tmp_path):
    from chiasm.data.loader import BatchPlan, Renderer, load
    from chiasm.data.quarantine import Skips

    folder, planted = faulty
    spec = recipe(folder)
    mixture = Mixture(spec.data, spec.seed)
    renderer = Renderer(open_processor(spec.model), LONG)
    told = []
    for workers in (0, 2):
        skips = Skips(tmp_path / f"{workers}.jsonl", 400)
        batches = list(load(BatchPlan(mixture, 8, bucket=5), renderer, 0, 50, workers, skips))
        told.append(((tmp_path / f"{workers}.jsonl").read_text(), [b.ids for _, b in batches if b is not None]))
        assert {index for _, index in skips.seen} == set().union(*planted.values())
    assert told[0] == told[1] and sum(map(len, told[0][1])) == 380
    with pytest.raises(DataError) as stopped:
        list(load(BatchPlan(mixture, 8), renderer, 0, 50, 2))
    assert stopped.value.fault in planted
