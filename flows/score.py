"""Score: scores the X-rays of a folder or zip with the network of a finished run. Nothing in the run changes.

``python -m flows.score --run-dir RUN --images DIR_OR_ZIP --out scores.csv`` (``--help`` lists all flags). With
``--labels FILE`` also measures the network on these images.
"""

import sys

from prefect import flow
from pydantic import Field

from flows.engine.command_line import run_command
from flows.engine.labels import label_run
from flows.engine.run_folders import bring_run
from tasks.addresses import Place
from tasks.runs.run import Run
from tasks.scoring.batches import TableFlags, demand_all
from tasks.scoring.labelled import measure_scores, read_labels
from tasks.scoring.scores import find_scored_images, score_images
from tasks.settings import Settings


class ScoreFlags(TableFlags):
    """Scores X-rays with the network of the run folder --run-dir, and refuses images unlike its training images."""

    out: Place = Field(min_length=1, description="CSV file to write: path,probability,decision,device_score,refused.")
    labels: Place | None = Field(
        None,
        description="Table of labels (path,label and, where known, patient_id,group): measures the network on the "
        "images, by group, into a .metrics.json beside the CSV.",
    )


@flow(name="score", flow_run_name=label_run, log_prints=True, validate_parameters=True)
def score(
    images: Place, out: Place, strict: bool = False, labels: Place | None = None, settings: Settings = Settings()
) -> str:
    """Scores a folder or archive with the network of ``settings.run_dir``; returns the address of the table."""
    if labels is not None:
        read_labels(labels)  # refused before an hour of scoring
    if settings.run_dir is not None:
        bring_run(Run(settings))
    find_scored_images(images, out, settings)
    counts = score_images(images, out, settings)
    if labels is not None:
        measure_scores(labels, out, settings)
    if strict:
        demand_all(counts, out)
    return out


if __name__ == "__main__":
    sys.exit(run_command(score, sys.argv[1:], "python -m flows.score", ScoreFlags))
