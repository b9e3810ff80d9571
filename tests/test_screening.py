"""Images known to show a medical device leave training, and nothing else; unknown stays unknown."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tasks.records import TableError
from tasks.screening import (
    SHOWS_DEVICE,
    apply_review,
    count_devices,
    find_review,
    read_review,
    screen,
)
from tasks.settings import Settings
from tasks.storage import SHIPPED_REVIEW, read_manifest, write_manifest


def table(*rows: tuple[str, str], excluded: str = "", label: int = 1) -> pd.DataFrame:
    """Rows (path, content); the split is the path's first part."""
    paths = [path for path, _ in rows]
    columns: dict[str, Any] = {
        "path": pd.array(paths, dtype="string"),
        "sha256": pd.array([content for _, content in rows], dtype="string"),
        "split": pd.array([path.split("/")[0] for path in paths], dtype="string"),
        "excluded": pd.array([excluded] * len(rows), dtype="string"),
        "label": [label] * len(rows),
    }
    return pd.DataFrame(columns)


def screened(manifest: pd.DataFrame, readings: dict[str, int]) -> dict[str, tuple[object, bool, str]]:
    out = apply_review(manifest, readings)
    return {
        path: (None if pd.isna(device) else bool(device), bool(reviewed), reason)
        for path, device, reviewed, reason in zip(
            out["path"], out["has_device"], out["device_reviewed"], out["excluded"], strict=True
        )
    }


def review_file(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


# -- which rows --------------------------------------------------------------------------------------------------------


def test_a_training_image_with_a_device_leaves_and_one_without_stays() -> None:
    found = screened(table(("train/a", "1"), ("train/b", "2")), {"train/a": 1, "train/b": 0})
    assert found == {"train/a": (True, True, SHOWS_DEVICE), "train/b": (False, True, "")}


def test_an_image_that_nobody_read_stays_unknown_and_stays() -> None:
    assert screened(table(("train/a", "1")), {"train/other": 1}) == {"train/a": (None, False, "")}
    assert screened(table(("train/a", "1")), {}) == {"train/a": (None, False, "")}


@pytest.mark.parametrize("split", ["val", "test"])
def test_devices_stay_in_val_and_test(split: str) -> None:
    assert screened(table((f"{split}/a", "1")), {f"{split}/a": 1}) == {f"{split}/a": (True, True, "")}


def test_a_reading_holds_for_identical_files() -> None:
    found = screened(table(("train/a", "1"), ("train/b", "1"), ("test/c", "1")), {"test/c": 1})
    assert found == {
        "train/a": (True, True, SHOWS_DEVICE),
        "train/b": (True, True, SHOWS_DEVICE),
        "test/c": (True, True, ""),
    }


@pytest.mark.parametrize("readings", [{"train/a": 0, "train/b": 1}, {"train/a": 1, "train/b": 0}])
def test_identical_files_read_differently_count_as_showing_a_device(readings: dict[str, int]) -> None:
    found = screened(table(("train/a", "1"), ("train/b", "1")), readings)
    assert {device for device, _, _ in found.values()} == {True}


def test_an_earlier_reason_is_kept() -> None:
    found = screened(table(("train/a", "1"), excluded="duplicate of x"), {"train/a": 1})
    assert found == {"train/a": (True, True, "duplicate of x")}


def test_counts_tell_rates_before_and_after_and_none_where_nothing_was_read() -> None:
    manifest = apply_review(table(("train/a", "1"), ("train/b", "2"), ("train/c", "3")), {"train/a": 1, "train/b": 0})
    counts = count_devices(manifest)
    rates = {(row["split"], row["class"]): (row["images"], row["reviewed"], row["rate"]) for row in counts["rates"]}
    assert (counts["n_excluded"], counts["n_train_kept"], counts["n_unreviewed_train"]) == (1, 2, 1)
    assert rates["train before", "pneumonia"] == (3, 2, 0.5)
    assert rates["train after", "pneumonia"] == (2, 1, 0.0)
    assert rates["train before", "normal"] == (0, 0, None)
    assert rates["test", "pneumonia"] == (0, 0, None)


# -- which table -------------------------------------------------------------------------------------------------------


def test_a_review_table_is_read_by_path_and_device_only(tmp_path: Path) -> None:
    path = review_file(tmp_path / "r.csv", "confidence,path,device,kinds\n2,a,1,lead\n0,b,0,\n2,a,1,line\n")
    assert read_review(path, "s") == {"a": 1, "b": 0}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("path,kinds\na,lead\n", "lacks the column device"),
        ("path,device\na,2\n", "line 2 has device = '2'"),
        ("path,device\na,\n", "line 2 has device = ''"),
        ("path,device\na,yes\n", "line 2 has device = 'yes'"),
        ("path,device\na,0\nb,1\na,1\n", "reads 'a' as 0 and as 1"),
    ],
)
def test_a_review_table_that_does_not_fit_is_refused_in_a_sentence(text: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(TableError) as caught:
        read_review(review_file(tmp_path / "r.csv", text), "screening.review")
    assert str(caught.value).startswith("screening.review: ")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_table_that_is_named_comes_before_the_source_s_own(tmp_path: Path) -> None:
    review_file(tmp_path / "device_review.csv", "path,device\na,0\n")
    named = review_file(tmp_path / "named.csv", "path,device\na,1\n")
    paths = pd.Series(["a", "b"])
    assert find_review(str(named), tmp_path, paths).readings == {"a": 1}
    assert find_review(None, tmp_path, paths).readings == {"a": 0}


def test_a_named_table_that_knows_no_path_of_the_source_is_refused_with_an_example(tmp_path: Path) -> None:
    named = review_file(tmp_path / "named.csv", "path,device\nchest_xray/a,1\n")
    with pytest.raises(TableError, match=r"no path of .*named\.csv is in the source.*like train/a"):
        find_review(str(named), tmp_path, pd.Series(["train/a"]))


def test_a_named_table_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TableError, match=r"screening\.review: .*none\.csv does not exist"):
        find_review(str(tmp_path / "none.csv"), tmp_path, pd.Series(["a"]))


def test_the_shipped_table_applies_from_95_percent_of_its_paths_on(tmp_path: Path) -> None:
    shipped = read_review(SHIPPED_REVIEW, "s")
    paths = list(shipped)
    enough = -(-95 * len(paths) // 100)
    assert find_review(None, tmp_path, pd.Series(paths[:enough])).readings == shipped
    assert find_review(None, tmp_path, pd.Series(paths[: enough - 1])).readings == {}
    assert find_review(None, tmp_path, pd.Series(["train/NORMAL/other.jpeg"])).name == "no review table"


def test_the_shipped_table_has_the_counts_that_the_documentation_tells() -> None:
    shipped = read_review(SHIPPED_REVIEW, "s")
    normal = [device for path, device in shipped.items() if path.startswith("train/NORMAL/")]
    ill = [device for path, device in shipped.items() if path.startswith("train/PNEUMONIA/")]
    assert len(shipped) == 4808
    assert sum(normal) / len(normal) == pytest.approx(0.012, abs=0.001)
    assert sum(ill) / len(ill) == pytest.approx(0.53, abs=0.005)


# -- the stage ---------------------------------------------------------------------------------------------------------


def test_the_stage_lists_what_is_excluded_and_is_done_again_when_a_reading_changes(tmp_path: Path) -> None:
    run, own = tmp_path / "run", tmp_path / "device_review.csv"
    settings = Settings.model_validate({"run_dir": str(run), "storage": {"cache": str(tmp_path / "cache")}})
    manifest = table(("train/a", "1"), ("train/b", "2"), ("test/c", "3"))
    run.mkdir()
    seen = []
    for device_on_b in (0, 0, 1):
        review_file(own, f"path,device\ntrain/a,1\ntrain/b,{device_on_b}\ntest/c,1\n")
        write_manifest(run, manifest)
        facts = screen.fn(settings, str(tmp_path))
        seen.append((facts["reused"], facts["n_excluded"]))
    assert seen == [(False, 1), (True, 1), (False, 2)]
    assert (run / "excluded.csv").read_text() == f"path,reason\ntrain/a,{SHOWS_DEVICE}\ntrain/b,{SHOWS_DEVICE}\n"
    assert read_manifest(run)["has_device"].tolist() == [True, True, True]
