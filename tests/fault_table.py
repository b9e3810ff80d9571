"""The table of faults that ``make faults`` prints last: what was tried, what survived, what was done twice."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

COUNTS = ("n_tried", "n_survived", "n_lost", "n_corrupt")


@dataclass
class Row:
    """One fault over all its attempts."""

    n_tried: int = 0
    n_survived: int = 0
    n_lost: int = 0
    n_corrupt: int = 0
    repeated: list[str] = field(default_factory=list)


@dataclass
class FaultTable:
    """What the session has tried.

    Attributes:
        rows: By the fault's name, in the order of the tests.
        n_cases: Cases of hostile input.
    """

    rows: dict[str, Row] = field(default_factory=dict)
    n_cases: int = 0

    @contextmanager
    def attempt(self, fault: str) -> Iterator["Attempt"]:
        """One attempt: survived if its block ends without an exception."""
        row = self.rows.setdefault(fault, Row())
        row.n_tried += 1
        yield Attempt(row)
        row.n_survived += 1

    def print(self) -> None:
        """The table in Markdown, and the line that sums it up."""
        print("\n| fault | tried | survived | work repeated |\n| --- | --- | --- | --- |")
        for name, row in self.rows.items():
            counts = {what: row.repeated.count(what) for what in row.repeated}
            repeated = "; ".join(f"{what} ({n} times)" if n > 1 else what for what, n in counts.items())
            print(f"| {name} | {row.n_tried} | {row.n_survived} | {repeated or 'none'} |")
        total = {name: sum(getattr(row, name) for row in self.rows.values()) for name in COUNTS}
        print(
            f"\nfaults: {total['n_tried']} tried, {total['n_survived']} survived, {total['n_lost']} lost, "
            f"{total['n_corrupt']} corrupt, {self.n_cases:,} cases",
            flush=True,
        )


class Attempt:
    """What one attempt tells of itself."""

    def __init__(self, row: Row) -> None:
        self.row = row

    def repeated(self, what: str) -> None:
        """Notes work that was done twice, in words that the table can show: ``one epoch``."""
        self.row.repeated.append(what)

    def kept(self, condition: bool, what: str) -> None:
        """Asserts that a result is still there."""
        self.row.n_lost += not condition
        assert condition, what

    def whole(self, condition: bool, what: str) -> None:
        """Asserts that an output is what an unbroken run makes."""
        self.row.n_corrupt += not condition
        assert condition, what
