"""Whatever a review table, an answers table or an ``index.csv`` holds: it is read right, or refused in one line."""

import csv
import hashlib
import io
import itertools
import os
import random
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import openpyxl
import pandas as pd
import pytest
from fault_table import FaultTable
from hostile import DAMAGES, bounded_memory, damage, ends_well, hostile  # noqa: F401
from hypothesis import given
from hypothesis import strategies as st
from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

from tasks.devices.answers import FORMULA, keep_answers, match_answers, read_answers, read_kept
from tasks.devices.readings import find_review, read_review
from tasks.preparing.ingestion import read_index_table

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
PATHS = ("a.png", "b.png", "=c.png", "ü/d e.png")
CELLS = st.one_of(
    st.sampled_from(
        [
            *PATHS,
            *("", "0", "1", "2", "normal", "PNEUMONIA", "virus", "train", "val", "x", "nan", "NaN", "1e400", "-1"),
            *("=cmd|' /C calc'!A0", "+1+1", "-2", "@SUM(A1)", "\t=1", "\r=1", '=HYPERLINK("h","x")', "<script>"),
            *("../../etc/passwd", "/etc/passwd", "a\x00b", "\ufeff", "\u202egpj", "a\nb", "x" * 140_000, "é" * 300),
            *("2026-01-01T00:00:00Z", "9999-12-31T23:59:59+14:00", "0001-01-01", "2026-13-45", "a" * 64, "1" * 5_000),
        ]
    ),
    st.text(max_size=12),
)
HEADERS = st.lists(
    st.sampled_from(
        ["path", "device", "sha256", "reviewer", "time", "label", "patient_id", "subtype", "split", "", "=x", " path"]
    ),
    max_size=8,
)
HEADED = st.one_of(
    HEADERS,
    st.just(["path", "device"]),
    st.just(["path", "sha256", "device", "reviewer", "time"]),
    st.just(["path", "label", "patient_id"]),
    st.just(["path", "label", "patient_id", "subtype", "split"]),
)
TABLES = st.builds(lambda header, rows: [header, *rows], HEADED, st.lists(st.lists(CELLS, max_size=6), max_size=5))
ENCODINGS = st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "latin-1", "cp1252"])
WHOLE = "path,sha256,device,reviewer,time,label,patient_id,subtype,split\n" + "".join(
    f'"{path}",,{i % 2},Ada,2026-01-0{i + 1}T00:00:00Z,{i % 2},p{i},,\n' for i, path in enumerate(PATHS)
)


def sha_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


MANIFEST = pd.DataFrame(
    {
        "image_id": [sha_of(path)[:16] for path in PATHS],
        "path": PATHS,
        "sha256": [sha_of("of " + path) for path in PATHS],
    }
)


def write_rows(rows: list[list[str]]) -> str:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue()


@contextmanager
def table_of(content: bytes) -> Iterator[Path]:
    """A file of this content in a folder of its own, in which nothing else may appear but the folder of answers."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "table.csv")
        path.write_bytes(content)
        yield path
        assert {p.name for p in Path(name).iterdir()} <= {"table.csv", "kept"}


def read_as_review(path: Path) -> None:
    readings = read_review(path, "screening.review")
    assert set(readings.values()) <= {0, 1}
    find_review(str(path), path.parent, MANIFEST["path"])


def read_as_index(path: Path) -> None:
    rows = read_index_table(path, PATHS)
    assert set(rows["path"]) <= set(PATHS) and rows["path"].is_unique
    assert set(rows["label"]) <= {0, 1} and set(rows["source_split"]) <= {"train", "val", "test"}


def take_as_answers(path: Path) -> None:
    """Takes them; what is kept then has no cell that a spreadsheet runs, and only answers about these images."""
    kept = path.with_name("kept")
    keep_answers(
        match_answers(read_answers(path, "answers"), MANIFEST, "x"), kept, reviewer="someone", place="x", now=NOW
    )
    for file in kept.glob("*"):
        with file.open(newline="", encoding="utf-8") as stream:
            assert not [cell for row in csv.reader(stream) for cell in row if cell.startswith(FORMULA)]
    assert {answer.path for answer in read_kept(kept)} <= set(PATHS)


@pytest.mark.parametrize("read", [read_as_review, read_as_index, take_as_answers])
@given(rows=TABLES, encoding=ENCODINGS)
@hostile
def test_any_table_is_read_right_or_refused_in_one_line(
    faults: FaultTable, read: Callable[[Path], None], rows: list[list[str]], encoding: str
) -> None:
    with table_of(write_rows(rows).encode(encoding, "replace")) as path:
        ends_well(faults, lambda: read(path))


@given(kind=st.sampled_from(DAMAGES), seed=st.integers(0, 2**32 - 1))
@hostile
def test_a_damaged_table_is_read_right_or_refused_in_one_line(faults: FaultTable, kind: str, seed: int) -> None:
    with table_of(damage(WHOLE.encode(), kind, seed)) as path:
        for read in (read_as_review, read_as_index, take_as_answers):
            ends_well(faults, lambda read=read: read(path))  # type: ignore[misc]


def sheet_of(rows: list[list[Any]], titles: int = 1) -> bytes:
    """A workbook; texts that XML cannot hold are left out, and only ``=1+1`` is a formula."""
    book, stream = openpyxl.Workbook(), io.BytesIO()
    for page in [book.active, *(book.create_sheet() for _ in range(titles - 1))]:
        for row in rows:
            page.append([ILLEGAL_CHARACTERS_RE.sub("", x)[:30_000] if isinstance(x, str) else x for x in row])
        for cell in itertools.chain.from_iterable(page.iter_rows()):
            if cell.data_type == "f" and cell.value != "=1+1":
                cell.data_type = "s"
    book.save(stream)
    return stream.getvalue()


VALUES = st.one_of(
    CELLS,
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.booleans(),
    st.none(),
    st.datetimes(datetime(1901, 1, 1), datetime(2100, 1, 1)),
    st.sampled_from(["#REF!", "=1+1"]),
)


@pytest.mark.parametrize("read", [read_as_review, read_as_index, take_as_answers])
@given(header=HEADED, rows=st.lists(st.lists(VALUES, max_size=6), max_size=5), titles=st.sampled_from([1, 1, 2]))
@hostile
def test_any_sheet_of_excel_is_read_right_or_refused_in_one_line(
    faults: FaultTable, read: Callable[[Path], None], header: list[str], rows: list[list[Any]], titles: int
) -> None:
    with table_of(sheet_of([header, *rows], titles)) as path:
        ends_well(faults, lambda: read(path))


@given(kind=st.sampled_from(DAMAGES), seed=st.integers(0, 2**32 - 1), part=st.booleans())
@hostile
def test_a_damaged_sheet_is_read_right_or_refused_in_one_line(
    faults: FaultTable, kind: str, seed: int, part: bool
) -> None:
    content = sheet_of(list(csv.reader(io.StringIO(WHOLE))))
    if part:  # one of its parts, inside a zip that is whole
        stream = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(stream, "w") as new:
            chosen = random.Random(seed).choice(old.namelist())
            for name in old.namelist():
                new.writestr(name, damage(old.read(name), kind, seed) if name == chosen else old.read(name))
        content = stream.getvalue()
    else:
        content = damage(content, kind, seed)
    with table_of(content) as path:
        for read in (read_as_review, read_as_index, take_as_answers):
            ends_well(faults, lambda read=read: read(path))  # type: ignore[misc]


@pytest.mark.parametrize("separator", [";", "\t", "|"])
@given(rows=TABLES, encoding=ENCODINGS, marked=st.booleans())
@hostile
def test_any_table_with_another_separator_is_read_right_or_refused_in_one_line(
    faults: FaultTable, separator: str, rows: list[list[str]], encoding: str, marked: bool
) -> None:
    text = io.StringIO()
    csv.writer(text, delimiter=separator).writerows(rows)
    content = (f"sep={separator}\n" if marked else "") + text.getvalue()
    with table_of(content.encode(encoding, "replace")) as path:
        ends_well(faults, lambda: read_as_index(path))


@given(content=st.binary(max_size=400))
@hostile
def test_bytes_that_are_no_table_are_refused_in_one_line(faults: FaultTable, content: bytes) -> None:
    with table_of(content) as path:
        ends_well(faults, lambda: read_as_review(path))


def test_a_whole_table_is_read_in_each_of_its_roles(faults: FaultTable) -> None:
    for content in (WHOLE.encode(), WHOLE.encode("utf-16"), sheet_of(list(csv.reader(io.StringIO(WHOLE))))):
        with table_of(content) as path:
            assert ends_well(faults, lambda path=path: read_as_review(path))  # type: ignore[misc]
            assert ends_well(faults, lambda path=path: read_as_index(path))  # type: ignore[misc]
            assert ends_well(faults, lambda path=path: take_as_answers(path))  # type: ignore[misc]


@pytest.mark.slow
def test_a_sheet_whose_rows_end_in_the_last_column_is_read_within_the_memory_limit(
    faults: FaultTable, tmp_path: Path
) -> None:
    rows = "".join(f'<row r="{n}"><c r="XFD{n}"><v>1</v></c></row>' for n in range(3, 100_000))
    with (
        zipfile.ZipFile(io.BytesIO(sheet_of([["path", "device"], ["a.png", 1]]))) as old,
        zipfile.ZipFile(tmp_path / "t.xlsx", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name).decode().replace("</sheetData>", rows + "</sheetData>"))
    assert ends_well(faults, lambda: read_review(tmp_path / "t.xlsx", "screening.review"))


WIDE_ROWS = "path,device\n" + ("a.png,1" + "," * 999_900 + "\n") * 60
COMMAS = {
    "as wide as a spreadsheet": "path,device" + "," * 16_382 + "\n" + ("a.png,1" + "," * 16_382 + "\n") * 500,
    "a million columns": "path,device" + "," * 1_000_000 + "\n",
    "20,000 names": "path,device," + ",".join(f"c{i}" for i in range(20_000)) + "\na.png,1\n",
    "a row of a million cells": "path,device\na.png,1" + "," * 1_000_000 + "\n",
    "as much over several lines": "path,device\na.png,1" + ',"\n"' * 300_000 + "\n",
    "more cells than any": "path,device" + "".join(f",c{i}" for i in range(900)) + "\n" + "a.png,1\n" * 23_000,
}


@pytest.mark.slow
@pytest.mark.parametrize("case", COMMAS)
def test_a_table_of_far_too_many_cells_is_read_or_refused_before_they_fill_the_memory(
    faults: FaultTable, tmp_path: Path, case: str
) -> None:
    (tmp_path / "t.csv").write_text(COMMAS[case])
    for read in (lambda: read_review(tmp_path / "t.csv", "r"), lambda: read_index_table(tmp_path / "t.csv", PATHS)):
        ends_well(faults, read)


@pytest.mark.slow
def test_blank_cells_beyond_the_header_take_no_memory(faults: FaultTable, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(WIDE_ROWS)
    assert ends_well(faults, lambda: read_review(tmp_path / "t.csv", "screening.review"))


def test_a_table_that_is_a_pipe_or_device_is_refused_without_waiting(faults: FaultTable, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        assert not ends_well(faults, lambda path=path: read_review(path, "screening.review"))  # type: ignore[misc]


@pytest.mark.long
def test_a_table_with_a_million_rows_is_read_or_refused_within_the_memory_limit(
    faults: FaultTable, tmp_path: Path
) -> None:
    table = tmp_path / "big.csv"
    with table.open("w") as stream:
        stream.write("path,device,label,patient_id\n")
        stream.writelines(f"train/NORMAL/IM-{i}.jpeg,{i % 2},0,p{i}\n" for i in range(1_000_000))
    assert ends_well(faults, lambda: read_review(table, "screening.review"))
    assert not ends_well(faults, lambda: read_index_table(table, ("a.png",)))
    assert not ends_well(
        faults,
        lambda: keep_answers(
            match_answers(read_answers(table, "answers"), MANIFEST, "x"),
            tmp_path / "kept",
            reviewer="a",
            place="x",
            now=NOW,
        ),
    )
