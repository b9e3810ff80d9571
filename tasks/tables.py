"""CSV tables that people write: read as text, refused in one sentence when they do not fit."""

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

    Raises:
        TableError: If the file is missing, not a CSV in UTF-8, or lacks a required column.
    """
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig", skipinitialspace=True)
    except FileNotFoundError:
        raise TableError(
            f"{setting}: {path} does not exist; name a CSV file with the columns {_join(required)}"
        ) from None
    except UnicodeDecodeError:
        raise TableError(f"{setting}: {path} is not UTF-8 text; save it as CSV in UTF-8") from None
    except (pd.errors.ParserError, pd.errors.EmptyDataError, OSError, ValueError) as error:
        reason = str(error).split("\n")[0][:100]
        raise TableError(f"{setting}: {path} is no CSV table ({reason}); give columns {_join(required)}") from None
    missing = [column for column in required if column not in table.columns]
    if missing:
        raise TableError(f"{setting}: {path} lacks the column {_join(missing)}; it needs {_join(required)}")
    return table.map(lambda cell: cell.strip() if isinstance(cell, str) else "")


def refuse_values(table: pd.DataFrame, column: str, allowed: Sequence[str], path: Path, setting: str) -> None:
    """Raises TableError naming the first line whose value of ``column`` is not allowed."""
    wrong = table.index[~table[column].isin(allowed)]
    if len(wrong):
        line, value = int(wrong[0]) + 2, table[column][wrong[0]]
        raise TableError(
            f"{setting}: {path} line {line} has {column} = {value!r}; "
            f"allowed are {_join([a or '(empty)' for a in allowed])}"
        )


def _join(names: Sequence[str]) -> str:
    return ", ".join(names)
