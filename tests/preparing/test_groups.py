"""DICOM files are a source of training data; of their tags a run keeps a pseudonym and the groups asked for."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from dicom_files import SYNTAXES, draw, make_dicom
from stage_steps import ingest_all

from tasks.errors import TableError
from tasks.preparing.groups import add_tags, measure_association
from tasks.preparing.patients import add_patients
from tasks.preparing.quality import add_facts, run_checkpoint
from tasks.runs.run import Run
from tasks.settings import QualitySettings, Settings

CLASSES = ("NORMAL", "PNEUMONIA")


def write_set(folder: Path, n: int = 2, **tags: Any) -> Path:
    """A data set of DICOM files in folders, n of each class in train and test; sites and patients differ."""
    for split in ("train", "test"):
        for label, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True)
            for i in range(n):
                more = {
                    "PatientID": f"{split}-{label}-{i}",
                    "InstitutionName": f"House {label}",
                    "PatientSex": "MF"[i % 2],
                }
                pixels = draw(i + 10 * label + 100 * (split == "test"), height_px=96)
                data = make_dicom(pixels, SYNTAXES[i % len(SYNTAXES)], **more | tags)
                (folder / split / name / f"{i}").write_bytes(data)
    return folder


def ingested(tmp_path: Path, source: Path, **ingestion: Any) -> tuple[pd.DataFrame, dict[str, Any]]:
    places = {"cache": str(tmp_path / "cache"), "raw": str(tmp_path / "raw")}
    settings = Settings(source=str(source), run_dir=str(tmp_path / "run"), storage=places, ingestion=ingestion)
    facts = ingest_all(settings)
    return Run(settings).manifest(), facts


def test_dicom_files_without_endings_are_listed_with_pseudonyms_of_their_patients(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_set(tmp_path / "set", BurnedInAnnotation="YES", PatientName="Planted^Name")
    (source / "train" / "DICOMDIR").write_bytes(make_dicom(draw(), SOPClassUID="1.2.840.10008.1.3.10"))
    state = make_dicom(draw(), SOPClassUID="1.2.840.10008.5.1.4.1.1.11.1")
    (source / "train" / "NORMAL" / "state.dcm").write_bytes(state)
    manifest, facts = ingested(tmp_path, source)
    assert len(manifest) == 8 and (manifest["excluded"] == "").all() and (manifest["width_px"] == 120).all()
    assert manifest["patient_id"].nunique() == 8 and manifest["patient_id"].str.fullmatch("P-[0-9a-f]{16}").all()
    assert facts["n_dicom"] == 8
    assert not [column for column in manifest if column.startswith("by_")]
    said = capsys.readouterr().out
    assert "warning: 8 of them: BurnedInAnnotation is YES" in said and "presentation states" in said
    left = b"".join(path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert not [word for word in (b"train-0-1", b"House 1", b"Planted") if word in left]


def test_a_patient_is_the_same_in_each_file_and_another_one_in_other_data(tmp_path: Path) -> None:
    first, _ = ingested(tmp_path / "a", write_set(tmp_path / "a" / "set", PatientID="77"))
    other, _ = ingested(tmp_path / "b", write_set(tmp_path / "b" / "set", n=3, PatientID="77"))
    assert first["patient_id"].nunique() == other["patient_id"].nunique() == 1
    assert set(first["patient_id"]).isdisjoint(other["patient_id"])


def test_a_placeholder_leaves_the_patient_to_the_file_name(tmp_path: Path) -> None:
    _, facts = ingested(tmp_path, write_set(tmp_path / "set", PatientID="ANONYMOUS"))
    assert facts["n_patients_unknown"] == 8


def test_a_dicom_file_among_others_takes_no_patient_from_their_names() -> None:
    table = pd.DataFrame({"path": ["person1_virus_1.png", "IM1"], "sha256": ["a", "b"], "patient": [pd.NA, "77"]})
    manifest, facts = add_patients(add_tags(table, None, ()), None, has_index=False)
    assert manifest["patient_id"][0] == "person1" and manifest["patient_id"][1].startswith("P-")
    assert (facts["n_fit"], facts["own"]) == (2, False)


@pytest.mark.parametrize(
    "word", ["", "  ", "ANONYMOUS", "Unknown", "N/A", "0000", "999999999", "DE-IDENTIFIED", "ANONYMOUS^PATIENT"]
)
def test_a_placeholder_is_no_patient(word: str) -> None:
    table = pd.DataFrame({"path": ["a", "b"], "sha256": ["a", "b"], "patient": [word, "77"]})
    assert add_tags(table, None, ())["patient_id"].isna().tolist() == [True, False]


def test_a_patient_that_the_table_names_is_the_same_child_in_a_dicom_file() -> None:
    table = pd.DataFrame({"path": ["a", "b", "c"], "sha256": ["a", "b", "c"], "patient": [pd.NA, "P3", "P4"]})
    found = add_tags(table.assign(patient_id=["P3", pd.NA, pd.NA]), None, ())["patient_id"].tolist()
    assert found[:2] == ["P3", "P3"] and found[2].startswith("P-")


def test_groups_come_from_tags_and_the_table_overrides_them(tmp_path: Path) -> None:
    source = write_set(tmp_path / "set")
    paths = [f"{split}/{name}/{i}" for split in ("train", "test") for name in CLASSES for i in range(2)]
    lines = [f"{path},{int('PNEU' in path)},p{i},{'ours' if i == 0 else ''},{i % 3}" for i, path in enumerate(paths)]
    (source / "index.csv").write_text("\n".join(["path,label,patient_id,site,ward", *lines]))
    manifest, _ = ingested(tmp_path, source, groups=("site", "sex", "ward"))
    by_path = manifest.set_index("path")
    assert by_path.loc["train/NORMAL/0", "by_site"] == "ours" and by_path.loc["train/NORMAL/1", "by_site"] == "House 0"
    assert set(manifest["by_sex"]) == {"M", "F"} and set(manifest["by_ward"]) == {"0", "1", "2"}
    assert sorted(manifest["patient_id"]) == [f"p{i}" for i in range(8)]


def test_a_group_that_no_image_has_or_that_names_each_image_is_refused(tmp_path: Path) -> None:
    source = write_set(tmp_path / "set", n=15)
    images = [f"{split}/{name}/{i}" for split in ("train", "test") for name in CLASSES for i in range(15)]
    rows = [f"{path},{int('PNEU' in path)},,{path},NA" for path in images]
    (source / "index.csv").write_text("\n".join(["path,label,patient_id,file,ward", *rows]))
    for name, n_values in {"ward": 0, "patient": 0, "file": 60, "path": 60}.items():
        with pytest.raises(TableError, match=f"'{name}' has {n_values} values in all images, not 1 to 50"):
            ingested(tmp_path, source, groups=(name,))


def test_association_is_one_where_the_group_is_the_class_and_none_by_chance() -> None:
    labels = pd.Series([0, 1] * 200)
    dice = np.random.default_rng(0)
    assert measure_association(labels.map({0: "a", 1: "b"}), labels) == pytest.approx(1, abs=0.01)
    assert measure_association(labels.map({0: pd.NA, 1: "b"}), labels) == pytest.approx(1, abs=0.01)
    assert measure_association(pd.Series(["a"] * 400), labels) == 0
    assert measure_association(pd.Series(dtype="string"), pd.Series(dtype="Int8")) == 0
    assert measure_association(pd.Series(dice.integers(0, 40, 400)).astype(str), labels) < 0.2


def test_a_site_that_goes_with_the_class_is_a_warning(tmp_path: Path) -> None:
    manifest, _ = ingested(tmp_path, write_set(tmp_path / "set", n=6), groups=("site", "sex"))
    table = add_facts(manifest, "source", QualitySettings(), {})
    failed = [
        item for item in run_checkpoint(table, "source", QualitySettings(), tmp_path / "out") if not item["success"]
    ]
    assert [item["says"] for item in failed] == ["site and class are associated by at most 0.3 (Cramér's V) in train"]
    assert failed[0]["severity"] == "warning"
