"""What of a source's names belongs to the data set."""

import zipfile
from pathlib import Path

import pytest

from tasks.errors import SourceError
from tasks.sources.layout import plan_layout

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
    assert (layout.root, layout.images, layout.n_clutter) == ("chest_xray/", tuple(sorted(FOUR)), len(clutter))


def test_a_macos_shadow_tree_is_never_the_root() -> None:
    with pytest.raises(SourceError):
        plan_layout(below("__MACOSX/"), "x")


def test_images_deeper_than_a_class_folder_are_left_out() -> None:
    layout = plan_layout([*FOUR, "train/NORMAL/more/e.jpeg"], "x")
    assert (len(layout.images), layout.n_clutter) == (4, 1)


def test_a_nested_second_copy_is_left_out_and_counted() -> None:
    nested = [*below("chest_xray/chest_xray/"), "chest_xray/chest_xray/train/NORMAL/only_here.jpeg"]
    layout = plan_layout([*below("chest_xray/"), *nested], "x")
    assert (layout.root, layout.images) == ("chest_xray/", tuple(sorted(FOUR)))
    assert (layout.n_nested, layout.n_nested_only, layout.n_clutter) == (5, 1, 0)


def test_a_nested_copy_below_a_data_set_at_the_top_is_left_out_too() -> None:
    layout = plan_layout([*FOUR, *below("copy/")], "x")
    assert (layout.root, layout.n_nested, layout.n_nested_only) == ("", 4, 0)


def test_endings_count_in_any_case_and_folders_only_as_written() -> None:
    layout = plan_layout([*FOUR, "train/NORMAL/e.JPG", "train/NORMAL/f.PNG", "train/normal/g.png"], "x")
    assert set(layout.images) == {*FOUR, "train/NORMAL/e.JPG", "train/NORMAL/f.PNG"}


def test_with_an_index_every_image_below_it_may_be_used_and_no_class_folder_is_needed() -> None:
    layout = plan_layout(["set/index.csv", "set/a.png", "set/deep/er/b.jpg", "set/notes.txt", "else.png"], "x")
    assert (layout.root, layout.images, layout.tables) == ("set/", ("a.png", "deep/er/b.jpg"), ("index.csv",))
    assert layout.n_clutter == 2


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
