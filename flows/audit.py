"""Audit: looks at any network, a ``.keras`` or ``.onnx`` file, with the images of a run. Nothing in the run changes.

``python -m flows.audit --model FILE --run-dir RUN --out DIR`` (``--help`` lists all flags).
"""

import sys
from pathlib import Path

from prefect import flow
from pydantic import BaseModel, Field

from flows.engine.command_line import run_command
from flows.engine.labels import label_run
from flows.engine.run_folders import bring_run
from tasks.addresses import Place
from tasks.errors import SettingsError
from tasks.explaining.auditing import refuse_failed
from tasks.files import make_once
from tasks.findings import read_audit
from tasks.foreign.auditing import audit_network, read_network, with_settings_of_run
from tasks.foreign.page import PAGE, write_page
from tasks.foreign.reading import ReadAs
from tasks.records import FOREIGN
from tasks.runs.run import Run
from tasks.settings import Settings


class AuditFlags(BaseModel):
    """Audits any network over the images of the trained run --run-dir, beside the run's own; see docs/auditing.md."""

    model: Place = Field(min_length=1, description="The network: a .keras or .onnx file.")
    out: Place = Field(
        min_length=1, description="Folder to write, which must not exist: audit.json, explanations/ and index.html."
    )
    read: ReadAs = Field(ReadAs(), description=ReadAs.__doc__)
    threshold: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Probability from which on it calls an image pneumonia; default: chosen on the run's validation.",
    )


@flow(name="audit", flow_run_name=label_run, log_prints=True, validate_parameters=True)
def audit(
    model: Place,
    out: Place,
    read: ReadAs = ReadAs(),
    threshold: float | None = None,
    settings: Settings = Settings(),
) -> str:
    """Audits a network over the images of ``settings.run_dir``; returns the address of the report.

    Raises:
        AuditError: If the network failed a part that ``auditing.fail_on`` names; everything is written before.
    """
    refuse_out(out, Run(settings))
    bring_run(Run(settings))
    run = Run(with_settings_of_run(settings))
    reading = read_network(run, model, read)

    def make(folder: Path) -> None:
        audit_network(run, model, reading, threshold, folder)
        write_page(folder, run)

    make_once(Path(out), make)
    page = str((Path(out) / PAGE).resolve())
    refuse_failed(read_audit(Path(out)).verdict.of(FOREIGN), run.settings.auditing, page)
    return page


def refuse_out(out: str, run: Run) -> None:
    """Refuses a folder that is there already, or that cannot or should not be there.

    Raises:
        SettingsError: If it does.
    """
    folder = Path(out)
    if "://" in out:
        raise SettingsError(f"out: {out} is no folder on this machine; name one")
    if folder.exists() or folder.is_symlink():
        raise SettingsError(f"out: {out} is there already; name a folder that does not exist yet, or remove it")
    if not next(part for part in folder.absolute().parents if part.exists()).is_dir():
        raise SettingsError(f"out: {out} lies below a file; name another folder")
    if folder.resolve().is_relative_to(run.folder.resolve()):
        raise SettingsError(f"out: {out} lies in the run folder, which stays as it is; name a folder beside it")


if __name__ == "__main__":
    sys.exit(run_command(audit, sys.argv[1:], "python -m flows.audit", AuditFlags))
