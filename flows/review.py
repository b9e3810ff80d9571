"""Review: takes a person's answers about the doubtful images of a prepared run. Runs on the CPU pool.

``python -m flows.review --run-dir RUN --answers answers.csv``; deployed without answers, it waits for a form.
"""

import sys
from datetime import UTC, datetime
from itertools import count
from pathlib import Path

from prefect import flow, get_client, suspend_flow_run
from prefect.context import FlowRunContext
from prefect.input import RunInput
from pydantic import BaseModel, Field

from flows.engine.command_line import run_command
from flows.engine.labels import label_run
from flows.engine.run_folders import bring_run
from tasks.addresses import Place
from tasks.devices.answers import (
    Answer,
    answers_folder,
    default_reviewer,
    keep_answers,
    match_answers,
    name_images,
    read_answers,
    share_answers,
)
from tasks.devices.contact_sheet import SHEET, count_doubtful
from tasks.errors import PipelineError, SettingsError, TableError
from tasks.runs.run import Run
from tasks.settings import Settings


class ReviewFlags(BaseModel):
    """Takes a person's answers about the doubtful images of a prepared run, for all runs."""

    answers: Place | None = Field(None, description="CSV saved from the sheet, or any with the columns path,device.")
    reviewer: str = Field("", description="Who answered, if the CSV does not say; default: the user's name.")


class ReviewForm(RunInput):
    """The form of a waiting run in the web page."""

    answers: Place = Field("", description="Address of the CSV saved from the sheet, on the machine of the worker.")
    with_device: str = Field(
        "", description="Or: image ids that show a device, separated by commas or blanks, as the sheet shows them."
    )
    without_device: str = Field("", description="And image ids that show none.")
    reviewer: str = Field("", description="Who answered, if the CSV does not say.")
    go_on: bool = Field(
        False, description="Resume without answers: the screener's score decides about unanswered images."
    )


@flow(name="review", flow_run_name=label_run, log_prints=True, validate_parameters=True)
def review(settings: Settings = Settings(), answers: Place | None = None, reviewer: str = "") -> str:
    """Takes answers about the images of a run; returns the folder where answers are kept.

    Raises:
        SettingsError: Without answers, if this run cannot wait for them.
        TableError: If the answers do not fit the run.
    """
    run = Run(settings)
    bring_run(run)
    if answers is not None:
        take_answers(Path(answers), run, reviewer, datetime.now(UTC))
        share_answers(run)
    elif can_wait():
        wait_for_answers(run)
    else:
        raise SettingsError("answers: none are given; give --answers FILE, the CSV saved from the run's sheet")
    print(f"the same pipeline command with --run-dir {settings.run_dir} now uses them")
    return str(answers_folder(run))


def can_wait() -> bool:
    """Whether this run can be suspended: Prefect suspends only deployed runs that no other run started."""
    context = FlowRunContext.get()
    run = context.flow_run if context else None
    return run is not None and run.deployment_id is not None and run.parent_task_run_id is None


def wait_for_answers(run: Run) -> None:
    """Suspends the run until a person has filled in the form, then takes its answers.

    A resumed run starts again from the top and gets here once more; Prefect then returns the forms filled in so far,
    one by one. An unusable form is logged, and the run waits for the next.
    """
    sheet = run.address(SHEET)
    for turn in count(1):
        n = count_doubtful(run)
        waiting = "1 doubtful image waits" if n == 1 else f"{n:,} doubtful images wait"
        print(f"{waiting} for a person: open {sheet}, save the answers, and resume this run")
        asked = ReviewForm.with_initial_data(
            description=f"{waiting} on the sheet `{sheet}`. Open it in a browser, save the answers, and name the saved "
            "file here, or list image ids."
        )
        form = suspend_flow_run(wait_for_input=asked, key=f"review-{turn}")
        try:
            take_form(form, run, when_filled_in(form))
        except (PipelineError, OSError) as error:
            print(f"this form cannot be used; the run waits for another one: {error}")
            continue
        share_answers(run)
        return


def take_form(form: ReviewForm, run: Run, now: datetime) -> None:
    """Takes the answers of a form, which may also say to resume without any.

    Raises:
        TableError: If they do not fit the run, or there are none and ``go_on`` is not ticked.
    """
    named = name_images(form.with_device, form.without_device, run.manifest())
    file = form.answers.strip()
    if file and named:
        raise TableError("answers: the form names a CSV and image ids; give one of them")
    if file or named:
        take_answers(Path(file) if file else named, run, form.reviewer, now)
    elif not form.go_on:
        raise TableError("answers: the form has none; name the CSV, list image ids, or tick go_on")


def when_filled_in(form: ReviewForm) -> datetime:
    """The time of the form, so that a run that starts again does not give its answers a new time."""
    with get_client(sync_client=True) as client:
        inputs = client.filter_flow_run_input(form.metadata.receiver, form.metadata.key, limit=1, exclude_keys=set())
    filled = inputs[0].created if inputs else None
    return (filled or datetime.now(UTC)).astimezone(UTC)


def take_answers(given: Path | list[Answer], run: Run, reviewer: str, now: datetime) -> None:
    """Saves the answers of a CSV or a form, and logs their number.

    Raises:
        TableError: If they do not fit the run.
    """
    folder, max_unmatched = answers_folder(run), run.settings.quality.max_unmatched
    place = f"answers: {given}" if isinstance(given, Path) else "the form"
    answers = read_answers(given, "answers") if isinstance(given, Path) else given
    found = match_answers(answers, run.manifest(), place, max_unmatched)
    facts = keep_answers(found, folder, reviewer=reviewer or default_reviewer(), place=place, now=now)
    print(
        f"{facts['n_taken']:,} answers taken into {folder}: {facts['n_new']:,} new, {facts['n_changed']:,} changed, "
        f"{facts['n_unchanged']:,} as before, {facts['n_older']:,} older than what is known; "
        f"{facts['n_with_device']:,} of these images show a device"
    )


if __name__ == "__main__":
    sys.exit(run_command(review, sys.argv[1:], "python -m flows.review", ReviewFlags))
