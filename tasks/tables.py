"""CSV tables that people write: read as text, refused in one sentence when they do not fit."""

import csv
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TextIO

import pandas as pd

from tasks.records import TableError

# A list of cells takes up to a hundred times the memory of its text: these guard it.
MAX_MB = 500
MAX_COLUMNS = 1_000
MAX_CELLS = 20_000_000
MAX_ROW = 1_000_000  # characters
PART_CELLS = 200_000


def read_table(path: Path, setting: str, required: Sequence[str]) -> pd.DataFrame:
    """Reads a CSV with a header, UTF-8, every cell as stripped text (empty where missing).

    Args:
        path: The file.
        setting: What names it for the user, for messages: a setting or ``index.csv``.
        required: Columns that have to be there; others are kept as they are.

    Returns:
        The rows that are not blank; the index is the line in the file that a row ends on.

    Raises:
        TableError: If the file is missing, not a CSV in UTF-8, lacks a required column, names one twice, has a row with
            more cells than columns, or is far larger than any table about images.
    """
    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode):
            raise TableError(f"{setting}: {path} is no file but a folder, pipe or device; name a CSV file")
        if state.st_size > MAX_MB * 1e6:
            raise TableError(f"{setting}: {path} is larger than {MAX_MB} MB; give a table of images only")
        with path.open(encoding="utf-8-sig", newline="") as stream:
            filled = _read_rows(stream)
            header = next(filled, (0, []))[1]
            if len(header) > MAX_COLUMNS:
                raise TableError(
                    f"{setting}: {path} has {len(header):,} columns, more than {MAX_COLUMNS:,}; keep {_join(required)}"
                )
            missing = [column for column in required if column not in header]
            if missing:
                raise TableError(f"{setting}: {path} lacks the column {_join(missing)}; it needs {_join(required)}")
            twice = [column for column, n in Counter(header).items() if column and n > 1]
            if twice:
                raise TableError(f"{setting}: {path} has the column {twice[0]} twice; keep one")
            rows = ((line, _fit_row(row, len(header), f"{setting}: {path} line {line}")) for line, row in filled)
            parts, n_rows = [], 0
            # In parts, because a table packs its text several times closer than lists of cells do.
            while lines := list(islice(rows, max(PART_CELLS // max(len(header), 1), 1))):
                n_rows += len(lines)
                if n_rows * len(header) > MAX_CELLS:
                    raise TableError(f"{setting}: {path} has more than {MAX_CELLS:,} cells; keep {_join(required)}")
                cells, index = [row for _, row in lines], [line for line, _ in lines]
                parts.append(pd.DataFrame(cells, index=index, columns=header, dtype="str"))
    except FileNotFoundError:
        raise TableError(
            f"{setting}: {path} does not exist; name a CSV file with the columns {_join(required)}"
        ) from None
    except UnicodeDecodeError:
        raise TableError(f"{setting}: {path} is not UTF-8 text; save it as CSV in UTF-8") from None
    except (csv.Error, OSError, ValueError) as error:
        reason = str(error).split("\n")[0][:100]
        raise TableError(f"{setting}: {path} is no CSV table ({reason}); give columns {_join(required)}") from None
    table = pd.concat(parts) if parts else pd.DataFrame(columns=header, dtype="str")
    return table.loc[:, [bool(column) for column in header]]


def _read_rows(stream: TextIO) -> Iterator[tuple[int, list[str]]]:
    """The rows that are not blank, stripped, each with the line that it ends on.

    Raises:
        ValueError: If a row is longer than any about an image.
    """
    n_read = 0

    def lines() -> Iterator[str]:
        nonlocal n_read
        while line := stream.readline(MAX_ROW):
            n_read += len(line)
            if n_read >= MAX_ROW:
                raise ValueError(f"a row has more than {MAX_ROW:,} characters")
            yield line

    reader = csv.reader(lines(), strict=True, skipinitialspace=True)
    for row in reader:
        n_read = 0
        stripped = [cell.strip() for cell in row]
        if any(stripped):
            yield reader.line_num, stripped


def _fit_row(row: list[str], n_columns: int, where: str) -> list[str]:
    """The row with as many cells as there are columns; blank ones beyond the header are none."""
    if any(row[n_columns:]):
        raise TableError(f"{where} has more cells than the header; put text with commas into quotes")
    return [*row, *[""] * (n_columns - len(row))][:n_columns]


def refuse_values(table: pd.DataFrame, column: str, allowed: Sequence[str], path: Path, setting: str) -> None:
    """Raises TableError naming the first line whose value of ``column`` is not allowed."""
    wrong = table.index[~table[column].isin(allowed)]
    if len(wrong):
        value = table[column][wrong[0]]
        raise TableError(
            f"{setting}: {path} line {wrong[0]} has {column} = {value!r}; "
            f"allowed are {_join([a or '(empty)' for a in allowed])}"
        )


def _join(names: Sequence[str]) -> str:
    return ", ".join(names)
