"""Whose image a file is: by names that nearly all fit, by a setting, or unknown."""

from typing import Any

import pandas as pd
import pytest
from pydantic import ValidationError

from tasks.errors import SettingsError
from tasks.preparing.patients import PATTERNS, add_patients, describe_patients
from tasks.settings import PATTERN_NAMES, IngestionSettings


def patients(paths: list[str], wanted: str | None = None) -> list[Any]:
    table, _ = add_patients(pd.DataFrame({"path": paths}), wanted, False)
    return [None if pd.isna(patient) else patient for patient in table["patient_id"]]


@pytest.mark.parametrize(
    ("path", "patient"),
    [
        ("train/PNEUMONIA/person12_virus_3.jpeg", "person12"),
        ("test/PNEUMONIA/person1000_virus_1681.jpeg", "person1000"),
        ("train/NORMAL/IM-0115-0001.jpeg", "IM-0115"),
        ("train/NORMAL/IM-0115-0001-0002.jpeg", "IM-0115"),
        ("train/NORMAL/NORMAL2-IM-0115-0001.jpeg", "NORMAL2-IM-0115"),
        ("train/PNEUMONIA/Person12_Virus_3.JPEG", "person12"),
        ("train/PNEUMONIA/aug_1_person12_virus_3.jpeg", "person12"),
        ("train/PNEUMONIA/person12_virus_3_aug2.png", "person12"),
        ("train/PNEUMONIA/person12_virus_3 (1).jpeg", "person12"),
        ("train/PNEUMONIA/Copy of person12_virus_3.jpeg", "person12"),
        ("train/PNEUMONIA/person12_virus_3_jpeg.rf.0a1b2c3d.jpg", "person12"),
        ("train/PNEUMONIA/person-12-virus-3.jpeg", "person12"),
        ("train/NORMAL/NORMAL_original_IM-0115-0001.jpeg_5b-7c.jpeg", "IM-0115"),
        ("train/NORMAL/aug_0_normal2_im_0115_0001.png", "NORMAL2-IM-0115"),
        ("train/NORMAL/a person.jpeg", None),
        ("train/NORMAL/chest 7.jpeg", None),
        ("train/NORMAL/a.b.jpeg", None),
    ],
)
def test_names_of_the_public_archive_and_of_its_copies_tell_the_patient(path: str, patient: str | None) -> None:
    assert patients([path, *["train/PNEUMONIA/person1_virus_1.jpeg"] * 20])[0] == patient


@pytest.mark.parametrize(
    ("paths", "patient"),
    [
        (["BACTERIA-1003233-0002.jpeg", "VIRUS-1003233-0001.jpeg", "aug_3_normal-1003233-0001.png"], "1003233"),
    ],
)
def test_other_archives_are_known_by_their_names(paths: list[str], patient: str) -> None:
    assert patients(paths) == [patient] * len(paths)


def test_an_ambiguous_pattern_counts_only_when_a_setting_names_it() -> None:
    paths = ["images/00000013_005.png", "images/00000013_006.png", "images/00000014_000.png"]
    assert patients(paths) == [None] * 3
    assert patients(paths, "nih") == ["00000013", "00000013", "00000014"]


def test_an_export_of_a_viewer_is_not_taken_for_the_public_archive() -> None:
    paths = ["smith/IM-0001-0001.jpeg", "jones/IM-0001-0001.jpeg"]
    assert patients(paths) == [None, None]
    assert patients(paths, "public") == ["IM-0001", "IM-0001"]


@pytest.mark.parametrize(("n_other", "known"), [(5, 95), (6, 0)])
def test_a_pattern_counts_only_if_nearly_all_names_fit_it(n_other: int, known: int) -> None:
    paths = [f"person{i}_virus_1.jpeg" for i in range(100 - n_other)] + [f"x{i}.jpeg" for i in range(n_other)]
    assert sum(patient is not None for patient in patients(paths)) == known


def test_a_setting_can_say_that_names_tell_no_patient() -> None:
    assert patients(["person1_virus_1.jpeg"], "none") == [None]


def test_an_expression_of_ones_own_takes_its_group_and_what_it_does_not_fit_is_unknown() -> None:
    paths = ["a/kid-7-x.png", "a/kid-8-x.png", "a/other.png", "a/kid-NA-x.png"]
    assert patients(paths, r"kid-(\w+)-") == ["7", "8", None, None]
    assert patients(paths, r"(kid|child)-(?P<patient>\d+)") == ["7", "8", None, None]


def test_an_index_is_taken_at_its_word_unless_a_setting_says_how_names_tell_what_it_leaves_out() -> None:
    table = pd.DataFrame({"path": ["person1_virus_1.png", "person2_virus_1.png"], "patient_id": ["p", pd.NA]})
    for wanted, second, by in (
        (None, None, "index.csv or PatientID in DICOM files"),
        ("public", "person2", f"index.csv or PatientID in DICOM files, else {PATTERNS['public'].says}"),
    ):
        found, facts = add_patients(table.astype("string"), wanted, True)
        assert found["patient_id"].fillna("?").tolist() == ["p", second or "?"]
        assert facts["by"] == by


@pytest.mark.parametrize("wanted", ["nih", r"child(\d+)"])
def test_a_setting_that_fits_no_name_is_refused(wanted: str) -> None:
    with pytest.raises(SettingsError, match=r"^ingestion\.patients: not one of the 1 images fits "):
        patients(["x.png"], wanted)


@pytest.mark.parametrize("text", ["", "person", "nihh", "(", r"person\d+", "(a" * 90, "(x)" * 101])
def test_what_is_neither_a_pattern_nor_an_expression_with_a_group_is_refused(text: str) -> None:
    with pytest.raises(ValidationError):
        IngestionSettings(patients=text)


def test_the_log_says_what_told_the_patients_and_how_many_are_unknown() -> None:
    _, found = add_patients(pd.DataFrame({"path": ["person1_virus_1.png"] * 39 + ["x.png"]}), None, False)
    first, second = describe_patients(found, 1, 40)
    assert first == f"patients: by {PATTERNS['public'].says}, of 39 of 40 images"
    assert second.startswith("warning: the patient of 1 of 40 images is not known")
    _, found = add_patients(pd.DataFrame({"path": ["x.png"]}), None, False)
    assert describe_patients(found, 1, 1)[0].startswith("patients: by nothing (no known pattern of names fits 95 %")


@pytest.mark.parametrize(("wanted", "own"), [(None, False), ("public", False), (r"person(\d+)", True)])
def test_only_the_public_numbers_may_stand_for_two_children(wanted: str | None, own: bool) -> None:
    _, found = add_patients(pd.DataFrame({"path": ["person1_virus_1.png"]}), wanted, False)
    assert found["own"] is own


def test_the_settings_know_the_patterns_of_the_table() -> None:
    assert (*PATTERNS, "none") == PATTERN_NAMES
