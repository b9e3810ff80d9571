"""Old runs go, and of the cache what they alone used; what anybody still needs stays."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from infra.clean_runs import DAY_S, CleanFlags, clean_runs
from tasks.errors import RunError, SettingsError
from tasks.files import locked, write_json
from tasks.settings import Settings

NOW = time.time()


def put(path: Path, text: str = "x" * 100, age_s: float = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    os.utime(path, (NOW - age_s, NOW - age_s))
    return path


def make_old(folder: Path) -> None:
    """Has nobody written for two days to a folder and all that is in it."""
    for path in (folder, *folder.rglob("*")):
        os.utime(path, (NOW - 2 * DAY_S, NOW - 2 * DAY_S))


def make_run(tmp_path: Path, name: str, age_days: float, finished: bool = True, root: str = "runs") -> Path:
    """A run with a stage entry, a shard of pixels, one of each mask and an explanation, all its own, in the cache."""
    run, cache, age_s = tmp_path / root / name, tmp_path / "cache", age_days * DAY_S
    put(cache / "pack" / name / "stage.json", age_s=age_s)
    put(cache / "explanations" / name / "a.json", age_s=age_s)
    put(cache / "arrays" / "shelf" / f"{name}.json", age_s=age_s)
    shards = {"arrays": f"shelf/{name}.npy", "masks": f"how/shelf/{name}.npz", "lungs": f"how/shelf/{name}.npz"}
    for kind, shard in ((kind, f"{kind}/{shard}") for kind, shard in shards.items()):
        put(cache / shard, age_s=age_s)
        put(run / kind / "index.json", json.dumps({"shards": [{"name": shard}], "images": {}}), age_s)
    record = {"facts": {}, "entry": f"pack/{name}"}
    put(run / "stages" / "pack.json", json.dumps(record), age_s)
    record = {"facts": {}, "entry": f"explain/{name}", "parts": {"given": {"entries": [f"explanations/{name}"]}}}
    put(run / "stages" / "explain.json", json.dumps(record), age_s)
    for folder in (run, cache / "pack" / name, cache / "explanations" / name, *run.iterdir()):
        os.utime(folder, (NOW - age_s, NOW - age_s))
    if finished:
        put(run / "run.json", "{}", age_s)
        put(cache / "finished" / f"{name}.json", json.dumps({"run_dir": str(run), "report": "r"}), age_s)
    os.utime(run, (NOW - age_s, NOW - age_s))
    return run


def clean(tmp_path: Path, keep: int, **others: Any) -> str:
    settings = Settings.model_validate({"storage": {"cache": str(tmp_path / "cache")}})
    return clean_runs(settings, **{"keep": keep, "runs": str(tmp_path / "runs"), "dry_run": False, **others})


def runs_in(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "runs").iterdir() if path.is_dir() and not path.is_symlink()}


def cached(tmp_path: Path) -> set[str]:
    """Names of the runs whose part of the cache is whole; each part there or gone."""
    cache = tmp_path / "cache"
    kinds = [
        {path.stem for path in cache.glob(pattern)}
        for pattern in (
            "pack/*",
            "explanations/*",
            "arrays/shelf/*.npy",
            "arrays/shelf/*.json",
            "masks/how/shelf/*.npz",
            "lungs/how/shelf/*.npz",
        )
    ]
    assert all(kind == kinds[0] for kind in kinds), kinds
    return kinds[0]


def test_the_newest_finished_runs_stay_and_the_cache_of_the_others_goes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for age in range(5):
        make_run(tmp_path, f"run{age}", age)
    said = clean(tmp_path, 2)
    assert runs_in(tmp_path) == cached(tmp_path) == {"run0", "run1"}
    assert {path.stem for path in (tmp_path / "cache" / "finished").iterdir()} == {"run0", "run1"}
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" (")[0] for line in lines[:3]] == [f"removed {tmp_path}/runs/run{age}" for age in (2, 3, 4)]
    assert lines[3].startswith(f"removed 21 entries of {tmp_path / 'cache'} that no run names (")
    assert said == "freed 0.0 MB: 3 runs and 21 entries of the cache; 2 finished runs stay, and 0 others"


def test_a_dry_run_says_the_same_and_removes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for age in range(3):
        make_run(tmp_path, f"run{age}", age)
    said = clean(tmp_path, 1, dry_run=True)
    assert said.startswith("would free ") and "2 runs and 14 entries" in said
    assert capsys.readouterr().out.count("would remove ") == 3
    assert runs_in(tmp_path) == cached(tmp_path) == {"run0", "run1", "run2"}


def test_what_latest_leads_to_what_was_published_and_what_holds_a_screener_or_segmenter_stays(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, f"run{age}", age) for age in range(8)]
    (tmp_path / "runs" / "latest").symlink_to("run3")
    group = {"n": 0, "auc": {"value": None, "reason": "no image"}, "images": ""}
    model = {"model_sha256": "", "audit": {"passed": True, "failed": []}, "val": group, "val_device_free": group}
    before = model | {"run": "run5", "run_dir": "data/runs/run5", "published": "2026-01-01"}
    published = before | {"run": "run4", "run_dir": str(runs[4]), "earlier": [before], "withdrawn": []}
    write_json(tmp_path / "runs" / "published.json", published)
    put(runs[6] / "screener" / "model.keras")
    put(runs[7] / "segmenter" / "model.keras")
    clean(tmp_path, 1)
    assert runs_in(tmp_path) == cached(tmp_path) == {"run0", "run3", "run4", "run5", "run6", "run7"}
    assert (tmp_path / "runs" / "latest").resolve() == runs[3]


def test_a_published_json_that_cannot_be_read_stops_everything(tmp_path: Path) -> None:
    for age in range(3):
        make_run(tmp_path, f"run{age}", age)
    put(tmp_path / "runs" / "published.json", "{}")
    with pytest.raises(RunError, match=r"published\.json is not as publishing writes it; put back a whole copy"):
        clean(tmp_path, 1)
    assert runs_in(tmp_path) == {"run0", "run1", "run2"}


def test_unfinished_runs_stay_for_a_day_and_with_them_what_was_just_written_to_the_cache(tmp_path: Path) -> None:
    make_run(tmp_path, "done", 3)
    make_run(tmp_path, "dead", 2, finished=False)
    make_run(tmp_path, "alive", 0.5, finished=False)
    put(tmp_path / "cache" / "arrays" / "shelf" / "packed-just-now.npy")
    clean(tmp_path, 1)
    assert runs_in(tmp_path) == {"done", "alive"}
    (tmp_path / "cache" / "arrays" / "shelf" / "packed-just-now.npy").unlink()
    assert cached(tmp_path) == {"done", "alive"}


def test_what_an_interrupted_stage_left_goes_after_a_day(tmp_path: Path) -> None:
    make_run(tmp_path, "done", 3)
    left = put(tmp_path / "cache" / "fit" / "key.partial" / "member_1.keras")
    make_old(tmp_path / "cache" / "fit")
    clean(tmp_path, 1)
    assert not left.parent.exists()


def test_what_was_written_to_the_cache_within_a_day_stays_where_no_run_is_known(tmp_path: Path) -> None:
    begun = put(tmp_path / "cache" / "fit" / "key.partial" / "members" / "checkpoint.json")
    make_old(tmp_path / "cache" / "fit")
    begun.write_text("the next epoch")
    packed = put(tmp_path / "cache" / "arrays" / "shelf" / "packed-just-now.npy")
    clean(tmp_path, 1)
    assert begun.exists() and packed.exists()


def test_what_a_process_is_at_work_on_stays_however_old_it_is(tmp_path: Path) -> None:
    cache, run = tmp_path / "cache", make_run(tmp_path, "one", 2, finished=False)
    worked_on = [
        put(cache / "fit" / "key.partial" / "members" / "checkpoint.json"),
        put(cache / "arrays" / "shelf" / "shard.npy"),
        put(cache / "masks" / "how" / "shelf" / ".shard.npz.1-2.partial"),
        run / "stages" / "pack.json",
    ]
    with (
        locked(cache / "fit" / ".key.lock"),
        locked(cache / "arrays" / "shelf" / ".shard.lock"),
        locked(cache / "masks" / "how" / "shelf" / "shard.lock"),
        locked(run / ".one.lock"),
    ):
        make_old(tmp_path)
        clean(tmp_path, 1)
        assert all(path.exists() for path in worked_on)
    make_old(tmp_path)
    clean(tmp_path, 1)
    assert not any(path.exists() for path in worked_on)


def test_an_entry_whose_removal_is_stopped_no_longer_passes_for_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = put(tmp_path / "cache" / "fit" / "key" / "stage.json").parent
    put(entry / "members" / "member_1.keras")
    make_old(entry)

    def stop(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", stop)
    with pytest.raises(KeyboardInterrupt):
        clean(tmp_path, 1)
    assert entry.exists() and not (entry / "stage.json").exists()


def test_entries_that_several_runs_share_and_those_of_finished_runs_elsewhere_stay(tmp_path: Path) -> None:
    shared = make_run(tmp_path, "old", 2)
    new = make_run(tmp_path, "new", 1)
    make_run(tmp_path, "elsewhere", 9, root="other")
    for name in (
        "arrays/index.json",
        "masks/index.json",
        "lungs/index.json",
        "stages/pack.json",
        "stages/explain.json",
    ):
        (new / name).write_text((shared / name).read_text())
    clean(tmp_path, 1)
    assert runs_in(tmp_path) == {"new"}
    assert cached(tmp_path) == {"old", "elsewhere"}


def test_folders_and_files_that_no_run_wrote_are_left_alone(tmp_path: Path) -> None:
    make_run(tmp_path, "run", 1)
    put(tmp_path / "runs" / "mine" / "notes.txt", age_s=99 * DAY_S)
    put(tmp_path / "runs" / "device_answers.csv", age_s=99 * DAY_S)
    clean(tmp_path, 1)
    assert (tmp_path / "runs" / "mine" / "notes.txt").exists() and (tmp_path / "runs" / "device_answers.csv").exists()


def test_where_there_are_no_runs_and_no_cache_nothing_is_done(tmp_path: Path) -> None:
    assert clean(tmp_path, 1) == "freed 0.0 MB: 0 runs and 0 entries of the cache; 0 finished runs stay, and 0 others"


def test_runs_in_a_bucket_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"^runs: s3://runs/weekly is not a folder on this machine; "):
        clean(tmp_path, 1, runs="s3://runs/weekly")


@pytest.mark.parametrize("flags", [[], ["--keep", "0"], ["--keep", "many"]])
def test_how_many_stay_has_to_be_said(flags: list[str]) -> None:
    from flows.engine.command_line import read_own_flags

    with pytest.raises(SettingsError, match=r"^keep: "):
        read_own_flags(flags, "test", CleanFlags)
