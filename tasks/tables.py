"""Tables written by people, CSV or Excel: each row becomes a pydantic model, or the table is refused in one sentence.

A CSV may be of any program: with commas, semicolons or tabs, in UTF-8, UTF-16 or Windows-1252, names of columns in any
case. Nothing is guessed: the separator is the one with which the first line holds the columns that are needed.
"""

import csv
import datetime
import itertools
import re
import stat
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing
from inspect import signature
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO, TypeVar

from pydantic import BeforeValidator, ValidationError

from tasks.errors import TableError

MAX_MB = 200
MAX_SHEETS_MB = 64
"""Unpacked; openpyxl keeps all texts of a workbook in memory."""
MAX_LINE = 1_000_000  # characters
MAX_COLUMNS = 256
"""Columns of a sheet that are looked at; a cell in the last of its 16,384 would fill the row up to there."""
NO_VALUE = re.compile(rb'<c (?![^>]*t="str")[^>]*>\s*<f([^>]*/>|[^<]*</f>)\s*(<v ?/>|<v></v>)?\s*</c>')
"""In a sheet: a formula without the value that Excel keeps with it. openpyxl would take it for an empty cell."""
SEPARATORS = (",", ";", "\t")
MARKS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16", b"\xef\xbb\xbf": "utf-8-sig"}
REPLACED = "\ufffd"
NOT_CERTAIN = dict.fromkeys(map(ord, bytes(range(0x80, 0xC0)).decode("cp1252", "ignore") + "×÷"), REPLACED)
"""What is no letter in Windows-1252: there lie the letters of other encodings (DOS, Mac), which it may be."""
OTHERS = {b"\xd0\xcf\x11\xe0": "an old Excel file (.xls), or one with a password", b"%PDF": "a PDF"}

Device = Annotated[Literal[0, 1], BeforeValidator(lambda text: {"0": 0, "1": 1}.get(text, text))]
"""A person's reading of an image: 1 device, 0 none."""

Row = TypeVar("Row")
Lines = Iterator[tuple[int, list[str]]]
"""Number of a line or row in the file, and its cells."""

UNKNOWN = {"-", "--", "?", ".", "na", "n/a", "n.a.", "#n/a", "<na>", "nan", "null", "none", "nil", "unknown"} | {
    "anon",
    "anonymous",
    "anonymized",
    "anonymised",
}
"""Cells, in lower case, with which tables say that something is not known."""


def blank_unknown(text: str) -> str:
    """A cell without spaces around it; empty where it says that nothing is known."""
    return "" if text.strip().lower() in UNKNOWN else text.strip()


def read_rows(path: Path, setting: str, model: Callable[..., Row]) -> Iterator[Row]:
    """Reads a CSV or a sheet of Excel with a header, one row at a time; blank rows are left out.

    Args:
        path: The file; its content decides which of the two it is.
        setting: The table's name in messages: a setting or ``index.csv``.
        model: A pydantic class with a field for each column; it gets stripped text, empty where a cell is missing.
            A field without default is a required column; columns without a field are ignored.

    Raises:
        TableError: If the file is missing, not a table, in an encoding that is not certain, lacks a column or names it
            twice, has a row with more cells than columns or with a value that the model refuses, or is far larger than
            any table about images.
    """
    fields = signature(model).parameters
    needed = [name for name, field in fields.items() if field.default is field.empty]
    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode):
            raise TableError(f"{setting}: {path} is a folder, pipe or device, not a file; name a CSV file")
        if state.st_size > MAX_MB * 1e6:
            raise TableError(f"{setting}: {path} is larger than {MAX_MB} MB; give a table of images only")
        lines = _open_table(path, set(needed))
        _, header = next(lines, (0, []))
        names = _plain(header)
        if missing := [name for name in needed if name not in names]:
            seen = f"begins with {','.join(header)!r:.100}, " if header else ""
            raise TableError(
                f"{setting}: {path} {seen}lacks the column {', '.join(missing)}; it needs {', '.join(needed)}"
            )
        if twice := [name for name in fields if names.count(name) > 1]:
            raise TableError(f"{setting}: {path} has the column {twice[0]} twice; keep one")
        places = {name: names.index(name) for name in fields if name in names}
        for n, row in lines:
            where = f"{setting}: {path} line {n}"
            if any(map(str.strip, row[len(header) :])):
                raise TableError(f"{where} has more cells than the header; put text with commas into quotes")
            cells = {name: row[at].strip() if at < len(row) else "" for name, at in places.items()}
            yield _validate(cells, model, where)
    except FileNotFoundError:
        needs = ", ".join(needed)
        raise TableError(f"{setting}: {path} does not exist; name a CSV file with the columns {needs}") from None
    except (csv.Error, OSError, ValueError) as error:
        reason = str(error).split("\n")[0][:100]
        raise TableError(f"{setting}: {path} is not a CSV table ({reason}); give columns {', '.join(needed)}") from None


def _open_table(path: Path, needed: set[str]) -> Lines:
    """Rows that are not blank, the header first."""
    with path.open("rb") as stream:
        start = stream.read(4)
    for first, kind in OTHERS.items():
        if start.startswith(first):
            raise ValueError(f"it is {kind}")
    rows = _read_sheet(path, needed) if start == b"PK\x03\x04" else _read_text(path, start, needed)
    return ((n, row) for n, row in rows if any(map(str.strip, row)))


def _plain(header: list[str]) -> list[str]:
    """Names of columns in one form: ``Patient ID`` is ``patient_id``."""
    return [re.sub(r"[\s_-]+", "_", cell.strip()).lower() for cell in header]


def _read_text(path: Path, start: bytes, needed: set[str]) -> Lines:
    encoding = next((name for mark, name in MARKS.items() if start.startswith(mark)), "utf-8")
    if encoding == "utf-8" and not _is_utf_8(path):
        encoding = "cp1252"
        print(f"{path} is not UTF-8; read as Windows-1252, of which only the letters are taken for certain")
    with path.open(encoding=encoding, newline="", errors="replace" if encoding == "cp1252" else "strict") as stream:
        lines = _lines(stream)
        if encoding == "cp1252":
            lines = (line.translate(NOT_CERTAIN) for line in lines)
        n_before, separators, first = 0, list(SEPARATORS), ""
        for first in lines:
            if found := re.fullmatch(r'"?sep=(.)"?\s*', first, re.IGNORECASE):  # Excel writes and reads this line
                separators = [found[1]]
            elif first.strip(' \t\r\n,;"'):
                break
            n_before += 1
        separator = next((mark for mark in separators if needed <= _columns(first, mark)), separators[0])
        reader = csv.reader(itertools.chain([first], lines), delimiter=separator, strict=True, skipinitialspace=True)
        for row in reader:
            yield n_before + reader.line_num, row


def _columns(line: str, separator: str) -> set[str]:
    try:
        return set(_plain(next(csv.reader([line], delimiter=separator, skipinitialspace=True), [])))
    except csv.Error:
        return set()


def _is_utf_8(path: Path) -> bool:
    try:
        with path.open(encoding="utf-8") as stream:
            while stream.read(1 << 20):
                pass
    except UnicodeDecodeError:
        return False
    return True


def _lines(stream: TextIO) -> Iterator[str]:
    while line := stream.readline(MAX_LINE):
        if len(line) == MAX_LINE:
            raise ValueError(f"a line has more than {MAX_LINE:,} characters")
        yield line


def _read_sheet(path: Path, needed: set[str]) -> Lines:
    """The rows of the one sheet that has the columns."""
    import openpyxl

    warnings.filterwarnings("ignore", module="openpyxl")  # of what it does not keep: filters, drawings
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
            if "xl/workbook.xml" not in sizes:
                raise ValueError("it is a zip archive, not a workbook of Excel")
            if sum(sizes.values()) > MAX_SHEETS_MB * 1e6:
                raise ValueError(f"it unpacks to more than {MAX_SHEETS_MB} MB")
            if any(NO_VALUE.search(archive.read(name)) for name in sizes if name.startswith("xl/worksheets/")):
                raise ValueError("it holds formulas that were never calculated; save it once in Excel")
        with path.open("rb") as stream, closing(openpyxl.load_workbook(stream, True, data_only=True)) as workbook:
            fitting = [s for s in workbook.worksheets if needed <= set(_plain(next(_rows_of(s), (0, []))[1]))]
            if len(fitting) > 1:
                raise ValueError(f"the sheets {' and '.join(s.title for s in fitting)} have the columns; keep one")
            yield from _rows_of((fitting or workbook.worksheets)[0])
    except Exception as error:  # whatever a damaged part makes openpyxl raise
        raise error if isinstance(error, ValueError) else ValueError(f"the workbook is damaged: {error!r}") from None


def _rows_of(sheet: Any) -> Lines:
    sheet.reset_dimensions()  # other programs write wrong ones
    for n, row in enumerate(sheet.iter_rows(max_col=MAX_COLUMNS), start=1):
        cells = [_text_of(cell) for cell in row]
        while cells and not cells[-1]:
            cells.pop()
        yield n, cells


def _text_of(cell: Any) -> str:
    """A cell as a CSV has it: 1 for the number 1.0, and the zeros before a number that its format shows."""
    value = cell.value
    if value is None or cell.data_type == "e":
        return "" if value is None else f"{REPLACED}{value}"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and re.fullmatch("0{2,99}", cell.number_format):
        return str(value).zfill(len(cell.number_format))
    return value.isoformat() if isinstance(value, datetime.date) else str(value)


def _validate(cells: dict[str, str], model: Callable[..., Row], where: str) -> Row:
    for name, text in cells.items():
        if REPLACED in text:
            raise TableError(
                f"{where} has {name} = {text!r:.100}, of which a character or value is not certain; "
                "correct it and save the table as CSV in UTF-8"
            )
    try:
        return model(**cells)
    except ValidationError as error:
        first = error.errors()[0]
        reason = first["msg"].removeprefix("Value error, ").replace("Input should be", "it should be")
        raise TableError(f"{where} has {first['loc'][0]} = {first['input']!r:.100}; {reason}") from None
