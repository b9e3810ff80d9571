"""CSV tables written by people: each row becomes a pydantic model, or the table is refused in one sentence."""

import csv
import stat
from collections.abc import Callable, Iterator
from inspect import signature
from pathlib import Path
from typing import Annotated, Literal, TextIO, TypeVar

from pydantic import BeforeValidator, ValidationError

from tasks.errors import TableError

MAX_MB = 200
MAX_LINE = 1_000_000  # characters

Device = Annotated[Literal[0, 1], BeforeValidator(lambda text: {"0": 0, "1": 1}.get(text, text))]
"""A person's reading of an image: 1 device, 0 none."""

Row = TypeVar("Row")


def read_rows(path: Path, setting: str, model: Callable[..., Row]) -> Iterator[Row]:
    """Reads a CSV with a header, UTF-8, one row at a time; blank rows are left out.

    Args:
        path: The file.
        setting: The table's name in messages: a setting or ``index.csv``.
        model: A pydantic class with a field for each column; it gets stripped text, empty where a cell is missing.
            A field without default is a required column; columns without a field are ignored.

    Raises:
        TableError: If the file is missing, not a CSV in UTF-8, lacks a column or names it twice, has a row with more
            cells than columns or with a value that the model refuses, or is far larger than any table about images.
    """
    fields = signature(model).parameters
    needed = ", ".join(name for name, field in fields.items() if field.default is field.empty)
    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode):
            raise TableError(f"{setting}: {path} is a folder, pipe or device, not a file; name a CSV file")
        if state.st_size > MAX_MB * 1e6:
            raise TableError(f"{setting}: {path} is larger than {MAX_MB} MB; give a table of images only")
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(_lines(stream), strict=True, skipinitialspace=True)
            filled = (row for row in reader if any(map(str.strip, row)))
            header = [cell.strip() for cell in next(filled, [])]
            if missing := [name for name in needed.split(", ") if name not in header]:
                raise TableError(f"{setting}: {path} lacks the column {', '.join(missing)}; it needs {needed}")
            if twice := [name for name in fields if header.count(name) > 1]:
                raise TableError(f"{setting}: {path} has the column {twice[0]} twice; keep one")
            places = {name: header.index(name) for name in fields if name in header}
            for row in filled:
                where = f"{setting}: {path} line {reader.line_num}"
                if any(map(str.strip, row[len(header) :])):
                    raise TableError(f"{where} has more cells than the header; put text with commas into quotes")
                cells = {name: row[at].strip() if at < len(row) else "" for name, at in places.items()}
                yield _validate(cells, model, where)
    except FileNotFoundError:
        raise TableError(f"{setting}: {path} does not exist; name a CSV file with the columns {needed}") from None
    except UnicodeDecodeError:
        raise TableError(f"{setting}: {path} is not UTF-8 text; save it as CSV in UTF-8") from None
    except (csv.Error, OSError, ValueError) as error:
        reason = str(error).split("\n")[0][:100]
        raise TableError(f"{setting}: {path} is not a CSV table ({reason}); give columns {needed}") from None


def _lines(stream: TextIO) -> Iterator[str]:
    while line := stream.readline(MAX_LINE):
        if len(line) == MAX_LINE:
            raise ValueError(f"a line has more than {MAX_LINE:,} characters")
        yield line


def _validate(cells: dict[str, str], model: Callable[..., Row], where: str) -> Row:
    try:
        return model(**cells)
    except ValidationError as error:
        first = error.errors()[0]
        reason = first["msg"].removeprefix("Value error, ").replace("Input should be", "it should be")
        raise TableError(f"{where} has {first['loc'][0]} = {first['input']!r:.100}; {reason}") from None
