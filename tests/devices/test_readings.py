"""Which table of readings applies to a source, and which tables are refused."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from tasks.devices.readings import SHIPPED_REVIEW, find_review, read_review
from tasks.errors import TableError


def review_file(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_review_table_is_read_by_path_and_device_only(tmp_path: Path) -> None:
    path = review_file(tmp_path / "r.csv", "confidence,path,device,kinds\n2,a,1,lead\n0,b,0,\n2,a,1,line\n")
    assert read_review(path, "s") == {"a": 1, "b": 0}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("path,kinds\na,lead\n", "lacks the column device"),
        ("path,device\na,2\n", "line 2 has device = '2'"),
        ("path,device\na,\n", "line 2 has device = ''"),
        ("path,device\na,yes\n", "line 2 has device = 'yes'"),
        ("path,device\na,0\nb,1\na,1\n", "reads 'a' as 0 and as 1"),
    ],
)
def test_a_review_table_that_does_not_fit_is_refused_in_a_sentence(text: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(TableError) as caught:
        read_review(review_file(tmp_path / "r.csv", text), "screening.review")
    assert str(caught.value).startswith("screening.review: ")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_table_that_is_named_comes_before_the_source_s_own(tmp_path: Path) -> None:
    review_file(tmp_path / "device_review.csv", "path,device\na,0\n")
    named = review_file(tmp_path / "named.csv", "path,device\na,1\n")
    paths = pd.Series(["a", "b"])
    assert find_review(str(named), tmp_path, paths).readings == {"a": 1}
    assert find_review(None, tmp_path, paths).readings == {"a": 0}


def test_a_named_table_that_knows_no_path_of_the_source_is_refused_with_an_example(tmp_path: Path) -> None:
    named = review_file(tmp_path / "named.csv", "path,device\nchest_xray/b,1\n")
    with pytest.raises(TableError, match=r"named\.csv: none of its 1 paths .*'chest_xray/b'.*like train/a"):
        find_review(str(named), tmp_path, pd.Series(["train/a"]))


def test_a_named_table_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TableError, match=r"screening\.review: .*none\.csv does not exist"):
        find_review(str(tmp_path / "none.csv"), tmp_path, pd.Series(["a"]))


def test_the_shipped_table_applies_from_95_percent_of_its_paths_on(tmp_path: Path) -> None:
    shipped = read_review(SHIPPED_REVIEW, "s")
    paths = list(shipped)
    enough = -(-95 * len(paths) // 100)
    there = {path: shipped[path] for path in paths[:enough]}
    assert find_review(None, tmp_path, pd.Series(paths[:enough])).readings == there
    assert find_review(None, tmp_path, pd.Series(paths[: enough - 1])).readings == {}
    assert find_review(None, tmp_path, pd.Series(["train/NORMAL/other.jpeg"])).name == "no review table"


def test_the_shipped_table_has_the_counts_that_the_documentation_tells() -> None:
    shipped = read_review(SHIPPED_REVIEW, "s")
    normal = [device for path, device in shipped.items() if path.startswith("train/NORMAL/")]
    ill = [device for path, device in shipped.items() if path.startswith("train/PNEUMONIA/")]
    assert len(shipped) == 4808
    assert sum(normal) / len(normal) == pytest.approx(0.012, abs=0.001)
    assert sum(ill) / len(ill) == pytest.approx(0.53, abs=0.005)


WAYS: dict[str, Callable[[str], str]] = {
    "as it is": lambda path: path,
    "separators of Windows": lambda path: path.replace("/", "\\"),
    "a folder above": lambda path: f"chest_xray/{path}",
    "a place on another machine": lambda path: f"C:\\data\\set\\{path}".replace("/", "\\"),
    "a dot": lambda path: f"./{path}",
    "an ending in capitals": lambda path: path.replace(".jpeg", ".JPEG"),
    "the file's name alone": lambda path: path.rpartition("/")[2],
}


@pytest.mark.parametrize("way", WAYS)
def test_a_table_from_another_machine_has_all_its_readings_used(way: str, tmp_path: Path) -> None:
    paths = [f"train/NORMAL/IM-{i:04}.jpeg" for i in range(30)]
    rows = [f"{WAYS[way](path) if i else path},{i % 2}" for i, path in enumerate(paths)]
    named = review_file(tmp_path / "named.csv", "path,device\n" + "\n".join(rows) + "\n")
    review = find_review(str(named), tmp_path, pd.Series(paths))
    assert review.readings == {path: i % 2 for i, path in enumerate(paths)}
    assert review.warning == ""


def test_paths_that_name_nothing_are_warned_of_and_refused_beyond_a_share(tmp_path: Path) -> None:
    paths = [f"train/NORMAL/{i}.jpeg" for i in range(20)]
    named = review_file(tmp_path / "named.csv", "path,device\ngone.jpeg,1\n" + "".join(f"{p},0\n" for p in paths[1:]))
    review = find_review(str(named), tmp_path, pd.Series(paths), max_unmatched=0.05)
    assert review.warning.endswith(
        "1 of 20 paths name no file of the source, 0 name files that are not used, such as 'gone.jpeg'"
    )
    with pytest.raises(TableError, match=r"1 of 20 paths name no file.*'gone\.jpeg'.*quality\.max_unmatched"):
        find_review(str(named), tmp_path, pd.Series(paths), max_unmatched=0.049)
    left_out = ["chest_xray/chest_xray/gone.jpeg"]
    assert "1 name files that are not used" in find_review(str(named), tmp_path, pd.Series(paths), left_out).warning


def test_two_spellings_of_one_path_that_read_it_differently_are_refused(tmp_path: Path) -> None:
    named = review_file(tmp_path / "named.csv", "path,device\ntrain/a.png,1\ntrain\\a.png,0\n")
    with pytest.raises(TableError, match=r"'train/a\.png' as 0 and as 1"):
        find_review(str(named), tmp_path, pd.Series(["train/a.png"]))
