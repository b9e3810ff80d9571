"""What of a source's names belongs to the data set."""

import zipfile
from pathlib import Path

import pytest

from tasks.errors import SourceError
from tasks.sources.layout import find_place, plan_layout, plan_loose_images

FOUR = ["train/NORMAL/a.jpeg", "train/PNEUMONIA/b.jpeg", "test/NORMAL/c.jpeg", "test/PNEUMONIA/d.jpeg"]


def below(folder: str, names: list[str] = FOUR) -> list[str]:
    return [folder + name for name in names]


def test_class_folders_at_the_top_are_the_data_set() -> None:
    layout = plan_layout(FOUR, "x")
    assert (layout.root, layout.images, layout.n_clutter, layout.n_nested) == ("", tuple(sorted(FOUR)), 0, 0)


@pytest.mark.parametrize("folder", ["chest_xray/", "a b/c/", "./"])
def test_class_folders_below_other_folders_are_found_and_named_from_their_root(folder: str) -> None:
    layout = plan_layout(below(folder), "x")
    assert (layout.root, layout.images) == (folder, tuple(sorted(FOUR)))


def test_the_order_of_names_does_not_matter() -> None:
    assert plan_layout(FOUR, "x") == plan_layout(reversed(FOUR), "x")


def test_val_is_optional_but_needs_both_classes_when_it_is_there() -> None:
    both = [*FOUR, "val/NORMAL/e.jpeg", "val/PNEUMONIA/f.jpeg"]
    assert len(plan_layout(both, "x").images) == 6
    with pytest.raises(SourceError, match="val/PNEUMONIA"):
        plan_layout([*FOUR, "val/NORMAL/e.jpeg"], "x")


@pytest.mark.parametrize("missing", FOUR)
def test_a_class_folder_that_is_missing_is_named(missing: str) -> None:
    with pytest.raises(SourceError) as caught:
        plan_layout([name for name in FOUR if name != missing], "my.zip")
    assert missing.rsplit("/", 1)[0] in str(caught.value)
    assert "my.zip" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_class_folder_without_an_image_counts_as_missing() -> None:
    with pytest.raises(SourceError, match="test/PNEUMONIA"):
        plan_layout([*FOUR[:3], "test/PNEUMONIA/notes.txt", "test/PNEUMONIA/.DS_Store"], "x")


@pytest.mark.parametrize("names", [[], ["readme.txt"], ["a.jpeg", "b/c.png"], ["train/a.jpeg"], ["NORMAL/a.jpeg"]])
def test_a_source_in_no_known_layout_is_refused_with_the_way_out(names: list[str]) -> None:
    with pytest.raises(SourceError, match=r"index\.csv"):
        plan_layout(names, "x")


def test_finder_files_thumbnails_and_text_are_clutter() -> None:
    clutter = [
        "__MACOSX/chest_xray/train/NORMAL/._a.jpeg",
        "chest_xray/.DS_Store",
        "chest_xray/train/.DS_Store",
        "chest_xray/train/NORMAL/Thumbs.db",
        "chest_xray/train/NORMAL/._a.jpeg",
        "chest_xray/readme.txt",
        "notes.jpeg",
    ]
    layout = plan_layout([*below("chest_xray/"), *clutter], "x")
    assert (layout.root, layout.images, layout.n_clutter) == ("chest_xray/", tuple(sorted(FOUR)), len(clutter) - 1)
    assert (layout.n_unused, layout.unused) == (1, "notes.jpeg")


def test_a_macos_shadow_tree_is_never_the_root() -> None:
    with pytest.raises(SourceError):
        plan_layout(below("__MACOSX/"), "x")


@pytest.mark.parametrize("folder", ["train/NORMAL/more", "train/PNEUMONIA/bacteria", "Train/Pneumonia/virus/child 7"])
def test_images_below_a_class_folder_belong_to_it_at_any_depth(folder: str) -> None:
    layout = plan_layout([*FOUR, f"{folder}/e.jpeg"], "x")
    assert (len(layout.images), layout.n_clutter, layout.n_unused) == (5, 0, 0)


@pytest.mark.parametrize(
    "folder", ["PNEUMONIA/masks", "NORMAL/lung masks/a", "NORMAL/virus", "NORMAL/PNEUMONIA", "PNEUMONIA/test"]
)
def test_a_folder_below_a_class_folder_that_says_otherwise_stops_the_run(folder: str) -> None:
    with pytest.raises(SourceError, match=f"1 pictures in 'train/{'/'.join(folder.split('/')[:2])}/'"):
        plan_layout([*FOUR, f"train/{folder}/e.jpeg"], "x")


def test_a_nested_second_copy_is_left_out_and_counted() -> None:
    nested = [*below("chest_xray/chest_xray/"), "chest_xray/chest_xray/train/NORMAL/only_here.jpeg"]
    layout = plan_layout([*below("chest_xray/"), *nested], "x")
    assert (layout.root, layout.images) == ("chest_xray/", tuple(sorted(FOUR)))
    assert (layout.n_nested, layout.n_nested_only, layout.n_clutter) == (5, 1, 0)


def test_a_nested_copy_below_a_data_set_at_the_top_is_left_out_too() -> None:
    layout = plan_layout([*FOUR, *below("copy/")], "x")
    assert (layout.root, layout.n_nested, layout.n_nested_only) == ("", 4, 0)


def test_endings_and_folders_of_splits_and_classes_count_in_any_case() -> None:
    more = ["train/NORMAL/e.JPG", "Train/Normal/f.PNG", "TEST/pneumonia/g.png"]
    assert set(plan_layout([*FOUR, *more], "x").images) == {*FOUR, *more}


@pytest.mark.parametrize("word", ["val", "Val", "valid", "VALIDATION"])
def test_validation_has_several_names(word: str) -> None:
    layout = plan_layout([*FOUR, f"{word}/NORMAL/e.png", f"{word}/PNEUMONIA/f.png"], "x")
    place = find_place(f"{word}/NORMAL/e.png")
    assert (len(layout.images), place and place.split) == (6, "val")


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("hospital_b/", "hospital_b/train/NORMAL/1.png"),
        ("chest_xray/train/COVID19/", "chest_xray/train/COVID19/1.png"),
        ("chest_xray/holdout/", "chest_xray/holdout/NORMAL/1.png"),
        ("chest_xray/more/", "chest_xray/more/1.png"),
        ("chest_xray/hospital_b/", "chest_xray/hospital_b/train/NORMAL/1.png"),
    ],
)
def test_an_unknown_folder_of_pictures_stops_the_run_and_may_be_ignored(folder: str, name: str) -> None:
    names = [*below("chest_xray/"), name]
    with pytest.raises(SourceError) as caught:
        plan_layout(names, "my.zip")
    sentence = str(caught.value)
    assert f"my.zip has 1 pictures in {folder!r}" in sentence and "ingestion.ignore" in sentence
    assert "\n" not in sentence
    for pattern in (folder, folder.rstrip("/").rpartition("/")[2], f"{folder}*", "*/1.png"):
        layout = plan_layout(names, "my.zip", [pattern])
        assert (layout.images, layout.n_ignored, layout.n_clutter) == (tuple(sorted(FOUR)), 1, 0)


def test_patterns_that_fit_nothing_are_known() -> None:
    layout = plan_layout([*below("a/"), "a/b/1.png"], "my.zip", ["a/val", "b", "covid*"])
    assert layout.idle == ("a/val", "covid*")


def test_pictures_beside_folders_that_are_known_are_counted_and_named() -> None:
    layout = plan_layout([*below("c/"), "overview.png", "c/logo.png", "c/train/all.png", "c/notes.txt"], "x")
    assert (layout.images, layout.n_unused, layout.unused) == (tuple(sorted(FOUR)), 3, "c/logo.png")
    assert (layout.n_clutter, "overview.png" in layout.left_out, len(layout.left_out)) == (1, True, 4)


@pytest.mark.parametrize(
    "folder",
    [
        "@eaDir/a.jpeg",
        "$RECYCLE.BIN/S-1",
        "#recycle",
        "@Recycle",
        "System Volume Information",
        ".Trashes",
        "lost+found",
    ],
)
def test_folders_of_a_nas_and_bins_are_clutter_in_data_sets_and_among_loose_images(folder: str) -> None:
    names = [f"{at}{folder}/SYNOPHOTO_THUMB_M.jpg" for at in ("", "train/NORMAL/")] + [f"{folder}/train/NORMAL/x.png"]
    layout = plan_layout([*FOUR, *names, "train/NORMAL/SYNOPHOTO_THUMB_XL.jpg"], "x")
    assert (layout.images, layout.n_clutter, layout.n_unused) == (tuple(sorted(FOUR)), 4, 0)
    assert plan_loose_images([*FOUR, *names]) == (tuple(sorted(FOUR)), 3)


def test_with_an_index_every_image_below_it_may_be_used_and_no_class_folder_is_needed() -> None:
    layout = plan_layout(["set/index.csv", "set/a.png", "set/deep/er/b.jpg", "set/notes.txt", "else.png"], "x")
    assert (layout.root, layout.images, layout.tables) == ("set/", ("a.png", "deep/er/b.jpg"), ("index.csv",))
    assert (layout.n_clutter, layout.n_unused) == (1, 1)


@pytest.mark.parametrize("name", ["c/Index.csv", "c/index.xlsx", "c/Device_Review.csv"])
def test_a_table_that_is_called_nearly_like_one_is_named_and_not_overlooked(name: str) -> None:
    with pytest.raises(SourceError, match=r"; call it (index|device_review)\.csv "):
        plan_layout([*below("c/"), name], "x")
    assert plan_layout([*below("c/"), name], "x", [name]).n_ignored == 1


def test_two_indexes_side_by_side_are_refused() -> None:
    with pytest.raises(SourceError, match=r"has test/index\.csv and train/index\.csv"):
        plan_layout(["train/index.csv", "train/a.png", "test/index.csv", "test/b.png"], "x")


def test_scripts_and_words_without_an_ending_are_no_pictures() -> None:
    layout = plan_layout([*FOUR, "LICENSE", "SHA256SUMS", "scripts/run"], "x")
    assert (layout.n_clutter, layout.n_unused) == (3, 0)
    with pytest.raises(SourceError, match="1 pictures in 'export/'"):
        plan_layout([*FOUR, "export/IM0001"], "x")


def test_tables_count_at_the_root_only() -> None:
    layout = plan_layout([*below("c/"), "c/device_review.csv", "c/train/device_review.csv", "device_review.csv"], "x")
    assert (layout.tables, layout.n_clutter) == (("device_review.csv",), 2)


def test_every_file_is_counted_exactly_once() -> None:
    names = [*FOUR, *below("copy/"), "index.txt", ".DS_Store", "device_review.csv", "__MACOSX/x.jpeg"]
    layout = plan_layout(names, "x")
    assert len(layout.images) + len(layout.tables) + layout.n_nested + layout.n_clutter == len(names)


def test_the_public_archive_has_5840_images_below_chest_xray_and_61_in_a_nested_copy(shared_data: Path) -> None:
    with zipfile.ZipFile(shared_data / "chest_xray_224.zip") as archive:
        layout = plan_layout([name for name in archive.namelist() if not name.endswith("/")], "x")
    assert (layout.root, len(layout.images), layout.n_nested) == ("chest_xray/", 5840, 61)
    assert all(name.startswith(("train/", "test/")) for name in layout.images)
    assert (layout.n_clutter, layout.n_unused, layout.n_ignored) == (63, 0, 0)
