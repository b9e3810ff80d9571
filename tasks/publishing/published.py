"""Publish: ``published.json``, beside the runs, names the run in use; only one that is no worse takes over.

Reads ``audit.json``, ``metrics.json``, ``predictions.csv``, the data checks and ``model.keras`` of a run, and what is
published; writes ``publishing.json`` in the run folder, before its report, and ``published.json``, after its seal, in
the form of ``rules.Published``. The test split decides nothing.
"""

from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
from prefect import task
from pydantic import ValidationError

from tasks.errors import RunError, SettingsError
from tasks.files import digest, read_json, sha256_of_file, write_json
from tasks.findings import MeasuredGroup, read_audit, read_metrics
from tasks.publishing.rules import COMPARED_GROUPS, Candidate, Entry, Published, say_decision, succeed, weigh_candidate
from tasks.records import Facts
from tasks.runs.artifacts import show_markdown
from tasks.runs.bucket import change_shared, checksum_at, files_of, read_seal, read_shared, send
from tasks.runs.places import SEAL
from tasks.runs.retries import AGAIN
from tasks.runs.run import Run
from tasks.runs.stages import STAGES_FOLDER
from tasks.settings import Settings

PUBLISHED = "published.json"
WEIGHED = "publishing.json"
MODEL = "model.keras"
CHECKS = "checks/prepared/summary.json"
SOURCES = ("audit.json", "metrics.json", "predictions.csv", CHECKS, MODEL)
SAID = {"publish": "to be published once sealed", "keep": "not to be published", "same": "published already"}


@task(name="weigh", **AGAIN)
def weigh(run: Run) -> Facts | None:
    """Compares the run with what is published and writes ``publishing.json`` for the report; none when it is off."""
    settings = run.settings
    if not settings.publishing.enabled:
        (run.folder / WEIGHED).unlink(missing_ok=True)
        send(run, [], gone=[WEIGHED])
        return None
    candidate, published = describe_candidate(run.folder, run.address()), read_published(run.runs, settings)
    facts = _decide(candidate, published, run.runs, settings)
    facts |= {"max_drop": settings.publishing.max_drop, "this": candidate.model_dump()}
    facts["published"] = published.alone().model_dump() if published else None
    write_json(run.folder / WEIGHED, facts)
    send(run, [WEIGHED])
    print(f"{SAID[facts['decision']]}: {say_decision(facts)}")
    return facts


@task(name="publish", **AGAIN)
def publish(run: Run) -> Facts | None:
    """Moves ``published.json`` to this sealed run if it is no worse than what is published by now.

    Raises:
        RunError: If the run is not sealed.
    """
    if not run.settings.publishing.enabled:
        return None
    if read_seal(run) is None:
        raise RunError(f"run_dir: {run.address()} is not finished, so it cannot be published")
    return _move_to(describe_candidate(run.folder, run.address()), run.runs, run.settings)


# -- by hand: flows.publish --------------------------------------------------------------------------------------------


def find_runs(settings: Settings) -> str:
    """The folder of runs that ``run_dir`` names, itself or by a run in it: ``s3://bucket/prefix``, or a path.

    Raises:
        SettingsError: If there is no such folder here.
    """
    if (run := Run(settings)).in_bucket:
        return run.runs
    folder = Path(settings.run_dir or "data/runs").resolve()
    if not folder.is_dir():
        raise SettingsError(f"run_dir: there is no folder {folder}; name a run, or the folder that runs lie in")
    return str(folder.parent if (folder / STAGES_FOLDER).is_dir() else folder)


def look_up(runs: str, settings: Settings) -> str:
    """Says what is published; returns the address of its run.

    Raises:
        RunError: If nothing is, or its run no longer holds the model.
    """
    published = _demand_published(runs, settings)
    address = _demand_run(published, "is published", runs, settings)
    print(f"published: {published}; since {published.published}")
    for one in published.earlier:
        print(f"before: {one}; from {one.published}")
    for one in published.withdrawn:
        print(f"rolled back on {one.withdrawn}: {one}")
    return address


def roll_back(runs: str, settings: Settings) -> str:
    """Publishes again what was published before; returns the address of its run.

    Raises:
        RunError: If nothing was, its run no longer holds the model, or somebody changes what is published meanwhile.
    """
    published = _demand_published(runs, settings)
    if not published.earlier:
        raise RunError(f"{runs}/{PUBLISHED} names nothing that was published before; publish a run with --to RUN")
    address = _demand_run(published.earlier[0], "was published before", runs, settings)
    back = published.step_back(_now())

    def change(there: Facts | None) -> Facts:
        if _parse(there, runs) != published:
            raise RunError(f"{runs}/{PUBLISHED} was changed meanwhile; look at what is published and roll back again")
        return back.model_dump()

    change_shared(runs, PUBLISHED, settings.ingestion, change)
    _tell(f"rolled back: {back} is published again; before: {published}, which is not published again by itself")
    return address


def publish_by_hand(run: str, runs: str, settings: Settings) -> str:
    """Publishes a finished run, by the same rules, though it was published or rolled back before; returns its address.

    Raises:
        SettingsError: If the run is not one of these runs.
        RunError: If it is not finished, or the rules refuse it.
    """
    folder, _, name = run.rstrip("/").rpartition("/")
    if not runs.startswith("s3://"):
        place = Path(run) if folder else Path(runs, name)
        folder, name = str(place.resolve().parent), place.resolve().name
    if folder not in ("", runs) or not name:
        raise SettingsError(f"to: {run} does not lie in {runs}; name a run there")
    address = f"{runs}/{name}"
    if checksum_at(address, SEAL, settings.ingestion) is None:
        raise RunError(f"to: {address} is no finished run (it has no {SEAL}); name one that is")
    with files_of(address, SOURCES, settings.ingestion) as files:
        candidate = describe_candidate(files, address)
    decision = _move_to(candidate, runs, settings, by_hand=True)
    if decision["decision"] == "keep":
        raise RunError(f"to: {address} is not published: {'; '.join(decision['reasons'])}")
    return address


# -- what is published -------------------------------------------------------------------------------------------------


def read_published(runs: str, settings: Settings) -> Published | None:
    """``published.json``; ``None`` while nothing is published.

    Raises:
        RunError: If it is not in the form that publishing writes.
    """
    return _parse(read_shared(runs, PUBLISHED, settings.ingestion), runs)


def _parse(found: Facts | None, runs: str) -> Published | None:
    try:
        return None if found is None else Published.model_validate(found)
    except ValidationError:
        problem = f"{runs}/{PUBLISHED} is not as publishing writes it"
        raise RunError(f"{problem}; put back a whole copy, or remove it") from None


def find_problem(entry: Entry, runs: str, settings: Settings) -> str | None:
    """Why the run of a model that is, or was, published cannot be used; ``None`` where it can."""
    address = f"{runs}/{entry.run}"
    found = checksum_at(address, MODEL, settings.ingestion)
    if found is None:
        return f"it has no {MODEL} any more"
    if found != entry.model_sha256:
        return f"its {MODEL} is not the one that was published"
    return None if checksum_at(address, SEAL, settings.ingestion) else f"it is not finished: it has no {SEAL}"


def _decide(
    candidate: Candidate, published: Published | None, runs: str, settings: Settings, *, by_hand: bool = False
) -> Facts:
    lost = None
    # The run itself has a broken seal while it runs again.
    if published and (candidate.run, candidate.model_sha256) != (published.run, published.model_sha256):
        lost = find_problem(published, runs, settings)
    return weigh_candidate(candidate, published, settings.publishing, lost=lost, by_hand=by_hand)


def describe_candidate(run: Path, address: str) -> Candidate:
    """What ``published.json`` says of a run, but for when.

    Args:
        run: A folder with the files in ``SOURCES``.
        address: Where the run is kept.

    Raises:
        RunError: If a file is missing or another one.
    """
    try:
        groups, verdict = read_metrics(run).groups, read_audit(run).verdict.model
        table = pd.read_csv(run / "predictions.csv").reindex(columns=["path", "split", "label", "has_device"])
        val = table[table["split"] == "val"]
        rows = {"val": val, "val_device_free": val[val["has_device"].astype(str) == "False"]}
        facts = {
            "run": address.rpartition("/")[2],
            "run_dir": address,
            "model_sha256": sha256_of_file(run / MODEL),
            "audit": verdict.as_json(),
            "not_judged": [f"{c['says']} ({c['reason']})" for c in read_json(run / CHECKS) if c["success"] is None],
            **{name: _describe_group(groups[name], rows[name]) for name in COMPARED_GROUPS},
        }
        return Candidate.model_validate(facts)
    except (FileNotFoundError, KeyError, TypeError, ValueError, AttributeError):
        raise RunError(
            f"run_dir: {address} lacks one of {', '.join(SOURCES)}, or one is not what a run writes; run the pipeline "
            "on it again"
        ) from None


def _describe_group(group: MeasuredGroup, rows: pd.DataFrame) -> Facts:
    images = sorted(zip(rows["path"].astype(str), rows["label"].astype(int).tolist(), strict=True))
    auc = {"value": None, "reason": group.reason} if group.auc is None else group.auc
    return {"n": group.n, "auc": auc, "images": digest(images)}


# -- small parts -------------------------------------------------------------------------------------------------------


def _move_to(candidate: Candidate, runs: str, settings: Settings, by_hand: bool = False) -> Facts:
    decision: Facts = {}
    before: Published | None = None

    def change(there: Facts | None) -> Facts | None:
        nonlocal decision, before
        before = _parse(there, runs)
        decision = _decide(candidate, before, runs, settings, by_hand=by_hand)
        return succeed(candidate, before, _now()).model_dump() if decision["decision"] == "publish" else None

    change_shared(runs, PUBLISHED, settings.ingestion, change)
    was = before or "nothing"
    if decision["decision"] == "publish":
        _tell("; ".join([f"published: {candidate}", f"before: {was}", *decision["notes"]]))
    elif decision["decision"] == "same":
        _tell("; ".join([f"published already: {was} is this very model, it stays", *decision["reasons"]]))
    elif not by_hand:
        _tell(f"not published: {say_decision(decision)}; published stays: {was}")
    return decision


def _tell(text: str) -> None:
    print(text)
    show_markdown("published", text, "What is published, and what was before")


def _demand_published(runs: str, settings: Settings) -> Published:
    published = read_published(runs, settings)
    if published is None:
        raise RunError(
            f"nothing is published in {runs}; a run with --publishing.enabled true is, once its audit has passed, or a "
            "finished one with --to RUN"
        )
    return published


def _demand_run(entry: Entry, state: str, runs: str, settings: Settings) -> str:
    address = f"{runs}/{entry.run}"
    if problem := find_problem(entry, runs, settings):
        raise RunError(f"{address} {state}, but {problem}; publish another finished run with --to RUN")
    return address


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")
