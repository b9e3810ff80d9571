"""Scores measured against labels: joined by path, refused images apart, figures by group, nothing left out unsaid."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from tasks.errors import TableError
from tasks.scoring.labelled import LabelRow, join_labels, measure_labelled, read_labels
from tasks.settings import EvaluationSettings, Settings

SETTINGS = Settings(evaluation=EvaluationSettings(n_bootstrap=50))


def scores_of(n: int) -> pd.DataFrame:
    """A table of scores, as text; of every tenth image no number, every tenth refused with its numbers."""
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"path": [f"a/{i:03}.png" for i in range(n)]})
    table["probability"] = [f"{p:.6f}" for p in rng.random(n)]
    table["device_score"] = [f"{p:.6f}" for p in rng.random(n)]
    table["refused"] = ["unlike" if i % 10 in (3, 7) else "" for i in range(n)]
    table.loc[np.arange(n) % 10 == 7, ["probability", "device_score"]] = ""
    return table


def row_of(*cells: str) -> LabelRow:
    return LabelRow(*cells)  # type: ignore[arg-type]


def test_labels_are_joined_by_path_whatever_system_wrote_it_and_patients_are_kept_apart() -> None:
    rows = [row_of("A\\000.png", "Pneumonia", "7", "icu"), row_of("a/001.png", "0"), row_of("b", "1")]
    joined = join_labels(rows, "labels.csv", scores_of(4), 0.5)
    assert joined["path"].tolist() == ["a/000.png", "a/001.png"]
    assert joined["label"].tolist() == [1, 0]
    assert joined["group"].tolist() == ["icu", "unknown"]
    assert joined["knows_patient"].tolist() == [True, False] and joined["group_id"].nunique() == 2


@pytest.mark.parametrize(
    ("paths", "says"),
    [
        (["x.png"], "none of its 1 paths is an image"),
        (["a/000.png", "A/000.PNG"], "lists 'a/000.png' twice"),
        (["a/000.png", "x.png"], "1 of 2 paths name no file"),
    ],
)
def test_labels_that_fit_no_image_or_one_twice_are_refused(paths: list[str], says: str) -> None:
    with pytest.raises(TableError, match=says):
        join_labels([row_of(path, "1") for path in paths], "labels.csv", scores_of(4), 0.05)


def test_a_table_without_rows_or_with_another_label_is_refused(tmp_path: Path) -> None:
    table = tmp_path / "labels.csv"
    table.write_text("path,label\n")
    with pytest.raises(TableError, match="lists no image; add a line per image"):
        read_labels(str(table))
    table.write_text("path,label\na.png,sick\n")
    with pytest.raises(TableError, match="has label = 'sick'"):
        read_labels(str(table))


def test_figures_are_of_all_that_was_read_of_what_was_answered_and_of_each_group() -> None:
    n = 200
    scores = scores_of(n)
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, n)
    words = np.array(["0", "1"])[labels]
    rows = [
        row_of(path, label, f"p{i // 2}", f"g{i % 3}")
        for i, (path, label) in enumerate(zip(scores["path"], words, strict=True))
    ]
    found = measure_labelled(join_labels(rows, "labels.csv", scores, 0), 0.4, SETTINGS)
    assert (found["n_unread"], found["n_refused"], found["n_no_patient"]) == (20, 20, 0)
    assert found["all"]["n"] == 180 and found["answered"]["n"] == found["calibration"]["n"] == 160
    at = (scores["refused"] == "").to_numpy()
    probabilities = scores["probability"][at].astype(float)
    assert found["answered"]["auc"]["value"] == pytest.approx(roc_auc_score(labels[at], probabilities), abs=1e-4)
    assert found["answered"]["sensitivity"]["value"] == pytest.approx(
        (probabilities[labels[at] == 1] >= 0.4).mean(), abs=1e-4
    )
    assert found["device_free"]["n"] + found["with_device"]["n"] == 160
    assert sum(group["n"] for group in found["by_group"].values()) == 160 and list(found["by_group"]) == [
        "g0",
        "g1",
        "g2",
    ]
    assert found["answered"]["n_patients"] <= 100
