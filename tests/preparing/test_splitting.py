"""Validation is whole patients, drawn by a hash that knows nothing of the others; test is never touched."""

from pathlib import Path

import pandas as pd
import pytest

from tasks.preparing.splitting import count_splits, draw_splits, patient_rank, split
from tasks.runs.manifest import read_manifest, write_manifest
from tasks.runs.run import Run
from tasks.settings import Settings, SplittingSettings

DEFAULT = SplittingSettings()


def children(n: int, start: int = 0, n_images: int = 3) -> pd.DataFrame:
    """Patients with images of one class each, in train and val alternately, and as many in test."""
    rows = [
        {
            "path": f"{source}/{child}/{k}",
            "source_split": source,
            "group_id": f"{'t' if source == 'test' else 'p'}{child}",
            "label": child % 2,
            "excluded": "",
        }
        for child in range(start, start + n)
        for k in range(n_images)
        for source in (("train", "val")[k % 2], "test")
    ]
    return pd.DataFrame(rows)


def splits_of(manifest: pd.DataFrame, settings: SplittingSettings = DEFAULT) -> dict[str, str]:
    out = draw_splits(manifest, settings)
    return dict(zip(out["path"], out["split"], strict=True))


def val_patients(manifest: pd.DataFrame, settings: SplittingSettings = DEFAULT) -> set[str]:
    out = draw_splits(manifest, settings)
    return set(out.loc[out["split"] == "val", "group_id"])


def test_no_patient_is_in_both_train_and_val() -> None:
    out = draw_splits(children(300), DEFAULT)
    outside = out[out["split"] != "test"]
    assert (outside.groupby("group_id")["split"].nunique() == 1).all()
    assert set(outside["split"]) == {"train", "val"}


def test_test_is_exactly_what_the_source_calls_test() -> None:
    out = draw_splits(children(100), DEFAULT)
    assert ((out["split"] == "test") == (out["source_split"] == "test")).all()


def test_a_patient_number_that_test_uses_too_moves_nothing_in_test() -> None:
    manifest = children(100).assign(group_id=lambda t: t["group_id"].str[1:])
    out = draw_splits(manifest, DEFAULT)
    assert ((out["split"] == "test") == (out["source_split"] == "test")).all()


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.3])
def test_about_the_wanted_share_of_patients_is_in_val(fraction: float) -> None:
    n_val = len(val_patients(children(2_000, n_images=1), SplittingSettings(val_fraction=fraction)))
    assert n_val / 2_000 == pytest.approx(fraction, abs=0.02)


def test_more_patients_move_nobody_between_train_and_val() -> None:
    few, more = children(400), pd.concat([children(400), children(20, start=400)])
    before, after = splits_of(few), splits_of(more)
    assert {path: after[path] for path in before} == before


def test_patients_that_leave_move_nobody_else() -> None:
    all_of_them, rest = splits_of(children(400)), splits_of(children(300, start=100))
    assert rest == {path: all_of_them[path] for path in rest}


def test_the_order_of_rows_and_the_time_of_day_do_not_matter() -> None:
    manifest = children(100)
    assert splits_of(manifest) == splits_of(manifest) == splits_of(manifest.sample(frac=1, random_state=1))


def test_the_rank_of_a_patient_is_the_same_on_every_machine() -> None:
    assert patient_rank("person1", "x_ray_classification") == pytest.approx(0.9542559, abs=1e-6)


def test_another_salt_is_another_draw() -> None:
    first, second = (val_patients(children(400), SplittingSettings(salt=salt)) for salt in ("a", "b"))
    assert first != second


def test_a_larger_fraction_keeps_the_patients_of_the_smaller_one() -> None:
    small, large = (val_patients(children(400), SplittingSettings(val_fraction=f)) for f in (0.1, 0.2))
    assert small < large


def lowest(names: list[str]) -> str:
    return min(names, key=lambda name: patient_rank(name, DEFAULT.salt))


def above(n: int) -> list[str]:
    """Patients that their hash leaves in train."""
    return [f"q{i}" for i in range(1_000) if patient_rank(f"q{i}", DEFAULT.salt) >= DEFAULT.val_fraction][:n]


def test_a_class_with_nobody_in_val_sends_its_patient_with_the_lowest_hash() -> None:
    names = above(8)
    rows = [
        {"path": name, "source_split": "train", "group_id": name, "label": i % 2, "excluded": ""}
        for i, name in enumerate(names)
    ]
    assert val_patients(pd.DataFrame(rows)) == {lowest(names[0::2]), lowest(names[1::2])}


def test_a_patient_whose_images_are_all_excluded_does_not_stand_for_its_class_in_val() -> None:
    a, b, c = sorted(above(3), key=lambda name: patient_rank(name, DEFAULT.salt))
    rows = [
        {"path": name, "source_split": "train", "group_id": name, "label": 1, "excluded": reason}
        for name, reason in ((a, "duplicate of x"), (b, ""), (c, ""))
    ]
    assert val_patients(pd.DataFrame(rows)) == {b}


def test_a_source_with_test_images_only_is_all_test() -> None:
    manifest = children(10)
    assert set(splits_of(manifest[manifest["source_split"] == "test"]).values()) == {"test"}


def test_the_manifest_that_is_given_is_not_changed() -> None:
    manifest = children(10)
    before = manifest.copy()
    draw_splits(manifest, DEFAULT)
    pd.testing.assert_frame_equal(manifest, before)


def test_counts_are_of_usable_images_and_their_patients() -> None:
    rows = [
        {"split": "train", "label": 1, "patient_id": "a", "excluded": ""},
        {"split": "train", "label": 1, "patient_id": "a", "excluded": ""},
        {"split": "train", "label": 1, "patient_id": "b", "excluded": "duplicate of x"},
        {"split": "val", "label": 0, "patient_id": "c", "excluded": ""},
    ]
    assert count_splits(pd.DataFrame(rows)) == [
        {"split": "train", "class": "pneumonia", "images": 2, "patients": 1},
        {"split": "val", "class": "normal", "images": 1, "patients": 1},
    ]


def test_the_stage_fills_the_split_in_the_run_folder_and_is_reused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    write_manifest(tmp_path / "run", children(30))
    settings = Settings.model_validate(
        {"run_dir": str(tmp_path / "run"), "storage": {"cache": str(tmp_path / "cache")}}
    )
    assert split.fn(Run(settings))["reused"] is False
    out = read_manifest(tmp_path / "run")
    assert dict(zip(out["path"], out["split"], strict=True)) == splits_of(children(30))
    other = settings.model_copy(update={"splitting": SplittingSettings(salt="other")})
    assert split.fn(Run(other))["reused"] is False
