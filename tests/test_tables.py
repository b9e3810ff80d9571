"""Tables that people write are read as text, or refused in one sentence."""

import dataclasses
import zipfile
from datetime import date
from pathlib import Path
from typing import Literal

import openpyxl
import pytest
from pydantic.dataclasses import dataclass

from tasks.errors import TableError
from tasks.tables import blank_unknown, read_rows


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
        "path;device\na.jpeg;1\n",
        "path\tdevice\r\na.jpeg\t1\r\n",
        "sep=,\npath,device\na.jpeg,1\n",
        "sep=;\r\npath;device\r\na.jpeg;1\r\n",
        '\ufeff"sep=|"\n\npath|device\na.jpeg|1\n',
        ";;\n\npath;device;\na.jpeg;1;\n",
        "Path,DEVICE\na.jpeg,1\n",
        '"Path";"Device"\n"a.jpeg";1\n',
    ],
)
def test_separators_case_spaces_line_ends_quotes_blank_lines_and_trailing_commas_do_not_matter(
    content: str, tmp_path: Path
) -> None:
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


@pytest.mark.parametrize(
    "content", ["", "\n\n", "a.jpeg,1\n", "path:device\na.jpeg:1\n", "sep=;\npath,device\na.jpeg,1\n"]
)
def test_columns_that_are_missing_are_named(content: str, tmp_path: Path) -> None:
    assert "lacks the column path" in refusal(tmp_path, content)


def test_a_column_named_twice_is_refused(tmp_path: Path) -> None:
    assert "has the column device twice" in refusal(tmp_path, "path,device,device\na.jpeg,0,1\n")


@pytest.mark.parametrize("content", ["path,device\na,b.jpeg,1\n", "path,device\nx,1\na,b.jpeg,1\n"])
def test_a_row_with_more_cells_than_the_header_is_refused_by_its_line(content: str, tmp_path: Path) -> None:
    assert f"line {content.count(chr(10))} has more cells" in refusal(tmp_path, content)


def test_a_quote_that_is_never_closed_is_refused(tmp_path: Path) -> None:
    assert "is not a CSV table" in refusal(tmp_path, 'path,device\n"a.jpeg,1\n')


def test_what_a_table_without_the_columns_begins_with_is_shown(tmp_path: Path) -> None:
    assert "begins with 'image:label', lacks the column path" in refusal(tmp_path, "\nimage:label\na:1\n")


def test_lines_are_counted_as_in_the_file_whatever_comes_before_the_header(tmp_path: Path) -> None:
    assert "line 5 has more cells" in refusal(tmp_path, "sep=;\n\npath;device\na;1\nb;1;2\n")


def test_names_of_columns_are_read_with_blanks_or_dashes_for_the_underscore(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Patient:
        patient_id: str

    (tmp_path / "t.csv").write_text("x;Patient ID\n1;p7\n")
    assert [row.patient_id for row in read_rows(tmp_path / "t.csv", "x", Patient)] == ["p7"]


def test_a_name_twice_in_different_case_is_refused(tmp_path: Path) -> None:
    assert "has the column device twice" in refusal(tmp_path, "path,device,Device\na.jpeg,0,1\n")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252", "latin-1"])
def test_letters_are_read_in_each_encoding_that_programs_write(encoding: str, tmp_path: Path) -> None:
    assert read(tmp_path, "path;device\nä/ÉÜß.jpeg;1\n".encode(encoding))[0]["path"] == "ä/ÉÜß.jpeg"


@pytest.mark.parametrize("encoding", ["cp850", "mac-roman"])
def test_text_whose_encoding_is_not_certain_is_refused_with_what_was_seen(encoding: str, tmp_path: Path) -> None:
    for content in ("path,device\nü.jpeg,1\n", "path,device,remark\na.jpeg,1,für\n"):
        said = refusal(tmp_path, content.encode(encoding))
        assert "is not certain in any encoding; save it in UTF-8" in said and "device" in said


def test_utf_16_without_its_mark_or_cut_short_is_refused(tmp_path: Path) -> None:
    assert "lacks the column path" in refusal(tmp_path, "path,device\na,1\n".encode("utf-16-le"))
    assert "is not a CSV table" in refusal(tmp_path, "path,device\na,1\n".encode("utf-16")[:-1])


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


# -- Excel -------------------------------------------------------------------------------------------------------------


def sheet(path: Path, *rows: list[object], **others: list[list[object]]) -> Path:
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    for name, more in others.items():
        for row in (page := book.create_sheet(name)) and more:
            page.append(row)
    book.save(path)
    return path


def read_sheet(path: Path) -> list[dict[str, str]]:
    return [dataclasses.asdict(row) for row in read_rows(path, "some.setting", Row)]


def refused_sheet(path: Path) -> str:
    with pytest.raises(TableError) as caught:
        read_sheet(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["table.xlsx", "table.csv"])
def test_a_sheet_of_excel_is_read_like_a_csv_whatever_its_name(name: str, tmp_path: Path) -> None:
    path = sheet(
        tmp_path / name, [], ["Path", None, "Device", "x"], [], [" a.jpeg ", 5, 1.0], [None], ["b.jpeg", "", "0"]
    )
    assert read_sheet(path) == [*ROW, {"path": "b.jpeg", "device": "0", "kinds": ""}]


def test_numbers_and_dates_of_a_sheet_are_their_text(tmp_path: Path) -> None:
    path = sheet(tmp_path / "t.xlsx", ["path", "device"], [12, True], [1.0, 0.5], [date(2026, 5, 1), 10**12])
    assert [(row["path"], row["device"]) for row in read_sheet(path)] == [
        ("12", "True"),
        ("1", "0.5"),
        ("2026-05-01 00:00:00", "1000000000000"),
    ]


def test_the_sheet_with_the_columns_is_taken_and_two_of_them_are_refused(tmp_path: Path) -> None:
    rows: list[list[object]] = [["path", "device"], ["a.jpeg", 1]]
    assert read_sheet(sheet(tmp_path / "t.xlsx", ["notes"], Data=rows)) == ROW
    assert "sheets Data and More have the columns; keep one" in refused_sheet(
        sheet(tmp_path / "t.xlsx", ["notes"], Data=rows, More=rows)
    )
    assert "begins with 'notes', lacks the column path, device" in refused_sheet(sheet(tmp_path / "t.xlsx", ["notes"]))


@pytest.mark.parametrize("error", ["#REF!", "#N/A", "#VALUE!"])
def test_an_error_of_excel_is_unknown(error: str, tmp_path: Path) -> None:
    path = sheet(tmp_path / "t.xlsx", ["path", "device"], ["a.jpeg", error])
    assert blank_unknown(read_sheet(path)[0]["device"]) == ""


def test_a_workbook_that_unpacks_to_far_more_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = sheet(tmp_path / "t.xlsx", ["path", "device"])
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("xl/media/image1.bmp", bytes(65_000_000))
    assert "it unpacks to more than 64 MB" in refused_sheet(path)


def test_a_workbook_whose_text_unfolds_without_end_is_refused(tmp_path: Path) -> None:
    path, bomb = sheet(tmp_path / "t.xlsx", ["path", "device"], ["a", "b"]), tmp_path / "bomb.xlsx"
    unfolding = '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;">]>'
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(bomb, "w") as new:
        for name in old.namelist():
            text = old.read(name).decode()
            new.writestr(name, text.replace("<worksheet", unfolding + "<worksheet"))
    assert "is not a CSV table" in refused_sheet(bomb)


def test_an_old_file_of_excel_is_said_to_be_that(tmp_path: Path) -> None:
    assert "old Excel file (.xls), or one with a password" in refusal(tmp_path, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1")


def test_a_zip_that_is_no_workbook_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "t.xlsx", "w") as archive:
        archive.writestr("content.xml", "an .ods")
    assert "it is no whole workbook" in refused_sheet(tmp_path / "t.xlsx")
    (tmp_path / "t.xlsx").write_bytes(b"PK\x03\x04" + bytes(100))
    assert "it is no whole workbook" in refused_sheet(tmp_path / "t.xlsx")
