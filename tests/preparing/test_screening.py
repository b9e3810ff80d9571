"""Images that show a medical device, or may, leave training, and nothing else; people's readings come first."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from stage_steps import screen_all

from tasks.devices.screener import build_screener
from tasks.errors import RunError
from tasks.files import digest, read_json, write_json
from tasks.networks.files import save_network
from tasks.networks.segmenter import build_segmenter
from tasks.pixels.masks import MaskKind
from tasks.preparing.mask_shards import plan_masks
from tasks.preparing.packing import index_arrays
from tasks.preparing.screening import add_readings, count_devices, decide_devices, keep_fair_readings
from tasks.records import DOUBTFUL_DEVICE, READ_DEVICE, SCORED_DEVICE, Facts
from tasks.runs.manifest import read_manifest, write_manifest
from tasks.runs.run import Run
from tasks.settings import ScreeningSettings, Settings

HOW = ScreeningSettings(threshold=0.5, exclude_from=0.3, doubtful_to=0.8)


def table(*rows: tuple[str, str], score: float | None = None, excluded: str = "", label: int = 1) -> pd.DataFrame:
    """Rows (path, content); the split is the path's first part."""
    paths = [path for path, _ in rows]
    columns: dict[str, Any] = {
        "path": pd.array(paths, dtype="string"),
        "sha256": pd.array([content for _, content in rows], dtype="string"),
        "split": pd.array([path.split("/")[0] for path in paths], dtype="string"),
        "excluded": pd.array([excluded] * len(rows), dtype="string"),
        "label": [label] * len(rows),
        "device_score": pd.array([score] * len(rows), dtype="Float32"),
    }
    return pd.DataFrame(columns)


def screened(
    manifest: pd.DataFrame, readings: dict[str, int], answered: dict[str, int] | None = None
) -> dict[str, tuple[object, bool, str]]:
    out = decide_devices(add_readings(manifest, readings, answered or {}), HOW)
    return {
        path: (None if pd.isna(device) else bool(device), bool(reviewed), reason)
        for path, device, reviewed, reason in zip(
            out["path"], out["has_device"], out["device_reviewed"], out["excluded"], strict=True
        )
    }


# -- people's readings -------------------------------------------------------------------------------------------------


def test_a_training_image_with_a_device_leaves_and_one_without_stays() -> None:
    found = screened(table(("train/a", "1"), ("train/b", "2")), {"train/a": 1, "train/b": 0})
    assert found == {"train/a": (True, True, READ_DEVICE), "train/b": (False, True, "")}


def test_an_image_that_nobody_read_and_nothing_scored_stays_unknown_and_stays() -> None:
    assert screened(table(("train/a", "1")), {"train/other": 1}) == {"train/a": (None, False, "")}
    assert screened(table(("train/a", "1")), {}) == {"train/a": (None, False, "")}


@pytest.mark.parametrize("split", ["val", "test"])
def test_devices_stay_in_val_and_test(split: str) -> None:
    assert screened(table((f"{split}/a", "1")), {f"{split}/a": 1}) == {f"{split}/a": (True, True, "")}
    assert screened(table((f"{split}/a", "1"), score=0.9), {}) == {f"{split}/a": (True, False, "")}


def test_a_reading_holds_for_identical_files() -> None:
    found = screened(table(("train/a", "1"), ("train/b", "1"), ("test/c", "1")), {"test/c": 1})
    assert found == {
        "train/a": (True, True, READ_DEVICE),
        "train/b": (True, True, READ_DEVICE),
        "test/c": (True, True, ""),
    }


@pytest.mark.parametrize("readings", [{"train/a": 0, "train/b": 1}, {"train/a": 1, "train/b": 0}])
def test_identical_files_read_differently_count_as_showing_a_device(readings: dict[str, int]) -> None:
    found = screened(table(("train/a", "1"), ("train/b", "1")), readings)
    assert {device for device, _, _ in found.values()} == {True}


def test_an_earlier_reason_is_kept() -> None:
    found = screened(table(("train/a", "1"), excluded="duplicate of x"), {"train/a": 1})
    assert found == {"train/a": (True, True, "duplicate of x")}


def test_an_answer_about_a_file_overrides_the_table_and_the_score() -> None:
    manifest = table(("train/a", "1"), ("train/b", "2"), score=0.9)
    found = screened(manifest, {"train/a": 1}, {"1": 0, "2": 0})
    assert found == {"train/a": (False, True, ""), "train/b": (False, True, "")}


def test_the_screener_is_judged_by_the_table_alone_and_by_nothing_when_nobody_knows_what_it_learnt_from() -> None:
    read = add_readings(
        table(("train/a", "1"), ("train/copy", "1"), ("train/b", "2")), {"train/a": 1}, {"1": 0, "2": 1}
    )
    fair = keep_fair_readings(read, {"train/a": 1}, frozenset())["device_reading"]
    assert fair.fillna(-1).tolist() == [0, 0, -1]
    assert keep_fair_readings(read, {"train/a": 1}, None)["device_reading"].isna().all()


# -- the score ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("score", "has_device", "reason"),
    [
        (0.0, False, ""),
        (0.29, False, ""),
        (0.3, False, DOUBTFUL_DEVICE),
        (0.49, False, DOUBTFUL_DEVICE),
        (0.5, True, SCORED_DEVICE),
        (1.0, True, SCORED_DEVICE),
    ],
)
def test_a_score_excludes_from_the_lower_edge_and_counts_as_a_device_from_the_threshold(
    score: float, has_device: bool, reason: str
) -> None:
    assert screened(table(("train/a", "1"), score=score), {}) == {"train/a": (has_device, False, reason)}


@pytest.mark.parametrize("score", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("device", [0, 1])
def test_a_reading_overrides_the_score_and_leaves_it_as_it_is(score: float, device: int) -> None:
    manifest = table(("train/a", "1"), score=score)
    assert screened(manifest, {"train/a": device})["train/a"] == (bool(device), True, READ_DEVICE if device else "")
    decided = decide_devices(add_readings(manifest, {"train/a": device}, {}), HOW)
    assert decided["device_score"].tolist() == [pytest.approx(score)]


def test_a_threshold_below_the_lower_edge_excludes_from_the_threshold_on() -> None:
    how = HOW.model_copy(update={"threshold": 0.2})
    decided = decide_devices(add_readings(table(("train/a", "1"), score=0.25), {}, {}), how)
    assert (decided["has_device"].tolist(), decided["excluded"].tolist()) == ([True], [SCORED_DEVICE])


def test_counts_tell_rates_before_and_after_and_none_where_nothing_is_known() -> None:
    manifest = table(("train/a", "1"), ("train/b", "2"), ("train/c", "3"), ("train/d", "4"))
    manifest["device_score"] = pd.array([0.1, 0.1, 0.4, None], dtype="Float32")
    counts = count_devices(decide_devices(add_readings(manifest, {"train/a": 1, "train/b": 0}, {}), HOW))
    rates = {(row["split"], row["class"]): (row["images"], row["screened"], row["rate"]) for row in counts["rates"]}
    assert (counts["n_excluded"], counts["n_train_kept"], counts["n_unscreened_train"]) == (2, 2, 1)
    assert (counts["n_excluded_reviewed"], counts["n_excluded_scored"], counts["n_excluded_doubtful"]) == (1, 0, 1)
    assert rates["train before", "pneumonia"] == (4, 3, 0.3333)
    assert rates["train after", "pneumonia"] == (2, 1, 0.0)
    assert rates["train before", "normal"] == (0, 0, None)
    assert rates["test", "pneumonia"] == (0, 0, None)


# -- the stage ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def screener(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("screener")
    save_network(build_screener(1, (4, 4, 4)), folder)
    return folder


def prepare_run(tmp_path: Path, screener: Path, manifest: pd.DataFrame) -> Settings:
    """A run folder with packed noise for each row."""
    run, shelf = tmp_path / "run", tmp_path / "cache" / "arrays" / "shelf"
    shelf.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 255, (len(manifest), 224, 224), dtype=np.uint8)
    np.save(shelf / "one.npy", pixels)
    known = {sha: ("arrays/shelf/one.npy", i, "") for i, sha in enumerate(manifest["sha256"])}
    write_json(run / "arrays" / "index.json", index_arrays(manifest, known))
    write_manifest(run, manifest)
    values: Facts = {"run_dir": str(run), "storage": {"cache": str(tmp_path / "cache")}}
    return Settings.model_validate(values | {"screening": {"screener": str(screener)}})


def rows_of(*paths: str) -> pd.DataFrame:
    manifest = table(*((path, digest(path)) for path in paths))
    return manifest.assign(image_id=[digest(path)[:16] for path in paths], group_id=list(paths))


def test_every_image_with_pixels_gets_a_score_and_a_mask_and_a_verdict(tmp_path: Path, screener: Path) -> None:
    manifest = rows_of("train/a", "train/b", "val/c", "test/d")
    settings = prepare_run(tmp_path, screener, manifest)
    screen_all(settings, str(tmp_path))
    run = tmp_path / "run"
    found = read_manifest(run)
    assert found["has_device"].notna().all() and found["device_score"].between(0, 1).all()
    assert not found["device_reviewed"].any()
    for masks in (Run(settings).masks(), Run(settings).lungs()):
        drawn = masks.read(list(found["image_id"]))
        assert drawn.shape == (4, 224, 224) and drawn.dtype == np.uint8
    assert (run / "review" / "index.html").exists() and (run / "excluded.csv").exists()


def test_scores_are_taken_from_the_cache_and_the_decision_is_done_again_when_a_reading_changes(
    tmp_path: Path, screener: Path
) -> None:
    manifest = rows_of("train/a", "train/b", "test/c")
    settings = prepare_run(tmp_path, screener, manifest)
    seen = []
    for device_on_b in (0, 0, 1):
        (tmp_path / "device_review.csv").write_text(f"path,device\ntrain/a,1\ntrain/b,{device_on_b}\ntest/c,1\n")
        write_manifest(tmp_path / "run", manifest)
        facts = screen_all(settings, str(tmp_path))
        shards = read_json(tmp_path / "run" / "masks" / "index.json")["shards"]
        seen.append((facts["reused"], facts["n_excluded"], (tmp_path / "cache" / shards[0]["name"]).stat().st_mtime_ns))
    assert [(reused, n) for reused, n, _ in seen] == [(False, 1), (True, 1), (False, 2)]
    assert len({written for _, _, written in seen}) == 1
    text = (tmp_path / "run" / "excluded.csv").read_text()
    assert text == f"path,reason\ntrain/a,{READ_DEVICE}\ntrain/b,{READ_DEVICE}\n"
    assert read_manifest(tmp_path / "run")["has_device"].tolist() == [True, True, True]


def test_another_screener_screens_again(tmp_path: Path, screener: Path) -> None:
    manifest = rows_of("train/a", "train/b")
    settings = prepare_run(tmp_path, screener, manifest)
    screen_all(settings, str(tmp_path))
    first = read_manifest(tmp_path / "run")["device_score"].tolist()
    save_network(build_screener(2, (4, 4, 4)), tmp_path)
    write_manifest(tmp_path / "run", manifest)
    other = settings.model_copy(update={"screening": settings.screening.model_copy(update={"screener": str(tmp_path)})})
    screen_all(other, str(tmp_path))
    assert read_manifest(tmp_path / "run")["device_score"].tolist() != first


def written(settings: Settings, kind: MaskKind) -> dict[str, int]:
    """The shards of a run by name, and when each was written."""
    shards = read_json(Run(settings).folder / kind / "index.json")["shards"]
    return {shard["name"]: (Run(settings).cache / shard["name"]).stat().st_mtime_ns for shard in shards}


def test_another_segmenter_draws_lungs_again_and_no_devices(tmp_path: Path, screener: Path) -> None:
    settings = prepare_run(tmp_path, screener, rows_of("train/a", "test/b"))
    screen_all(settings, str(tmp_path))
    masks, lungs = written(settings, "masks"), written(settings, "lungs")
    save_network(build_segmenter(1, (4, 4)), tmp_path)
    other = settings.screening.model_copy(update={"segmenter": str(tmp_path)})
    screen_all(settings.model_copy(update={"screening": other}), str(tmp_path))
    assert written(settings, "masks") == masks
    assert not set(written(settings, "lungs")) & set(lungs)


def test_lungs_that_were_not_drawn_before_a_run_was_killed_are_drawn_by_the_next_alone(
    tmp_path: Path, screener: Path
) -> None:
    settings = prepare_run(tmp_path, screener, rows_of("train/a", "test/b"))
    screen_all(settings, str(tmp_path))
    masks, lungs = written(settings, "masks"), written(settings, "lungs")
    assert plan_masks.fn(Run(settings)) == []
    for name in lungs:
        (tmp_path / "cache" / name).unlink()
    assert plan_masks.fn(Run(settings)) == ["arrays/shelf/one.npy"]
    screen_all(settings, str(tmp_path))
    assert written(settings, "masks") == masks
    assert list(written(settings, "lungs")) == list(lungs)


def test_a_changed_screener_is_refused_before_anything_is_written(tmp_path: Path, screener: Path) -> None:
    settings = prepare_run(tmp_path, tmp_path / "bad", rows_of("train/a"))
    (tmp_path / "bad").mkdir()
    with pytest.raises(RunError, match=r"screening\.screener: .*model\.keras is missing"):
        screen_all(settings, str(tmp_path))
    save_network(build_screener(1, (4, 4, 4)), tmp_path / "bad")
    with (tmp_path / "bad" / "model.keras").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(RunError, match="does not match"):
        screen_all(settings, str(tmp_path))
    assert not (tmp_path / "run" / "masks").exists()
