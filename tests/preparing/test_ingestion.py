"""From names, bytes and index.csv to the manifest: labels, patients, copies, contradictions."""

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from stage_steps import ingest_all

from tasks.errors import SourceError, TableError
from tasks.preparing.ingestion import (
    describe_doubts,
    describe_path,
    read_file,
    read_index_table,
    subtype_of,
    warn_of_spellings,
)
from tasks.runs.manifest import MANIFEST_DTYPES, image_id, read_manifest
from tasks.settings import IngestionSettings, Settings
from tasks.sources.layout import plan_layout

FOUR = ["train/NORMAL/a.jpeg", "train/PNEUMONIA/b.jpeg", "test/NORMAL/c.jpeg", "test/PNEUMONIA/d.jpeg"]


def picture(seed: int) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (70, 90), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "JPEG")
    return stream.getvalue()


def write_set(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def four() -> dict[str, bytes | str]:
    return {name: picture(seed) for seed, name in enumerate(FOUR)}


def settings(tmp_path: Path, source: Path, **others: Any) -> Settings:
    storage = {"raw": str(tmp_path / "raw"), "cache": str(tmp_path / "cache")}
    run = str(tmp_path / "run")
    return Settings.model_validate({"source": str(source), "run_dir": run, "storage": storage, **others})


def ingested(tmp_path: Path, source: Path, **others: Any) -> tuple[dict[str, Any], pd.DataFrame]:
    facts = ingest_all(settings(tmp_path, source, **others))
    return facts, read_manifest(tmp_path / "run").set_index("path")


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "label", "subtype"),
    [
        ("person1_bacteria_1.jpeg", 1, "bacteria"),
        ("person1_VIRUS_1.jpeg", 1, "virus"),
        ("person1.jpeg", 1, "unknown"),
        ("bacteria_or_virus.jpeg", 1, "unknown"),
        ("person1_bacteria_1.jpeg", 0, "normal"),
    ],
)
def test_the_subtype_of_a_pneumonia_is_in_its_file_name(name: str, label: int, subtype: str) -> None:
    assert subtype_of(name, label) == subtype


def test_a_path_tells_split_label_and_subtype() -> None:
    assert describe_path("val/PNEUMONIA/person5_virus_1.png") == {
        "path": "val/PNEUMONIA/person5_virus_1.png",
        "source_split": "val",
        "label": 1,
        "subtype": "virus",
    }


def test_an_image_id_is_the_start_of_the_sha256_of_its_path() -> None:
    assert image_id("train/NORMAL/IM-0115-0001.jpeg") == "1c18062092ca69fc"


# -- index.csv ---------------------------------------------------------------------------------------------------------


def index(tmp_path: Path, text: str, images: tuple[str, ...] = ("a.jpeg", "test/b.jpeg", "val/c.jpeg")) -> pd.DataFrame:
    (tmp_path / "index.csv").write_text(text, encoding="utf-8")
    return read_index_table(tmp_path / "index.csv", images).set_index("path")


def test_an_index_overrides_what_the_names_say(tmp_path: Path) -> None:
    row = index(tmp_path, "path,label,patient_id,subtype,split\ntest/b.jpeg,1,p7,virus,train\n", ("test/b.jpeg",)).loc[
        "test/b.jpeg"
    ]
    assert row.to_dict() == {
        "source_split": "train",
        "label": 1,
        "subtype": "virus",
        "patient_id": "p7",
    }


def test_without_a_split_the_top_folder_says_it_and_else_it_is_train(tmp_path: Path) -> None:
    table = index(tmp_path, "path,label,patient_id\na.jpeg,0,p\ntest/b.jpeg,0,p\nval/c.jpeg,0,p\n")
    assert table["source_split"].to_dict() == {"a.jpeg": "train", "test/b.jpeg": "test", "val/c.jpeg": "val"}


def test_folders_tell_the_split_at_any_depth_and_case_and_a_column_says_it_in_any_case(tmp_path: Path) -> None:
    images = ("set/Test/a/b.png", "set/TRAIN/c.png", "x/Validation/d.png", "x/e.png", "train/valid/f.png")
    rows = "".join(f"{path},0,p\n" for path in images)
    said: list[str] = []
    (tmp_path / "index.csv").write_text("path,label,patient_id\n" + rows)
    table = read_index_table(tmp_path / "index.csv", images, warn=said.append)
    assert table["source_split"].tolist() == ["test", "train", "val", "train", "train"]
    assert said == [
        "index.csv: 2 of 5 images have no split, such as 'x/e.png'; they are used for training and validation"
    ]
    words = index(tmp_path, "path,label,patient_id,split\na.jpeg,0,p,TEST\nval/c.jpeg,0,p,Validation\n")
    assert words["source_split"].tolist() == ["test", "val"]


def test_a_source_without_a_test_split_says_so_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files: dict[str, bytes | str] = {"1.png": picture(1), "2.jpg": picture(2)}
    table = "path,label,patient_id\n1.png,0,x\n2.jpg,1,y\n"
    ingested(tmp_path, write_set(tmp_path / "mine", {**files, "index.csv": table}))
    assert capsys.readouterr().out.splitlines()[0].startswith("warning: the source has no test split")


def test_an_index_from_another_machine_names_the_same_images(tmp_path: Path) -> None:
    names = ("scans/\u00e4.png", "scans/b.jpeg", "scans/c.png")
    rows = ["D:\\x\\scans\\a\u0308.png,0,p", "D:\\x\\scans\\b.JPEG,1,q", "D:\\x\\Scans\\c.png,1,r"]
    table = index(tmp_path, "path,label,patient_id\n" + "\n".join(rows) + "\n", names)
    assert table["label"].to_dict() == dict(zip(names, (0, 1, 1), strict=True))


def test_the_subtype_is_the_folder_s_below_a_class_folder() -> None:
    found = {
        path: describe_path(path)["subtype"]
        for path in (
            "train/PNEUMONIA/bacteria/1.png",
            "Train/Pneumonia/Viral Pneumonia/1.png",
            "train/PNEUMONIA/virus/person1_bacteria_1.png",
            "train/PNEUMONIA/child 7/person1_virus_1.png",
        )
    }
    assert list(found.values()) == ["bacteria", "virus", "unknown", "virus"]


def test_labels_may_be_words_or_digits_and_only_images_that_are_listed_count(tmp_path: Path) -> None:
    table = index(tmp_path, "path,label,patient_id\na.jpeg,Normal,p\ntest/b.jpeg,PNEUMONIA,q\n")
    assert table["label"].to_dict() == {"a.jpeg": 0, "test/b.jpeg": 1}


@pytest.mark.parametrize(
    "cell", ["", " ", "NA", "n/a", "N/A", "nan", "NaN", "NULL", "none", "-", "unknown", "#N/A", "Anon"]
)
def test_a_patient_that_is_no_patient_is_missing(cell: str, tmp_path: Path) -> None:
    table = index(tmp_path, f"path,label,patient_id\na.jpeg,0,{cell}\nval/c.jpeg,1,c\n")
    assert table["patient_id"].isna().tolist() == [True, False]


def test_a_subtype_in_another_word_for_unknown_is_unknown(tmp_path: Path) -> None:
    table = index(tmp_path, "path,label,patient_id,subtype,split\na.jpeg,1,p,NA,NA\nval/c.jpeg,0,c,NaN,\n")
    assert table["subtype"].tolist() == ["unknown", "normal"]


def test_a_byte_order_mark_and_more_columns_do_not_matter(tmp_path: Path) -> None:
    assert index(tmp_path, "\ufeffpath,age,label,patient_id,sha256\na.jpeg,7,0,p,xyz\n").index.tolist() == ["a.jpeg"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("path,label\na.jpeg,0\n", "lacks the column patient_id"),
        ("label,patient\n0,1\n", "lacks the column path, patient_id"),
        ("path,label,patient_id\n", "lists no image"),
        ("path,label,patient_id\na.jpeg,0,p\na.jpeg,0,p\n", "lists 'a.jpeg' twice"),
        ("path,label,patient_id\na.jpeg,0,p\na.jpeg,1,p\n", "lists 'a.jpeg' twice"),
        (
            "path,label,patient_id\na.jpeg,0,p\ngone.jpeg,0,p\n",
            "1 of 2 paths name no file of the source, such as 'gone.jpeg'",
        ),
        (
            "path,label,patient_id\n/etc/passwd,0,p\n",
            "none of its 1 paths is an image of the source, such as '/etc/passwd'",
        ),
        (
            "path,label,patient_id\n../a.jpeg,0,p\n",
            "none of its 1 paths is an image of the source, such as '../a.jpeg'",
        ),
        ("path,label,patient_id\na.jpeg,2,p\n", "line 2 has label = '2'"),
        ("path,label,patient_id\na.jpeg,,p\n", "line 2 has label = ''"),
        ("path,label,patient_id,split\na.jpeg,0,p,holdout\n", "line 2 has split = 'holdout'"),
        ("path,label,patient_id,subtype\na.jpeg,1,p,fungus\n", "line 2 has subtype = 'fungus'"),
    ],
)
def test_an_index_that_does_not_fit_is_refused_in_a_sentence(text: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(TableError) as caught:
        index(tmp_path, text)
    assert str(caught.value).startswith("index.csv: ")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_file_that_is_no_image_is_excluded_by_its_reason(tmp_path: Path) -> None:
    (tmp_path / "x.jpeg").write_text("I am text")
    facts = read_file(tmp_path / "x.jpeg", IngestionSettings(max_side_px=1_000))
    assert facts["excluded"] == "undecodable: is not a JPEG, PNG, TIFF, BMP, WebP or DICOM (unknown format)"
    assert facts["width_px"] is pd.NA
    assert len(facts["sha256"]) == 64


# -- the whole stage ---------------------------------------------------------------------------------------------------


def test_a_folder_becomes_a_manifest_with_a_row_per_image(tmp_path: Path) -> None:
    broken: dict[str, bytes | str] = {
        "train/NORMAL/copy.jpeg": picture(0),
        "train/PNEUMONIA/conflict.jpeg": picture(9),
        "train/NORMAL/conflict.jpeg": picture(9),
        "test/NORMAL/copy.jpeg": picture(2),
        "train/NORMAL/text.jpeg": "no image",
        "val/NORMAL/person8_virus_1.png": picture(7),
        "val/PNEUMONIA/person8_virus_2.png": picture(8),
    }
    source = write_set(tmp_path / "mine", {**four(), **broken})
    facts, manifest = ingested(tmp_path, source)
    assert {"path", *manifest.columns} == set(MANIFEST_DTYPES)
    assert len(manifest) == facts["n_images"] == 11
    other = "has the other label"
    assert manifest["excluded"][manifest["excluded"] != ""].to_dict() == {
        "train/NORMAL/copy.jpeg": "duplicate of train/NORMAL/a.jpeg",
        "train/NORMAL/conflict.jpeg": f"conflict: the same picture as train/PNEUMONIA/conflict.jpeg, which {other}",
        "train/PNEUMONIA/conflict.jpeg": f"conflict: the same picture as train/NORMAL/conflict.jpeg, which {other}",
        "train/NORMAL/text.jpeg": "undecodable: is not a JPEG, PNG, TIFF, BMP, WebP or DICOM (unknown format)",
    }
    counted = {key: facts[key] for key in ("n_distinct", "n_duplicates_excluded", "n_test_copies", "n_conflicts")}
    assert counted == {"n_distinct": 8, "n_duplicates_excluded": 1, "n_test_copies": 1, "n_conflicts": 2}
    assert facts["n_undecodable"] == 1
    row = manifest.loc["val/PNEUMONIA/person8_virus_2.png"]
    assert (row["width_px"], row["height_px"], row["subtype"]) == (90, 70, "virus")
    assert manifest["patient_id"].isna().all() and facts["n_patients_unknown"] == 10, "two of ten names are chance"
    assert manifest[["split", "has_device", "device_score"]].isna().all(axis=None)


def encoded(seed: int, form: str, dtype: str = "uint8", top: int = 256) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, top, (70, 90)).astype(dtype)).save(stream, form)
    return stream.getvalue()


def test_the_content_decides_what_an_image_is_and_pictures_that_are_not_taken_have_a_row(tmp_path: Path) -> None:
    forms = {"a.jfif": "JPEG", "IM0001": "PNG", "1.2.840.9": "JPEG", "c.TIF": "TIFF", "d.bmp": "BMP", "e.webp": "WebP"}
    taken: dict[str, bytes | str] = {
        f"train/NORMAL/{name}": encoded(40 + turn, form) for turn, (name, form) in enumerate(forms.items())
    }
    refused: dict[str, bytes | str] = {
        "train/NORMAL/anim.gif": encoded(60, "GIF"),
        "train/NORMAL/form": b"%PDF-1.4 of a scanner",
        "train/NORMAL/lfs.jpeg": "version https://git-lfs.github.com/spec/v1\n",
        "train/NORMAL/page.jpeg": "<!DOCTYPE html>",
        "train/NORMAL/zero.jpeg": "",
        "train/NORMAL/lfs": "version https://git-lfs.github.com/spec/v1\nof another\n",
    }
    clutter: dict[str, bytes | str] = {
        f"train/NORMAL/{name}": "words" for name in ("LICENSE", "Icon", "notes.txt", "Thumbs.db")
    }
    facts, manifest = ingested(tmp_path, write_set(tmp_path / "mine", {**four(), **taken, **refused, **clutter}))
    assert set(manifest.index) == {*FOUR, *taken, *refused}
    assert facts["n_clutter"] == len(clutter)
    assert set(manifest.index[manifest["excluded"].str.startswith("undecodable: is ")]) == set(refused)
    assert set(manifest.index[manifest["excluded"] == ""]) == {*FOUR, *taken}


def test_a_class_folder_with_words_only_is_refused_by_name(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {name: content for name, content in four().items() if name != FOUR[3]}
    source = write_set(tmp_path / "mine", {**files, FOUR[3].rpartition("/")[0] + "/LICENSE": "words"})
    with pytest.raises(SourceError, match=f"has no images in {FOUR[3].rpartition('/')[0]}; add"):
        ingest_all(settings(tmp_path, source))


def test_the_bits_in_use_are_decided_once_for_all_deep_files_of_a_source(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts, _ = ingested(tmp_path, write_set(tmp_path / "mine", four()))
    assert (facts["bits"], facts["n_deep"]) == (16, 0)
    assert "bits used" not in capsys.readouterr().out
    deep: dict[str, bytes | str] = {
        f"train/NORMAL/{top}.png": encoded(top, "PNG", "uint16", top) for top in (300, 900, 1024)
    }
    facts, _ = ingested(tmp_path, write_set(tmp_path / "mine", deep))
    assert (facts["bits"], facts["n_deep"]) == (10, 3)
    most = image_id("train/NORMAL/1024.png")
    assert f"3 files: 10 of 16 bits used, most by image {most}" in capsys.readouterr().out


def test_broken_files_with_the_same_bytes_are_named_broken_and_not_contradictions(tmp_path: Path) -> None:
    empty: dict[str, bytes | str] = {"train/NORMAL/x.jpeg": "", "train/PNEUMONIA/y.jpeg": "", "test/NORMAL/z.jpeg": ""}
    facts, manifest = ingested(tmp_path, write_set(tmp_path / "mine", {**four(), **empty}))
    assert (facts["n_undecodable"], facts["n_conflicts"]) == (3, 0)
    assert manifest.loc[list(empty), "excluded"].str.startswith("undecodable: ").all()


def test_a_truncated_image_is_listed_with_its_size(tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 60), dtype=np.uint8)).save(stream, "PNG")
    cut: dict[str, bytes | str] = {
        "train/NORMAL/cut.png": stream.getvalue()[:1500],
        "train/NORMAL/cut.jpeg": picture(5)[:-900],
    }
    _, manifest = ingested(tmp_path, write_set(tmp_path / "mine", {**four(), **cut}))
    assert manifest.loc["train/NORMAL/cut.png", ["width_px", "height_px"]].tolist() == [60, 50]
    assert manifest.loc["train/NORMAL/cut.jpeg", ["width_px", "height_px"]].tolist() == [90, 70]


def test_an_image_with_too_long_a_side_is_excluded_by_name(tmp_path: Path) -> None:
    source = write_set(tmp_path / "mine", four())
    _, manifest = ingested(tmp_path, source, ingestion={"max_side_px": 80})
    assert manifest.loc[FOUR[0], "excluded"] == "undecodable: is 90 x 70 px, longer than 80 px"


def test_a_data_set_with_an_index_and_names_of_its_own_is_read_by_it(tmp_path: Path) -> None:
    table = "path,label,patient_id,split\nscans/1.png,0,x,\nscans/2.jpg,1,y,test\n"
    files: dict[str, bytes | str] = {"scans/1.png": picture(1), "scans/2.jpg": picture(2), "scans/3.jpg": picture(3)}
    facts, manifest = ingested(tmp_path, write_set(tmp_path / "mine", {**files, "index.csv": table}))
    assert manifest["label"].to_dict() == {"scans/1.png": 0, "scans/2.jpg": 1}
    assert manifest["source_split"].to_dict() == {"scans/1.png": "train", "scans/2.jpg": "test"}
    assert (facts["n_clutter"], facts["n_unused"]) == (0, 1)


def test_a_zip_and_its_folder_have_the_same_manifest(tmp_path: Path) -> None:
    source = write_set(tmp_path / "mine", four())
    with zipfile.ZipFile(tmp_path / "mine.zip", "w") as archive:
        for name in FOUR:
            archive.write(source / name, "some/folder/" + name)
    from_folder, by_folder = ingested(tmp_path, source)
    from_zip, by_zip = ingested(tmp_path, tmp_path / "mine.zip")
    pd.testing.assert_frame_equal(by_folder, by_zip)
    assert (from_folder["kind"], from_zip["kind"]) == ("folder", "zip")


def test_the_listing_is_reused_until_a_file_or_a_limit_changes(tmp_path: Path) -> None:
    source = write_set(tmp_path / "mine", four())
    assert [ingested(tmp_path, source)[0]["reused"] for _ in range(2)] == [False, True]
    write_set(source, {FOUR[0]: picture(50)})
    assert ingested(tmp_path, source)[0]["reused"] is False
    assert ingested(tmp_path, source, ingestion={"max_side_px": 100})[0]["reused"] is False


def test_clutter_that_comes_or_goes_changes_the_counts_only(tmp_path: Path) -> None:
    source = write_set(tmp_path / "mine", four())
    first, before = ingested(tmp_path, source)
    write_set(source, {"readme.txt": "hello"})
    second, after = ingested(tmp_path, source)
    assert (first["n_clutter"], second["n_clutter"]) == (0, 1)
    pd.testing.assert_frame_equal(before, after)


def test_a_link_that_leads_nowhere_ends_in_a_sentence_and_leaves_no_run_folder(tmp_path: Path) -> None:
    source = write_set(tmp_path / "mine", four())
    (source / "train/NORMAL/gone.jpeg").symlink_to("nowhere.jpeg")
    with pytest.raises(SourceError, match=r"gone\.jpeg cannot be read \(No such file or directory\)"):
        ingest_all(settings(tmp_path, source))
    assert not (tmp_path / "run").exists()


def test_an_index_that_does_not_fit_leaves_no_run_folder(tmp_path: Path) -> None:
    source = write_set(tmp_path / "mine", {**four(), "index.csv": "path,label\n"})
    with pytest.raises(TableError, match="lacks the column patient_id"):
        ingest_all(settings(tmp_path, source))
    assert not (tmp_path / "run").exists()


def test_normal_images_called_like_a_pneumonia_and_archives_beside_images_are_counted(tmp_path: Path) -> None:
    more: dict[str, bytes | str] = {"train/NORMAL/person1_bacteria_1.jpeg": picture(9), "train/NORMAL/more.zip": "PK"}
    facts, _ = ingested(tmp_path, write_set(tmp_path / "mine", {**four(), **more}))
    first, second = facts["warnings"]
    assert first.startswith("1 archives beside the images are not read, such as 'train/NORMAL/more.zip'")
    assert second.startswith("1 images in the class normal are called like")


def test_bits_in_use_that_go_with_the_class_are_said() -> None:
    manifest = pd.DataFrame({"path": ["a", "b"], "source_split": "test", "label": [0, 1], "bits": [12, 14]})
    layout = plan_layout(["index.csv", "a", "b"], "x")
    (warning,) = describe_doubts(manifest, layout)
    assert warning.startswith("12 of 16 bits in normal images and 14 of 16 bits in pneumonia images are used")
    assert describe_doubts(manifest.assign(bits=[12, 11]), layout) == []


def test_patients_spelled_in_several_ways_are_counted_and_not_named() -> None:
    said: list[str] = []
    warn_of_spellings({"p1", "P1", "7", "007", "12", "12.0", "120", "p10", ""}, said.append)
    assert len(said) == 1 and said[0].startswith("index.csv: 3 patients are spelled in several ways")
    warn_of_spellings({"1", "10", "100", "p2"}, said.append)
    assert len(said) == 1


def test_a_file_that_does_not_decode_is_no_image_of_an_unknown_patient(tmp_path: Path) -> None:
    facts, _ = ingested(tmp_path, write_set(tmp_path / "mine", {**four(), "train/NORMAL/x.jpeg": "no picture"}))
    assert (facts["n_undecodable"], facts["n_patients_unknown"]) == (1, 4)


def test_folders_below_a_class_that_may_be_classes_of_their_own_are_named(tmp_path: Path) -> None:
    source = write_set(tmp_path / "mine", {**four(), "train/NORMAL/tuberculosis/x.jpeg": encoded(90, "JPEG")})
    facts, _ = ingested(tmp_path, source)
    (warning,) = facts["warnings"]
    assert warning.startswith("1 pictures lie in folders below the class folders (tuberculosis)")
