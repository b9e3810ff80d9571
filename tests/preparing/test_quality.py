"""Each data check can fail, alone; a warning is shown, a critical failure stops with the sentence."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

from tasks.errors import DataCheckError
from tasks.files import read_json, write_json
from tasks.pixels.looks import MEAN_CHEST
from tasks.pixels.masks import IMPLAUSIBLE
from tasks.preparing.quality import LUNGS, Checkpoint, add_facts, build_suite, check, describe_failure, run_checkpoint
from tasks.runs.manifest import MANIFEST_DTYPES, write_manifest
from tasks.runs.run import Run
from tasks.settings import QualitySettings, Settings

BOUNDS = QualitySettings()
Break = Callable[[pd.DataFrame], pd.DataFrame]


def sound(n: int = 5) -> pd.DataFrame:
    """A manifest of which every expectation holds: n images of each class in each split, a patient each."""
    rows = [
        {
            "path": f"{split}/{label}/{i}",
            "image_id": f"{split}{label}{i}",
            "sha256": f"{split}{label}{i}",
            "patient_id": f"{split}{label}{i}",
            "width_px": 100,
            "height_px": 100,
            "label": label,
            "subtype": ("normal", "virus")[label],
            "source_split": split,
            "split": split,
            "excluded": "",
            "has_device": False,
            "look": "",
            "lungs": True,
        }
        for split in ("train", "val", "test")
        for label in (0, 1)
        for i in range(n)
    ]
    return typed(pd.DataFrame(rows))


def typed(manifest: pd.DataFrame) -> pd.DataFrame:
    return manifest.astype({name: dtype for name, dtype in MANIFEST_DTYPES.items() if name in manifest})


def changed(path: str, **values: Any) -> Break:
    """Sets cells of one row; a source split is a split as well."""
    if "split" in values:
        values["source_split"] = values["split"]

    def apply(manifest: pd.DataFrame) -> pd.DataFrame:
        for name, value in values.items():
            manifest.loc[manifest["path"] == path, name] = value
        return manifest

    return apply


def without(start: str) -> Break:
    return lambda manifest: manifest[~manifest["path"].str.startswith(start)].reset_index(drop=True)


def both(first: Break, second: Break) -> Break:
    return lambda manifest: second(first(manifest))


def crowd(manifest: pd.DataFrame) -> pd.DataFrame:
    """31 more pictures of the first child."""
    more = pd.concat([manifest.head(1)] * 31).assign(
        **{name: [f"{name}{n}" for n in range(31)] for name in ("path", "image_id", "sha256")}
    )
    return pd.concat([manifest, more], ignore_index=True)


# The sentence of each expectation, and what breaks it and nothing else.
BREAKS: dict[str, Break] = {
    "every label is 0 or 1": changed("val/1/0", label=2),
    "every image has a label": changed("val/1/0", label=pd.NA),
    "every split is train, val or test": both(changed("val/1/0", split="later"), changed("val/0/0", split="later")),
    "every image has a split": changed("val/1/0", split=pd.NA),
    "every subtype is known": changed("val/1/0", subtype="fungus"),
    "label agrees with subtype": changed("val/1/0", subtype="normal"),
    "image ids are unique": changed("val/1/0", image_id="val11"),
    "no picture is in two splits": changed("val/1/0", sha256="test10"),
    "each split that exists has both classes": without("val/1"),
    "each class has 4 or more usable images in train and 1 in each other split": both(
        changed("train/1/0", excluded="duplicate of x"), changed("train/1/1", excluded="duplicate of y")
    ),
    "at most 1 % of the files are refused or do not decode": changed(
        "val/1/0", excluded="undecodable: is not a JPEG or PNG"
    ),
    "no patient has more than 30 images": crowd,
    "equal pictures have one label": changed("val/1/0", excluded="conflict: the same picture as x"),
    "width is 64 to 8,000 px": changed("val/1/0", width_px=63),
    "height is 64 to 8,000 px": changed("val/1/0", height_px=8001),
}
NO_FLAT = "no images are flat (nearly one shade)"
PREPARED_BREAKS: dict[str, Break] = {
    NO_FLAT: changed("val/1/0", look="flat"),
    "no images are saturated (mostly black and white)": changed("val/1/0", look="saturated"),
    "no images are inverted (white where X-rays are black) or on their side": changed("val/1/0", look="inverted"),
    "at most 5 % of the images are flat, saturated or inverted": both(
        changed("val/1/0", look="flat"), changed("test/1/0", look="flat")
    ),
    "train and val have usable images": without("val/"),
    "no patient is in both train and val": changed("val/1/0", patient_id="train10"),
    "no patient is in both train and test (the public set uses ids twice)": changed("test/1/0", patient_id="train10"),
    LUNGS: changed("val/1/0", lungs=False),
    "no training image is known to show a device": changed("train/1/0", has_device=True),
}
WARNINGS = {
    LUNGS,
    *(sentence for sentence in PREPARED_BREAKS if sentence.startswith("no images are ")),
    "no patient has more than 30 images",
    "equal pictures have one label",
    "width is 64 to 8,000 px",
    "height is 64 to 8,000 px",
    "no patient is in both train and test (the public set uses ids twice)",
}


def failing(manifest: pd.DataFrame, checkpoint: Checkpoint, out: Path) -> dict[str, dict[str, Any]]:
    looks = {} if checkpoint == "source" else dict(zip(manifest["image_id"], manifest["look"], strict=True))
    lungless = set(manifest.loc[~manifest["lungs"], "image_id"]) if checkpoint == "prepared" else ()
    results = run_checkpoint(add_facts(manifest, checkpoint, BOUNDS, looks, lungless), checkpoint, BOUNDS, out)
    return {item["says"]: item for item in results if not item["success"]}


def says(checkpoint: Checkpoint) -> list[str]:
    return [
        expectation.meta["says"]
        for expectation in build_suite(add_facts(sound(), checkpoint, BOUNDS, {}), checkpoint, BOUNDS)
    ]


def test_every_expectation_of_both_checkpoints_has_a_way_to_fail_below() -> None:
    assert sorted(says("source")) == sorted(BREAKS)
    assert sorted(says("prepared")) == sorted({**BREAKS, **PREPARED_BREAKS})


@pytest.mark.parametrize("checkpoint", ["source", "prepared"])
def test_a_sound_manifest_fails_nothing(checkpoint: Checkpoint, tmp_path: Path) -> None:
    assert failing(sound(), checkpoint, tmp_path) == {}


@pytest.mark.parametrize("sentence", list(BREAKS))
def test_each_expectation_of_the_source_checkpoint_fails_alone(sentence: str, tmp_path: Path) -> None:
    found = failing(BREAKS[sentence](sound()), "source", tmp_path)
    assert list(found) == [sentence]
    assert found[sentence]["severity"] == ("warning" if sentence in WARNINGS else "critical")
    assert found[sentence]["n_unexpected"] >= 1


@pytest.mark.parametrize("sentence", list(PREPARED_BREAKS))
def test_each_expectation_of_the_prepared_checkpoint_alone_fails_alone(sentence: str, tmp_path: Path) -> None:
    found = failing(PREPARED_BREAKS[sentence](sound()), "prepared", tmp_path)
    assert list(found) in ([sentence], [NO_FLAT, sentence])
    assert found[sentence]["severity"] == ("warning" if sentence in WARNINGS else "critical")


def test_a_failure_counts_rows_and_names_some_of_them(tmp_path: Path) -> None:
    manifest = sound()
    manifest.loc[manifest["path"].str.startswith("test/1"), "width_px"] = 10
    found = failing(manifest, "source", tmp_path)["width is 64 to 8,000 px"]
    assert (found["n"], found["n_unexpected"]) == (30, 5)
    ids = "such as image test10, image test11, image test12"
    assert describe_failure(found, manifest).endswith(f"fails in 5 of 30 rows, {ids}")


def test_results_and_data_docs_are_written(tmp_path: Path) -> None:
    failing(sound(), "source", tmp_path)
    assert read_json(tmp_path / "result.json")["success"] is True
    assert (tmp_path / "data_docs" / "index.html").is_file()


def test_rows_that_are_not_usable_count_for_no_class_split_or_patient() -> None:
    table = add_facts(changed("train/1/0", excluded="duplicate of x")(sound()), "prepared", BOUNDS, {}).set_index(
        "image_id"
    )
    assert table.loc["train10", ["n_of_class", "n_classes", "n_splits_of_picture", "n_splits_train_val"]].isna().all()
    assert table.loc["train11", "n_of_class"] == 4


def test_the_source_checkpoint_looks_at_the_splits_as_they_came() -> None:
    manifest = sound()
    manifest["split"] = pd.NA
    assert add_facts(manifest, "source", BOUNDS, {})["split"].tolist() == sound()["source_split"].tolist()
    assert add_facts(manifest, "prepared", BOUNDS, {})["split"].isna().all()


def test_a_training_split_of_which_all_images_are_excluded_fails_the_prepared_checkpoint(tmp_path: Path) -> None:
    manifest = sound()
    manifest.loc[manifest["split"] == "train", "excluded"] = "shows a medical device (reviewed)"
    assert list(failing(manifest, "prepared", tmp_path)) == ["train and val have usable images"]


# -- the stage ---------------------------------------------------------------------------------------------------------


def pack_pixels(tmp_path: Path, rows: dict[str, NDArray[np.uint8]], lungless: dict[str, str] | None = None) -> None:
    """Writes packed pixels by image id, as packing does, and which of them show no lungs and why."""
    for folder in (tmp_path / "cache" / "arrays", tmp_path / "run" / "arrays"):
        folder.mkdir(parents=True, exist_ok=True)
    name = f"arrays/{hashlib.sha256(b''.join(pixels.tobytes() for pixels in rows.values())).hexdigest()}.npy"
    np.save(tmp_path / "cache" / name, np.stack(list(rows.values())) if rows else np.empty((0, 224, 224), np.uint8))
    images = {image: [0, row] for row, image in enumerate(rows)}
    index = {"side_px": 224, "shards": [{"name": name}], "images": images}
    (tmp_path / "run" / "arrays" / "index.json").write_text(json.dumps(index))
    write_json(tmp_path / "run" / IMPLAUSIBLE, lungless or {})


def checked(tmp_path: Path, manifest: pd.DataFrame, checkpoint: Checkpoint = "source") -> dict[str, Any]:
    run = tmp_path / "run"
    run.mkdir(exist_ok=True)
    write_manifest(run, manifest)
    return check.fn(
        Run(Settings.model_validate({"run_dir": str(run), "storage": {"cache": str(tmp_path / "cache")}})), checkpoint
    )


def test_a_warning_is_shown_and_stops_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = checked(tmp_path, BREAKS["equal pictures have one label"](sound()))
    assert [item["says"] for item in facts["checks"] if not item["success"]] == ["equal pictures have one label"]
    shown = capsys.readouterr().out
    assert "warning: equal pictures have one label fails in 1 of 30 rows, such as image val10" in shown
    assert f"{len(BREAKS) - 1} of {len(BREAKS)} expectations hold" in shown


def test_a_critical_failure_stops_with_the_sentence_and_leaves_its_results(tmp_path: Path) -> None:
    manifest = BREAKS["every label is 0 or 1"](sound())
    for _ in range(2):  # taken from the cache, it stops as well
        with pytest.raises(DataCheckError) as caught:
            checked(tmp_path, manifest)
        assert "every label is 0 or 1 fails in 1 of 30 rows, such as val/1/0" in str(caught.value)
        assert "checkpoint source" in str(caught.value)
        assert "\n" not in str(caught.value)
    summary = read_json(tmp_path / "run" / "checks" / "source" / "summary.json")
    assert [item["says"] for item in summary if not item["success"]] == ["every label is 0 or 1"]
    assert (tmp_path / "run" / "checks" / "source" / "result.json").is_file()
    assert (tmp_path / "run" / "checks" / "source" / "data_docs" / "index.html").is_file()


def test_the_two_checkpoints_of_a_run_keep_their_results_apart(tmp_path: Path) -> None:
    pack_pixels(tmp_path, {})
    pack_pixels(tmp_path, {})
    checked(tmp_path, sound(), "source")
    checked(tmp_path, sound(), "prepared")
    assert sorted(p.name for p in (tmp_path / "run" / "checks").iterdir()) == ["prepared", "source"]


def test_a_contradiction_within_test_is_warned_of_although_both_files_stay(tmp_path: Path) -> None:
    manifest = changed("test/1/0", sha256="test00")(sound())
    assert list(failing(manifest, "source", tmp_path)) == ["equal pictures have one label"]


@pytest.mark.parametrize(("own_patients", "severity"), [(False, "warning"), (True, "critical")])
def test_a_patient_in_train_and_test_is_critical_where_an_index_names_patients(
    own_patients: bool, severity: str, tmp_path: Path
) -> None:
    manifest = changed("test/1/0", patient_id="train10")(sound())
    results = run_checkpoint(add_facts(manifest, "prepared", BOUNDS, {}), "prepared", BOUNDS, tmp_path, own_patients)
    assert [item["severity"] for item in results if not item["success"]] == [severity]


def test_a_failed_check_of_broken_files_names_one_for_each_reason(tmp_path: Path) -> None:
    manifest = sound()
    pointer, page = "undecodable: is a Git LFS pointer; fetch it", "undecodable: is an HTML page"
    manifest.loc[manifest["path"].str.startswith("test/1"), "excluded"] = pointer
    manifest.loc[manifest["path"] == "val/1/0", "excluded"] = page
    with pytest.raises(DataCheckError) as caught:
        checked(tmp_path, manifest)
    assert (
        f"at most 1 % of the files are refused or do not decode fails in 6 of 30 rows, such as test/1/0 ({pointer}), "
        f"val/1/0 ({page}), test/1/1 ({pointer})"
    ) in str(caught.value)


def test_pixels_that_cannot_be_an_x_ray_as_it_is_are_named_by_their_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest, chest = sound(), np.kron(MEAN_CHEST * 5 + 100, np.ones((32, 32))).astype(np.uint8)
    rows = dict.fromkeys(manifest["image_id"], chest) | {"val10": 255 - chest}
    pack_pixels(tmp_path, rows)
    checked(tmp_path, manifest, "prepared")
    shown = capsys.readouterr().out
    assert "warning: no images are inverted (white where X-rays are black) or on their side fails in 1 of" in shown
    assert "such as val/1/0\n" in shown
    pack_pixels(tmp_path, rows | dict.fromkeys(list(rows)[:3], chest // 16))
    with pytest.raises(DataCheckError, match="at most 5 % of the images are flat, saturated or inverted fails in 4 of"):
        checked(tmp_path, manifest, "prepared")


def test_images_without_two_plausible_lungs_are_named_by_their_files_and_stop_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest, chest = sound(), np.kron(MEAN_CHEST * 5 + 100, np.ones((32, 32))).astype(np.uint8)
    pack_pixels(tmp_path, dict.fromkeys(manifest["image_id"], chest), {"val10": "why", "test01": "why"})
    checked(tmp_path, manifest, "prepared")
    shown = capsys.readouterr().out
    assert f"warning: {LUNGS} fails in 2 of 30 rows, such as test/0/1, val/1/0\n" in shown


# -- unknown patients --------------------------------------------------------------------------------------------------

TRAIN_VAL, TRAIN_TEST = (says for says in PREPARED_BREAKS if says.startswith("no patient is in both"))


def judged(manifest: pd.DataFrame, out: Path) -> dict[str, dict[str, Any]]:
    rows = run_checkpoint(add_facts(manifest, "prepared", BOUNDS, {}), "prepared", BOUNDS, out)
    return {row["says"]: row for row in rows if row["says"] in (TRAIN_VAL, TRAIN_TEST)}


def test_with_an_unknown_patient_it_is_not_judged_whether_one_is_in_two_splits(tmp_path: Path) -> None:
    found = judged(changed("train/1/0", patient_id=pd.NA)(sound()), tmp_path)
    for row in found.values():
        assert (row["success"], row["reason"]) == (None, "the patient of 1 of 20 images is not known")


def test_only_the_splits_with_unknown_patients_are_not_judged_and_excluded_images_do_not_count(tmp_path: Path) -> None:
    unknown = changed("train/1/0", patient_id=pd.NA, excluded="duplicate of x")
    found = judged(both(unknown, changed("test/1/0", patient_id=pd.NA))(sound()), tmp_path)
    assert (found[TRAIN_VAL]["success"], found[TRAIN_TEST]["success"]) == (True, None)


def test_a_known_patient_in_two_splits_fails_although_others_are_unknown(tmp_path: Path) -> None:
    breaks = both(PREPARED_BREAKS[TRAIN_VAL], changed("train/0/0", patient_id=pd.NA))
    found = judged(breaks(sound()), tmp_path)
    assert (found[TRAIN_VAL]["success"], found[TRAIN_VAL]["n_unexpected"]) == (False, 2)


def test_what_is_not_judged_is_said_and_stops_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest, chest = sound(), np.kron(MEAN_CHEST * 5 + 100, np.ones((32, 32))).astype(np.uint8)
    pack_pixels(tmp_path, dict.fromkeys(manifest["image_id"], chest))
    checked(tmp_path, changed("val/1/0", patient_id=pd.NA)(manifest), "prepared")
    shown = capsys.readouterr().out
    assert f"not judged: {TRAIN_VAL}: the patient of 1 of 20 images is not known" in shown
    assert "expectations hold, 1 cannot be judged" in shown


def test_a_source_of_one_patient_alone_is_refused_in_words(tmp_path: Path) -> None:
    manifest = sound()
    own = manifest["split"] != "test"
    manifest.loc[own, "patient_id"], manifest.loc[own, "split"] = "person1", "val"
    checks = run_checkpoint(add_facts(manifest, "prepared", BOUNDS, {}), "prepared", BOUNDS, tmp_path)
    failed = [describe_failure(item, manifest) for item in checks if item["success"] is False]
    assert any(sentence.startswith("train and val have usable images fails") for sentence in failed)
