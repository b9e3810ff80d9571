"""People's answers about doubtful images, kept for all runs in a folder beside them, ``device_answers/``.

Each submission is a file of its own, which never changes: a CSV ``path,sha256,device,reviewer,time``, device 1 seen or
0 not, time ISO 8601 (UTC if no zone is given). The newest answer about an image counts. An answer belongs to the
content of a file, not to its path, which may occur in other data sets too. Earlier versions kept all answers in one
table beside that folder, ``device_answers.csv``: it is read, but not written.
"""

import csv
import getpass
import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import pandas as pd
from pydantic import AfterValidator, BeforeValidator, Field
from pydantic.dataclasses import dataclass

from tasks.errors import SettingsError, TableError
from tasks.files import write_whole
from tasks.matching import accept_match, match_paths
from tasks.records import Facts
from tasks.runs.run import Run
from tasks.runs.s3_client import open_bucket
from tasks.tables import Device, read_rows

ANSWERS = "device_answers"
TABLE = f"{ANSWERS}.csv"
COLUMNS = ("path", "sha256", "device", "reviewer", "time")
FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""A spreadsheet runs a cell that starts with one of these as a formula."""

LONGEST_NAME = 100
CLOCK_SKEW = timedelta(days=1)
"""A time further ahead than clocks differ is a mistake, and would override every later answer."""


def _check_sha256(text: str) -> str:
    if not re.fullmatch("([0-9a-f]{64})?", text.lower()):
        raise ValueError("give 64 hex digits or leave it empty")
    return text.lower()


def _check_reviewer(name: str) -> str:
    name = name.strip()
    if name.startswith(FORMULA):
        raise ValueError("a spreadsheet takes that for a formula, write a name")
    if len(name) > LONGEST_NAME or not name.isprintable():
        raise ValueError(f"write a name of at most {LONGEST_NAME} characters in one line")
    return name


def _read_time(given: str | datetime | None) -> datetime | None:
    if not given:
        return None
    try:
        time = datetime.fromisoformat(given) if isinstance(given, str) else given
        return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
    except (ValueError, OverflowError):
        raise ValueError("write it like 2026-01-31T09:30:00Z or leave it empty") from None


@dataclass(frozen=True, slots=True)
class Answer:
    """A person's answer about an image: ``device`` 1 seen, 0 not; ``sha256`` empty or 64 hex digits."""

    path: Annotated[str, Field(min_length=1), AfterValidator(lambda text: text.removeprefix("./"))]
    device: Device
    sha256: Annotated[str, AfterValidator(_check_sha256)] = ""
    reviewer: Annotated[str, AfterValidator(_check_reviewer)] = ""
    time: Annotated[datetime | None, BeforeValidator(_read_time)] = None


def answers_folder(run: Run) -> Path:
    """The folder of answers: ``screening.answers`` without ``.csv``, else ``device_answers`` beside the run folder.

    Raises:
        SettingsError: If the setting names no folder on this machine.
    """
    named = run.settings.screening.answers
    if named is None:
        folder = Path("data/runs/run") if run.settings.run_dir is None else run.folder
        return folder.resolve().parent / ANSWERS
    folder = Path(named.removesuffix(".csv"))
    if "://" in named:
        raise SettingsError(f"screening.answers: {named} is not on this machine; name a folder here")
    if folder.is_file():
        raise SettingsError(f"screening.answers: {folder} is a file; name a folder, or let the file's name end in .csv")
    return folder


def share_answers(run: Run) -> None:
    """Syncs the answers kept here with those beside a run in a bucket, in both directions.

    Answers that could not be sent when they were given, because credentials had expired, are sent by the next run.

    Raises:
        TableError: If a file from the bucket is not a table of answers.
        RunError: If the bucket cannot be used.
    """
    if run.settings.screening.answers is not None or not run.in_bucket:
        return
    bucket, folder = open_bucket(run.runs, run.settings.ingestion), answers_folder(run)
    there = bucket.entries(f"{ANSWERS}/")
    for name in (TABLE, *(name for name in there if name.endswith(".csv"))):
        path = folder / Path(name).name
        if path.exists() and name != TABLE:  # TABLE changes: earlier versions write it
            continue
        bucket.get(name, path)
        try:
            if path.exists():
                read_answers(path, "screening.answers")
        except TableError as error:
            path.unlink()
            raise TableError(str(error).replace(str(path), f"{run.runs}/{name}")) from None
    for path in folder.glob("*.csv"):
        if f"{ANSWERS}/{path.name}" not in there:
            bucket.put(path, f"{ANSWERS}/{path.name}")


def read_answered(run: Run) -> dict[str, int]:
    """The kept answers that count: sha256 -> 0 or 1; empty if there are none.

    Raises:
        TableError: As ``read_kept``.
    """
    return newest(read_kept(answers_folder(run)))


def read_kept(folder: Path) -> list[Answer]:
    """All kept answers, once each: from the files in a folder, and from a CSV of the same name beside it.

    Raises:
        TableError: As ``read_answers``, also if two of these files contradict each other, and for a row without a
            sha256.
    """
    table, answers = folder.with_name(f"{folder.name}.csv"), []
    for path in ([table] if table.exists() else []) + sorted(folder.glob("*.csv")):
        for answer in read_answers(path, "screening.answers"):
            if not answer.sha256:
                raise TableError(
                    f"screening.answers: {path} has no sha256 for {answer.path!r}, so that it could be about another "
                    "file; take such answers with python -m flows.review"
                )
            answers.append(answer)
    _refuse_contradictions(answers, f"screening.answers: {folder}")
    return list(dict.fromkeys(answers))


def read_answers(path: Path, setting: str) -> list[Answer]:
    """The rows of a table of answers, in its order; ``sha256``, ``reviewer`` and ``time`` may be missing.

    Args:
        path: A CSV with at least ``path,device``.
        setting: The table's name in messages.

    Raises:
        TableError: On values that do not fit, and on two contradicting answers about one image with the same time or
            both without one.
    """
    answers = list(read_rows(path, setting, Answer))
    _refuse_contradictions(answers, f"{setting}: {path}")
    return answers


def default_reviewer() -> str:
    """The user of this machine; ``unknown`` if there is no name."""
    try:
        return _check_reviewer(getpass.getuser()) or "unknown"
    except (OSError, KeyError, ImportError, ValueError):
        return "unknown"


# -- what counts -------------------------------------------------------------------------------------------------------


def newest(answers: Iterable[Answer]) -> dict[str, int]:
    """The answers that count, by content: sha256 -> 0 or 1, independent of their order.

    Of each path and content the newest answer counts; one without time counts only if there is no other. Identical
    files under several paths with different answers count as showing a device.
    """
    counts: dict[str, int] = {}
    for (_, sha256), answer in _newest_of_each(answers).items():
        counts[sha256] = max(counts.get(sha256, 0), answer.device)
    return counts


def _newest_of_each(answers: Iterable[Answer]) -> dict[tuple[str, str], Answer]:
    def age(answer: Answer) -> tuple[datetime, int, str]:  # device and reviewer only make the order unique
        return (answer.time or datetime.min.replace(tzinfo=UTC), answer.device, answer.reviewer)

    return {(answer.path, answer.sha256): answer for answer in sorted(answers, key=age)}


def _refuse_contradictions(answers: Iterable[Answer], place: str) -> None:
    devices: dict[tuple[str, str, datetime | None], int] = {}
    for answer in answers:
        if devices.setdefault((answer.path, answer.sha256, answer.time), answer.device) != answer.device:
            when = f"at {write_time(answer.time)}" if answer.time else "without a time"
            raise TableError(f"{place} says 0 and 1 about {answer.path!r} {when}; keep one line")


# -- taking new ones ---------------------------------------------------------------------------------------------------


def name_images(with_device: str, without_device: str, manifest: pd.DataFrame) -> list[Answer]:
    """Answers from two short lists of image ids, separated by commas or blanks.

    Raises:
        TableError: If an id is not in the manifest, or in both lists.
    """
    paths = dict(zip(manifest["image_id"], manifest["path"], strict=True))
    answers = []
    for field, text in (("with_device", with_device), ("without_device", without_device)):
        for image in filter(None, re.split(r"[\s,;]+", text.lower())):
            if image not in paths:
                raise TableError(f"{field}: {image!r} is not an image_id of this run; copy it from the sheet")
            answers.append(Answer(paths[image].strip(), 1 if field == "with_device" else 0))
    _refuse_contradictions(answers, "with_device, without_device: the form")
    return answers


def match_answers(
    answers: list[Answer], manifest: pd.DataFrame, place: str, max_unmatched: float = 0.0
) -> list[Answer]:
    """The answers that are about images of a manifest, each with its image's path and sha256.

    Args:
        place: The answers in messages.
        max_unmatched: Largest accepted share of them that name no image.

    Raises:
        TableError: If more name no image, or one has another sha256.
    """
    contents = dict(zip(manifest["path"], manifest["sha256"], strict=True))
    match = match_paths((answer.path for answer in answers), contents)
    if answers and (warning := accept_match(match, place, contents, max_unmatched)):
        print(f"warning: {warning}")
    found = []
    for answer in answers:
        image = match.images.get(answer.path)
        if image and answer.sha256 not in ("", contents[image]):
            raise TableError(
                f"{place} is about another file {answer.path!r} than the one of this run, its sha256 differs; take it "
                "with the run that it belongs to"
            )
        if image:
            found.append(replace(answer, path=image.strip(), sha256=contents[image]))
    return found


def keep_answers(answers: list[Answer], folder: Path, *, reviewer: str, place: str, now: datetime) -> Facts:
    """Saves answers (``match_answers``) as a new file in the folder, named by time and content.

    Returns:
        Numbers of images: ``n_taken`` that the answers are about, of these ``n_new``, ``n_changed``, ``n_unchanged``,
        ``n_older`` (a newer answer exists and counts) and ``n_with_device``; ``n_kept`` answers in all files.

    Raises:
        TableError: On a time in the future, or a contradiction to an answer of the same time.
    """
    try:
        reviewer = _check_reviewer(reviewer)
    except ValueError as error:
        raise TableError(f"reviewer: {reviewer!r:.100} is not a name; {error}") from None
    for answer in answers:
        if answer.time and answer.time > now + CLOCK_SKEW:
            raise TableError(
                f"{place} has an answer about {answer.path!r} from {write_time(answer.time)}, which lies ahead"
            )
    _refuse_contradictions(answers, place)
    kept = read_kept(folder)
    before, given = _newest_of_each(kept), _newest_of_each(answers)
    everything = dict.fromkeys(kept)
    for answer in answers:
        stamped = replace(answer, reviewer=answer.reviewer or reviewer, time=answer.time or now)
        last = before.get((answer.path, answer.sha256))
        # Taking the same list again adds no reading.
        if answer.time or not last or (last.device, last.reviewer) != (stamped.device, stamped.reviewer):
            everything[stamped] = None
    _refuse_contradictions(everything, f"{place} and {folder} together: one")
    if len(everything) > len(kept):
        text = write_table(list(everything)[len(kept) :])
        name = f"{now.astimezone(UTC):%Y%m%dT%H%M%SZ}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.csv"
        write_whole(folder / name, text)
    after = _newest_of_each(everything)
    changes = Counter(_describe_change(before.get(key), after[key], answer) for key, answer in given.items())
    return {
        "n_taken": len(given),
        **{name: changes[name] for name in ("n_new", "n_changed", "n_unchanged", "n_older")},
        "n_with_device": sum(after[key].device for key in given),
        "n_kept": len(everything),
    }


def _describe_change(was: Answer | None, counts: Answer, given: Answer) -> str:
    if was is None:
        return "n_new"
    if was.device != counts.device:
        return "n_changed"
    return "n_unchanged" if counts.device == given.device else "n_older"


def write_table(answers: Iterable[Answer]) -> str:
    """Answers as the text of a CSV."""
    rows = ((safe_path(a.path), a.sha256, a.device, a.reviewer, write_time(a.time)) for a in answers)
    return pd.DataFrame(rows, columns=COLUMNS).to_csv(index=False, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")


def safe_path(path: str) -> str:
    """A path as a cell that no spreadsheet runs as a formula; ``./`` before it names the same file."""
    return f"./{path}" if path.startswith(FORMULA) else path


def write_time(time: datetime | None) -> str:
    """ISO 8601 in UTC with ``Z``; empty without a time."""
    return "" if time is None else time.isoformat().replace("+00:00", "Z")
