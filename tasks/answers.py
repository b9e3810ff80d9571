"""Answers: what people said about doubtful images, in one table for all runs.

A CSV ``path,sha256,device,reviewer,time``: device 1 seen or 0 not, time ISO 8601 (UTC where no zone is given). Rows are
added and never taken away; of one image the newest counts. An answer holds for the content of a file, not for its path,
which occurs in other data sets too. By default the table lies beside the run folder, as ``device_answers.csv``.
"""

import csv
import getpass
import io
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pandas as pd

from tasks.records import Facts, SettingsError, TableError
from tasks.run_copies import share_beside
from tasks.settings import Settings
from tasks.storage import locked, run_folder, runs_address, write_whole
from tasks.tables import read_table, refuse_values

ANSWERS = "device_answers.csv"
COLUMNS = ("path", "sha256", "device", "reviewer", "time")
FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""A spreadsheet takes a cell that starts with one of these for a formula, and runs it."""

LONGEST_NAME = 100
CLOCK_SKEW = timedelta(days=1)
"""A time further ahead than clocks differ is a mistake, and would outlast every later answer."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a person said about an image: ``device`` 1 seen, 0 not; ``sha256`` empty or 64 hex digits."""

    path: str
    sha256: str
    device: int
    reviewer: str = ""
    time: datetime | None = None


def answers_address(settings: Settings) -> Path:
    """Where answers are kept: ``screening.answers``, else ``device_answers.csv`` beside the run folder.

    Raises:
        SettingsError: If the setting names no place on this machine.
    """
    named = settings.screening.answers
    if named is not None and "://" in named:
        raise SettingsError(f"screening.answers: {named} is not on this machine; name a CSV file here")
    if named is not None:
        return Path(named)
    run = Path("data/runs/run") if settings.run_dir is None else run_folder(settings)
    return run.resolve().parent / ANSWERS


def share_answers(settings: Settings) -> None:
    """Joins the answers here with those that lie beside a run in a bucket: each of the two tables gets what it lacks.

    Answers that could not be sent when they were given, because credentials had expired, go with the next run.

    Raises:
        TableError: If one of the tables does not fit, or they contradict each other.
        RunError: If the bucket cannot be used.
    """
    address = answers_address(settings)

    def join(there: Path) -> None:
        with locked(address.with_name(f".{address.name}.lock")):
            everything = _in_order({*_read_there(there, settings), *(read_kept(address) if address.exists() else ())})
            _refuse_contradictions(everything, f"screening.answers: {address} and those in the bucket together: one")
            write_whole(address, write_table(everything))

    if settings.screening.answers is None:
        share_beside(settings, ANSWERS, join)


def _read_there(copy: Path, settings: Settings) -> list[Answer]:
    try:
        return read_kept(copy)
    except TableError as error:  # the copy is gone when somebody looks for it
        raise TableError(str(error).replace(str(copy), f"{runs_address(settings)}/{ANSWERS}")) from None


def read_answered(settings: Settings) -> dict[str, int]:
    """What is known of images by the answers at the address: sha256 -> 0 or 1; empty while nobody answered.

    Raises:
        TableError: If the table does not fit, or a row of it has no sha256.
    """
    address = answers_address(settings)
    return newest(read_kept(address)) if address.exists() else {}


def read_kept(address: Path) -> list[Answer]:
    """The answers of a table that keeps them, where every row names the content it is about.

    Raises:
        TableError: As ``read_answers``, and for a row without sha256.
    """
    answers = read_answers(address, "screening.answers")
    for answer in answers:
        if not answer.sha256:
            raise TableError(
                f"screening.answers: {address} has no sha256 for {answer.path!r}, so that it could be about another "
                "file; take such answers with python -m flows.review"
            )
    return answers


def read_answers(path: Path, setting: str) -> list[Answer]:
    """The rows of an answers table, in its order; ``sha256``, ``reviewer`` and ``time`` may be missing.

    Args:
        path: A CSV with at least ``path,device``.
        setting: What names it for the user, for messages.

    Raises:
        TableError: On values that do not fit, and on two answers about one image that contradict each other and are
            from the same time or both without one.
    """
    table = read_table(path, setting, ("path", "device"))
    refuse_values(table, "device", ("0", "1"), path, setting)
    answers = []
    rows = table.reindex(columns=list(COLUMNS), fill_value="").itertuples(name=None)
    for line, *values in rows:
        place = f"{setting}: {path} line {line}"
        cells = dict(zip(COLUMNS, values, strict=True))
        sha256 = cells["sha256"].lower()
        if sha256 and not re.fullmatch("[0-9a-f]{64}", sha256):
            raise TableError(f"{place} has sha256 = {cells['sha256']!r}; give 64 hex digits or leave it empty")
        if not cells["path"]:
            raise TableError(f"{place} has no path; name the image")
        reviewer = check_reviewer(cells["reviewer"], place)
        time = _read_time(cells["time"], place)
        answers.append(Answer(cells["path"].removeprefix("./"), sha256, int(cells["device"]), reviewer, time))
    _refuse_contradictions(answers, f"{setting}: {path}")
    return answers


def _read_time(text: str, place: str) -> datetime | None:
    if not text:
        return None
    try:
        time = datetime.fromisoformat(text)
        return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
    except (ValueError, OverflowError):
        raise TableError(f"{place} has time = {text!r}; write it like 2026-01-31T09:30:00Z or leave it empty") from None


def check_reviewer(name: str, place: str) -> str:
    """The name of a reviewer without blanks around it.

    Raises:
        TableError: If a spreadsheet would take it for a formula, or it is no name of one line.
    """
    name = name.strip()
    if name.startswith(FORMULA):
        raise TableError(f"{place} has reviewer = {name!r}, which a spreadsheet takes for a formula; write a name")
    if len(name) > LONGEST_NAME or not name.isprintable():
        raise TableError(f"{place} has a reviewer that is no name of at most {LONGEST_NAME} characters in one line")
    return name


def default_reviewer() -> str:
    """The user of this machine; ``unknown`` where it has no name."""
    try:
        return check_reviewer(getpass.getuser(), "user")
    except (OSError, KeyError, ImportError, TableError):
        return "unknown"


# -- what counts -------------------------------------------------------------------------------------------------------


def newest(answers: Iterable[Answer]) -> dict[str, int]:
    """What counts, by content: sha256 -> 0 or 1, independent of the order of the answers.

    Of each path and content the newest answer counts, one without time only where there is no other. Identical files
    under several paths that people read differently count as showing a device.
    """
    counts: dict[str, int] = {}
    for (_, sha256), answer in _newest_of_each(answers).items():
        counts[sha256] = max(counts.get(sha256, 0), answer.device)
    return counts


def _newest_of_each(answers: Iterable[Answer]) -> dict[tuple[str, str], Answer]:
    found: dict[tuple[str, str], Answer] = {}
    for answer in answers:
        key = (answer.path, answer.sha256)
        if key not in found or _age(answer) > _age(found[key]):
            found[key] = answer
    return found


def _age(answer: Answer) -> tuple[datetime, int, str]:
    """Sorts answers by time; those without time first. The rest only makes the order a fixed one."""
    return (answer.time or datetime.min.replace(tzinfo=UTC), answer.device, answer.reviewer)


def _refuse_contradictions(answers: Iterable[Answer], place: str) -> None:
    said: dict[tuple[str, str, datetime | None], int] = {}
    for answer in answers:
        if said.setdefault((answer.path, answer.sha256, answer.time), answer.device) != answer.device:
            when = f"at {write_time(answer.time)}" if answer.time else "without a time"
            raise TableError(f"{place} says 0 and 1 about {answer.path!r} {when}; keep one line")


# -- taking new ones ---------------------------------------------------------------------------------------------------


def take_answers(
    new: Path, manifest: pd.DataFrame, address: Path, *, reviewer: str, setting: str = "answers", now: datetime
) -> Facts:
    """Takes the answers of a CSV into the table at the address; see ``keep_answers``.

    Args:
        new: What a person saved from the sheet, or wrote: at least ``path,device``.
        manifest: Columns ``path, sha256``; the images that may be answered about.
        address: The table that keeps answers; made when it is not there.
        reviewer: Who answered, where the row does not say.
        setting: What names the CSV for the user, for messages.
        now: When the rows without a time count as answered, with its zone.
    """
    answers = read_answers(new, setting)
    return keep_answers(answers, manifest, address, reviewer=reviewer, place=f"{setting}: {new}", now=now)


def name_images(with_device: str, without_device: str, manifest: pd.DataFrame) -> list[Answer]:
    """Answers from two short lists of image ids, separated by commas or blanks.

    Raises:
        TableError: If an id is not in the manifest, or in both lists.
    """
    paths = dict(zip(manifest["image_id"], manifest["path"], strict=True))
    answers = []
    for field, text, device in (("with_device", with_device, 1), ("without_device", without_device, 0)):
        for image in re.split(r"[\s,;]+", text.strip().lower()):
            if image and image not in paths:
                raise TableError(f"{field}: {image!r} is no image_id of this run; copy it from the sheet")
            answers += [Answer(paths[image].strip(), "", device)] if image else []
    _refuse_contradictions(answers, "with_device, without_device: the form")
    return answers


def keep_answers(
    answers: list[Answer], manifest: pd.DataFrame, address: Path, *, reviewer: str, place: str, now: datetime
) -> Facts:
    """Adds answers about images of a manifest to the table at the address: whole, by one process at a time.

    Returns:
        Numbers of images: ``n_taken`` that the answers are about, of these ``n_new``, ``n_changed``, ``n_unchanged``
        and ``n_older`` (a newer answer was there and holds), ``n_with_device`` as they now count; ``n_kept`` rows in
        the table.

    Raises:
        TableError: On an image that is not in the manifest, a sha256 that is not that file's, a time that lies ahead,
            or a contradiction to an answer of the same time.
    """
    reviewer = check_reviewer(reviewer, "reviewer: it")
    contents = {path.strip(): sha for path, sha in zip(manifest["path"], manifest["sha256"], strict=True)}
    found = [_resolve(answer, contents, place) for answer in answers]
    ahead = next((a for a in found if a.time and a.time > now + CLOCK_SKEW), None)
    if ahead is not None:
        raise TableError(f"{place} has an answer about {ahead.path!r} from {write_time(ahead.time)}, which lies ahead")
    _refuse_contradictions(found, place)
    address.parent.mkdir(parents=True, exist_ok=True)
    with locked(address.with_name(f".{address.name}.lock")):
        kept = read_kept(address) if address.exists() else []
        before = _newest_of_each(kept)
        added = []
        for answer in found:
            stamped = replace(answer, reviewer=answer.reviewer or reviewer, time=answer.time or now)
            standing = before.get((answer.path, answer.sha256))
            # Taking the same list once more is no second reading.
            said = standing and (standing.device, standing.reviewer) == (stamped.device, stamped.reviewer)
            added += [] if said and answer.time is None else [stamped]
        everything = _in_order({*kept, *added})
        _refuse_contradictions(everything, f"{place} and {address} together: one")
        after = _newest_of_each(everything)
        write_whole(address, write_table(everything))
    given = _newest_of_each(found)
    changes = [(before.get(key), after[key].device, answer.device) for key, answer in given.items()]
    return {
        "n_taken": len(given),
        "n_new": sum(was is None for was, _, _ in changes),
        "n_changed": sum(was is not None and was.device != counts for was, counts, _ in changes),
        "n_unchanged": sum(was is not None and was.device == counts == said for was, counts, said in changes),
        "n_older": sum(was is not None and was.device == counts != said for was, counts, said in changes),
        "n_with_device": sum(counts for _, counts, _ in changes),
        "n_kept": len(everything),
    }


def _in_order(answers: Iterable[Answer]) -> list[Answer]:
    return sorted(answers, key=lambda a: (a.path, a.sha256, _age(a)))


def _resolve(answer: Answer, contents: dict[str, str], place: str) -> Answer:
    """The answer with the content it is about; ``contents`` is path -> sha256 of the run's images."""
    sha256 = contents.get(answer.path)
    if sha256 is None:
        raise TableError(
            f"{place} names {answer.path!r}, which is not an image of this run; name the run it belongs to"
        )
    if answer.sha256 not in ("", sha256):
        raise TableError(
            f"{place} is about another file {answer.path!r} than the one of this run, its sha256 differs; take it with "
            "the run that it belongs to"
        )
    return replace(answer, sha256=sha256)


def write_table(answers: Iterable[Answer]) -> str:
    """Answers as the text of a CSV."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    for answer in answers:
        cells = (safe_path(answer.path), answer.sha256, answer.device, answer.reviewer, write_time(answer.time))
        table.writerow(cells)
    return text.getvalue()


def safe_path(path: str) -> str:
    """A path as a cell that no spreadsheet takes for a formula; ``./`` before it names the same file."""
    return f"./{path}" if path.startswith(FORMULA) else path


def write_time(time: datetime | None) -> str:
    """ISO 8601 in UTC with ``Z``; empty without a time."""
    return "" if time is None else time.astimezone(UTC).isoformat().replace("+00:00", "Z")
