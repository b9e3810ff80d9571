"""CSV tables that people write: read as text, refused in one sentence when they do not fit."""

import csv
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from tasks.records import TableError


def read_table(path: Path, setting: str, required: Sequence[str]) -> pd.DataFrame:
    """Reads a CSV with a header, UTF-8, every cell as stripped text (empty where missing).

    Args:
        path: The file.
        setting: What names it for the user, for messages: a setting or ``index.csv``.
        required: Columns that have to be there; others are kept as they are.

    Returns:
        The rows that are not blank; the index is the line in the file that a row ends on.

    Raises:
        TableError: If the file is missing, not a CSV in UTF-8, lacks a required column, names one twice, or has a row
            with more cells than columns.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, strict=True, skipinitialspace=True)
            lines = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except FileNotFoundError:
        raise TableError(
            f"{setting}: {path} does not exist; name a CSV file with the columns {_join(required)}"
        ) from None
    except UnicodeDecodeError:
        raise TableError(f"{setting}: {path} is not UTF-8 text; save it as CSV in UTF-8") from None
    except (csv.Error, OSError) as error:
        reason = str(error).split("\n")[0][:100]
        raise TableError(f"{setting}: {path} is no CSV table ({reason}); give columns {_join(required)}") from None
    filled = [(line, row) for line, row in lines if any(row)]
    header = filled[0][1] if filled else []
    missing = [column for column in required if column not in header]
    if missing:
        raise TableError(f"{setting}: {path} lacks the column {_join(missing)}; it needs {_join(required)}")
    twice = [column for column in header if column and header.count(column) > 1]
    if twice:
        raise TableError(f"{setting}: {path} has the column {twice[0]} twice; keep one")
    for line, row in filled[1:]:
        if any(row[len(header) :]):
            raise TableError(
                f"{setting}: {path} line {line} has more cells than the header; put text with commas into quotes"
            )
    cells = [[*row, *[""] * len(header)][: len(header)] for _, row in filled[1:]]
    table = pd.DataFrame(cells, index=[line for line, _ in filled[1:]], columns=header, dtype="str")
    return table.loc[:, [bool(column) for column in header]]


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
