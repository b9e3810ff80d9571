"""Tables written by people, CSV or Excel: each row becomes a pydantic model, or the table is refused in one sentence.

A CSV may be of any program: with commas, semicolons or tabs, in UTF-8, UTF-16 or Windows-1252, names of columns in any
case. Nothing is guessed: the separator is the one with which the first line holds the columns that are needed.
"""

import csv
import itertools
import re
import stat
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
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
SEPARATORS = (",", ";", "\t")
MARKS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16", b"\xef\xbb\xbf": "utf-8-sig"}
NO_LETTER = re.compile(rb"[\x80-\xbf\xd7\xf7]")
"""What is no letter in Windows-1252: there lie the letters of other encodings (DOS, Mac)."""

Device = Annotated[Literal[0, 1], BeforeValidator(lambda text: {"0": 0, "1": 1}.get(text, text))]
"""A person's reading of an image: 1 device, 0 none."""

LABELS = {"0": 0, "normal": 0, "1": 1, "pneumonia": 1}


def _read_label(word: str) -> int:
    if word.lower() not in LABELS:
        raise ValueError("it should be 0, 1, normal or pneumonia")
    return LABELS[word.lower()]


Label = Annotated[int, BeforeValidator(_read_label)]
"""The class of an image, by number or name: 0 normal, 1 pneumonia."""

Row = TypeVar("Row")
Lines = Iterator[tuple[int, list[str]]]
"""Number of a line or row in the file, and its cells."""

UNKNOWN = re.compile(
    r"[0\W_]{2,}|\W|x{3,}|9{5,}|na|n[/.]a\.?|<na>|nan|null|none|nil|unknown|unbekannt|missing|not available|removed"
    r"|deleted|anon(ymous|ymi[sz]ed)?([ ^_]patient)?|de-?identified|#(n/a|ref!|value!|name\?|div/0!|null!|num!)",
    re.IGNORECASE,
)
"""What tables and DICOM tags hold where something is not known."""


def blank_unknown(text: str) -> str:
    """A cell without spaces around it; empty where it says that nothing is known."""
    return "" if UNKNOWN.fullmatch(text.strip()) else text.strip()


def list_rows(path: Path, setting: str, model: Callable[..., Row]) -> list[Row]:
    """The rows of a table of images, as ``read_rows``; TableError also where it lists none."""
    rows = list(read_rows(path, setting, model))
    if not rows:
        raise TableError(f"{setting}: {path} lists no image; add a line per image")
    return rows


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
            seen = f"begins with {','.join(filter(None, header))!r:.100}, " if header else ""
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
    if start == b"\xd0\xcf\x11\xe0":
        raise ValueError("it is an old Excel file (.xls), or one with a password")
    rows = (
        _read_sheet(path, needed) if start == b"PK\x03\x04" else _read_text(path, _find_encoding(path, start), needed)
    )
    return ((n, row) for n, row in rows if any(map(str.strip, row)))


def _plain(header: list[str]) -> list[str]:
    """Names of columns in one form: ``Patient ID`` is ``patient_id``."""
    return [re.sub(r"[\s_-]+", "_", cell.strip()).lower() for cell in header]


def _read_text(path: Path, encoding: str, needed: set[str]) -> Lines:
    with path.open(encoding=encoding, newline="") as stream:
        lines = _lines(stream)
        n_before, separators, first = 0, list(SEPARATORS), ""
        for first in lines:
            if found := re.fullmatch(r'"?sep=(.)"?\s*', first, re.IGNORECASE):  # Excel writes and reads this line
                separators = [found[1]]
            elif first.strip(' \t\r\n,;"'):
                break
            n_before += 1
        fitting = (mark for mark in separators if needed <= set(_plain(first.replace('"', "").split(mark))))
        marked = itertools.chain([first], lines)
        reader = csv.reader(marked, delimiter=next(fitting, separators[0]), strict=True, skipinitialspace=True)
        for row in reader:
            yield n_before + reader.line_num, row


def _find_encoding(path: Path, start: bytes) -> str:
    if marked := [name for mark, name in MARKS.items() if start.startswith(mark)]:
        return marked[0]
    with suppress(UnicodeDecodeError), path.open(encoding="utf-8") as text:
        while text.read(1 << 20):
            pass
        return "utf-8"
    with path.open("rb") as stream:
        while piece := stream.read(1 << 20):
            if found := NO_LETTER.search(piece):
                seen = piece[max(found.start() - 20, 0) : found.end()]
                raise ValueError(f"{seen!r} is not certain in any encoding; save it in UTF-8")
    print(f"{path} is not UTF-8; read as Windows-1252")
    return "cp1252"


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
            if sum(entry.file_size for entry in archive.infolist()) > MAX_SHEETS_MB * 1e6:
                raise ValueError(f"it unpacks to more than {MAX_SHEETS_MB} MB")
        with path.open("rb") as stream, closing(openpyxl.load_workbook(stream, True, data_only=True)) as workbook:
            fitting = [s for s in workbook.worksheets if needed <= set(_plain(next(_rows_of(s), (0, []))[1]))]
            if len(fitting) > 1:
                raise ValueError(f"the sheets {' and '.join(s.title for s in fitting)} have the columns; keep one")
            yield from _rows_of((fitting or workbook.worksheets)[0])
    except Exception as error:  # whatever a damaged part makes openpyxl raise
        raise error if isinstance(error, ValueError) else ValueError(f"it is no whole workbook: {error!r}") from None


def _rows_of(sheet: Any) -> Lines:
    """Cells as a CSV has them: 1 for the number 1.0."""
    sheet.reset_dimensions()  # other programs write wrong ones
    for n, row in enumerate(sheet.iter_rows(max_col=MAX_COLUMNS, values_only=True), start=1):
        values = (int(value) if isinstance(value, float) and value.is_integer() else value for value in row)
        yield n, ["" if value is None else str(value) for value in values]


def _validate(cells: dict[str, str], model: Callable[..., Row], where: str) -> Row:
    try:
        return model(**cells)
    except ValidationError as error:
        first = error.errors()[0]
        reason = first["msg"].removeprefix("Value error, ").replace("Input should be", "it should be")
        raise TableError(f"{where} has {first['loc'][0]} = {first['input']!r:.100}; {reason}") from None
