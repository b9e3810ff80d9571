"""CSV tables that people write are read as text, or refused in one sentence."""

import dataclasses
from pathlib import Path
from typing import Literal

import pytest
from pydantic.dataclasses import dataclass

from tasks.errors import TableError
from tasks.tables import read_rows


@dataclass(frozen=True)
class Row:
    path: str
    device: str
    kinds: str = ""


@dataclass(frozen=True)
class Judged:
    path: str
    device: Literal["", "0", "1"]


def read(tmp_path: Path, content: str | bytes) -> list[dict[str, str]]:
    path = tmp_path / "table.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return [dataclasses.asdict(row) for row in read_rows(path, "some.setting", Row)]


def refusal(tmp_path: Path, content: str | bytes) -> str:
    with pytest.raises(TableError) as caught:
        read(tmp_path, content)
    assert str(caught.value).startswith("some.setting: ")
    assert "table.csv" in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


ROW = [{"path": "a.jpeg", "device": "1", "kinds": ""}]


@pytest.mark.parametrize(
    "content",
    [
        "path,device\na.jpeg,1\n",
        "path,device\na.jpeg,1",
        "path,device\r\na.jpeg,1\r\n",
        "path,device\ra.jpeg,1\r",
        "\ufeffpath,device\na.jpeg,1\n",
        "path, device \n a.jpeg , 1 \n",
        '"path","device"\n"a.jpeg","1"\n',
        "\n\npath,device\n\na.jpeg,1\n,\n\n",
        "path,device,\na.jpeg,1,\n",
        "path,device\na.jpeg,1,,\n",
    ],
)
def test_spaces_line_ends_quotes_blank_lines_and_trailing_commas_do_not_matter(content: str, tmp_path: Path) -> None:
    assert read(tmp_path, content) == ROW


def test_columns_come_in_any_order_and_those_that_nobody_reads_may_be_anything(tmp_path: Path) -> None:
    table = "kinds,device,=x,path,=x\nlead,1,?,a.jpeg,!\n"
    assert read(tmp_path, table) == [ROW[0] | {"kinds": "lead"}]


def test_cells_stay_text_and_missing_ones_are_empty(tmp_path: Path) -> None:
    rows = read(tmp_path, "path,device\nNA,007\nnan,\nshort\n")
    assert rows == [
        {"path": "NA", "device": "007", "kinds": ""},
        {"path": "nan", "device": "", "kinds": ""},
        {"path": "short", "device": "", "kinds": ""},
    ]


def test_quoted_commas_and_umlauts_are_part_of_a_cell(tmp_path: Path) -> None:
    assert read(tmp_path, 'path,device\n"ä,b.jpeg",1\n')[0]["path"] == "ä,b.jpeg"


def test_a_table_without_rows_is_empty(tmp_path: Path) -> None:
    assert read(tmp_path, "path,device\n") == []


@pytest.mark.parametrize("content", ["", "\n\n", "a.jpeg,1\n", "path;device\na.jpeg;1\n", "Path,device\na.jpeg,1\n"])
def test_columns_that_are_missing_are_named(content: str, tmp_path: Path) -> None:
    assert "lacks the column path" in refusal(tmp_path, content)


def test_a_column_named_twice_is_refused(tmp_path: Path) -> None:
    assert "has the column device twice" in refusal(tmp_path, "path,device,device\na.jpeg,0,1\n")


@pytest.mark.parametrize("content", ["path,device\na,b.jpeg,1\n", "path,device\nx,1\na,b.jpeg,1\n"])
def test_a_row_with_more_cells_than_the_header_is_refused_by_its_line(content: str, tmp_path: Path) -> None:
    assert f"line {content.count(chr(10))} has more cells" in refusal(tmp_path, content)


def test_a_quote_that_is_never_closed_is_refused(tmp_path: Path) -> None:
    assert "is not a CSV table" in refusal(tmp_path, 'path,device\n"a.jpeg,1\n')


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_text_that_is_not_utf_8_is_refused(encoding: str, tmp_path: Path) -> None:
    assert "not UTF-8" in refusal(tmp_path, "path,device\nä.jpeg,1\n".encode(encoding))


def test_a_table_that_is_not_there_or_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="does not exist; name a CSV file with the columns path, device"):
        list(read_rows(tmp_path / "none.csv", "x", Row))
    with pytest.raises(TableError, match="is a folder, pipe or device, not a file"):
        list(read_rows(tmp_path, "x", Row))


def test_a_value_that_is_not_allowed_is_named_with_the_line_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text('path,device\n\na.jpeg,1\n"b\n.jpeg",0\nc.jpeg,perhaps\nd.jpeg,?\n')
    with pytest.raises(TableError, match=r"line 6 has device = 'perhaps'; it should be '', '0' or '1'"):
        list(read_rows(path, "x", Judged))
    assert len(list(read_rows(path, "x", Row))) == 4
