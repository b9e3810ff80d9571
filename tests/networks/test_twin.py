"""The model learns from screened images; its twin from as many that were not screened, and nothing else differs."""

from pathlib import Path

import pandas as pd
import pytest

from tasks.explaining.subjects import read_threshold_of
from tasks.files import write_json
from tasks.networks.twin import USED_COLUMNS, stage_name, used_rows, work_folder
from tasks.records import DEVICE_REASONS, FOREIGN, MODEL, READ_DEVICE, TITLES, TWIN
from tasks.settings import Settings

OTHER_REASONS = ("duplicate of train/a.jpeg", "does not decode (truncated)", "not enough contrast")


def manifest() -> pd.DataFrame:
    """Train: 20 normal, of which 2 show a device, 40 pneumonia, of which 25 do, and some that are no use to anybody."""
    rows = []
    for split, label, reasons in (
        ("train", 0, [""] * 18 + [READ_DEVICE] * 2),
        ("train", 1, [""] * 15 + [DEVICE_REASONS[i % 3] for i in range(25)]),
        ("train", 1, list(OTHER_REASONS) * 2),
        ("train", 0, list(OTHER_REASONS)),
        ("val", 0, [""] * 4 + ["duplicate of val/b.jpeg"]),
        ("val", 1, [""] * 6),
        ("test", 1, [""] * 5 + [READ_DEVICE]),
        (None, 1, ["does not decode (empty)"]),
    ):
        rows += [{"split": split, "label": label, "excluded": reason or None} for reason in reasons]
    table = pd.DataFrame(rows).astype({"split": "string", "label": "Int8", "excluded": "string"})
    table["image_id"] = pd.array([f"{i:016x}" for i in range(len(table))], dtype="string")
    table["sha256"] = table["image_id"] + "0" * 48
    table["subtype"] = pd.array(["unknown"] * len(table), dtype="string")
    return table


def ids(rows: pd.DataFrame) -> list[str]:
    return [str(image) for image in rows["image_id"]]


def excluded(table: pd.DataFrame, rows: pd.DataFrame) -> "pd.Series[str]":
    return table.set_index("image_id").loc[ids(rows), "excluded"].fillna("")


def test_the_model_uses_exactly_the_usable_rows_of_train_and_val() -> None:
    table = manifest()
    used = used_rows(table)
    clean = table[table["excluded"].isna() & table["split"].isin(["train", "val"])]
    assert ids(used) == ids(clean) and len(used) == 18 + 15 + 4 + 6
    assert list(used.columns) == USED_COLUMNS


def test_an_empty_reason_counts_as_none() -> None:
    table = manifest()
    assert ids(used_rows(table.assign(excluded=table["excluded"].fillna("")))) == ids(used_rows(table))


def counts(rows: pd.DataFrame) -> dict[tuple[str, int], int]:
    return {(str(split), int(label)): len(part) for (split, label), part in rows.groupby(["split", "label"])}


@pytest.mark.parametrize("seed", range(5))
def test_the_twin_has_as_many_images_of_each_class_and_the_same_validation(seed: int) -> None:
    table = manifest()
    model, twin = used_rows(table), used_rows(table, TWIN, seed)
    assert counts(twin) == counts(model)
    assert ids(twin[twin["split"] == "val"]) == ids(model[model["split"] == "val"])
    assert list(twin.columns) == USED_COLUMNS
    assert twin["image_id"].is_unique and twin.index.is_monotonic_increasing


@pytest.mark.parametrize("seed", range(5))
def test_the_twin_draws_from_images_with_devices_too_and_never_from_those_left_out_for_another_reason(
    seed: int,
) -> None:
    table = manifest()
    reasons = excluded(table, used_rows(table, TWIN, seed))
    assert set(reasons) <= {"", *DEVICE_REASONS}
    with_device = reasons.isin(DEVICE_REASONS).sum()
    assert 3 <= with_device <= 14, "about 15 of 25 in 40 of pneumonia; the model has none"


def test_over_seeds_each_image_that_was_usable_before_screening_is_drawn() -> None:
    table = manifest()
    reasons = table["excluded"].fillna("")
    pool = table[(table["split"] == "train") & reasons.isin(["", *DEVICE_REASONS])]
    drawn = set().union(*(ids(used_rows(table, TWIN, seed)) for seed in range(15)))
    assert set(ids(pool)) <= drawn


def test_the_twin_s_draw_follows_the_seed() -> None:
    table = manifest()
    first, again, other = (ids(used_rows(table, TWIN, seed)) for seed in (1, 1, 2))
    assert first == again and first != other


def test_where_screening_left_nothing_out_the_twin_learns_from_the_same_rows() -> None:
    table = manifest()
    table = table[~table["excluded"].isin(DEVICE_REASONS)]
    assert ids(used_rows(table, TWIN, 3)) == ids(used_rows(table))


def test_a_twin_is_compared_only_where_the_settings_ask_for_it() -> None:
    assert Settings().networks == (MODEL,)
    assert Settings.model_validate({"auditing": {"compare_unfiltered": True}}).networks == (MODEL, TWIN)
    assert set(TITLES) == {MODEL, TWIN, FOREIGN}


def test_the_twin_s_work_lies_apart_from_the_model_s(tmp_path: Path) -> None:
    assert work_folder(tmp_path, MODEL) == tmp_path and work_folder(tmp_path, TWIN) == tmp_path / TWIN
    assert stage_name("fit", MODEL) == "fit" and stage_name("fit", TWIN) != "fit"


def test_the_model_s_threshold_is_that_of_its_metrics_and_the_twin_s_is_chosen_from_its_shifts(tmp_path: Path) -> None:
    write_json(tmp_path / "metrics.json", {"threshold": 0.41})
    (tmp_path / TWIN).mkdir()
    shifts = pd.DataFrame({"shift": "as it is", "label": [0, 0, 1], "probability": [0.1, 0.2, 0.8]})
    shifts.to_csv(tmp_path / TWIN / "shifts.csv", index=False)
    assert read_threshold_of(tmp_path, MODEL) == 0.41
    assert read_threshold_of(tmp_path, TWIN) == pytest.approx(0.5)
