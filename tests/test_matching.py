"""Which image a path in a table means; and what fits none, or two."""

import pytest

from tasks.errors import TableError
from tasks.matching import accept_match, match_paths

IMAGES = ["train/NORMAL/a.jpeg", "train/NORMAL/b.jpeg", "test/NORMAL/a.jpeg", "train/PNEUMONIA/ä.png"]


def test_paths_as_they_are_come_first_even_where_others_differ_in_case_only() -> None:
    images = ["x/A.png", "x/a.png"]
    assert match_paths(images, images).images == {"x/A.png": "x/A.png", "x/a.png": "x/a.png"}
    assert match_paths(["X/a.png"], images).unclear == {"X/a.png": ("x/A.png", "x/a.png")}


def test_unicode_forms_of_a_name_are_one_name() -> None:
    assert match_paths(["train/PNEUMONIA/a\u0308.png"], IMAGES).images == {"train/PNEUMONIA/a\u0308.png": IMAGES[3]}


def test_a_name_that_two_images_end_with_is_unclear_and_refused() -> None:
    match = match_paths(["NORMAL/a.jpeg", "NORMAL/b.jpeg"], IMAGES)
    assert match.images == {"NORMAL/b.jpeg": IMAGES[1]}
    with pytest.raises(TableError, match=r"t: x has the path 'NORMAL/a\.jpeg', which fits 'test.*' and 'train/"):
        accept_match(match, "t: x", IMAGES, 1.0)


def test_a_name_that_two_images_end_with_is_unclear_even_if_another_row_names_one_of_them() -> None:
    match = match_paths([IMAGES[0], "a.jpeg"], IMAGES)
    assert (list(match.images), list(match.unclear)) == ([IMAGES[0]], ["a.jpeg"])


def test_only_one_common_folder_is_taken_off() -> None:
    rows = [f"chest_xray/{path}" for path in IMAGES[:2]] + ["hospital_b/test/NORMAL/a.jpeg"]
    match = match_paths(rows, IMAGES)
    assert (list(match.images.values()), match.missed) == (IMAGES[:2], [rows[2]])
    assert match_paths([f"a/{IMAGES[0]}", f"b/{IMAGES[1]}"], IMAGES).images == {}


def test_an_image_that_a_row_names_in_full_belongs_to_no_row_that_only_resembles_it() -> None:
    match = match_paths(["x/a.png", "a.png", "old/x/a.png"], ["x/a.png"])
    assert (match.images, match.missed) == ({"x/a.png": "x/a.png"}, ["a.png", "old/x/a.png"])


def test_rows_of_a_nested_copy_mean_the_image_above_or_a_file_that_is_left_out() -> None:
    nested = ["c/c/train/NORMAL/a.jpeg", "c/c/train/NORMAL/only.jpeg"]
    rows = ["c/train/NORMAL/a.jpeg", "c/train/NORMAL/only.jpeg", "c/train/NORMAL/b.jpeg"]
    match = match_paths(rows, IMAGES, nested)
    assert match.images == {rows[0]: IMAGES[0], rows[2]: IMAGES[1]}
    assert (match.left_out, match.missed) == ([rows[1]], [])


@pytest.mark.parametrize("row", ["../train/NORMAL/a.jpeg", "a.jpeg/", "NORMAL", "", "/", "NORMAL/a.jpeg.txt"])
def test_what_is_no_path_of_an_image_means_none(row: str) -> None:
    match = match_paths([row], IMAGES[:2])
    assert match.images == ({row: IMAGES[0]} if row == "a.jpeg/" else {})


def test_a_table_that_names_no_image_is_refused_whatever_the_setting() -> None:
    for rows in ([], ["gone.png"], ["notes.txt"]):
        with pytest.raises(TableError, match=f"t: x: none of its {len(rows)} paths is an image of the source"):
            accept_match(match_paths(rows, IMAGES, ["notes.txt"]), "t: x", IMAGES, 1.0)
