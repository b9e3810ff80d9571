"""Score: what the network of a finished run says of the X-rays of a folder or zip. Nothing in the run changes.

``python -m flows.score --run-dir RUN --images DIR_OR_ZIP --out scores.csv`` (``--help`` lists all flags).
"""

import sys

from prefect import flow
from pydantic import BaseModel, Field

from flows.command_line import run_command
from tasks.records import SourceError
from tasks.scoring import find_scored_images, score_images
from tasks.settings import Settings


class ScoreFlags(BaseModel):
    """Scores X-rays with the network of the run folder --run-dir, and refuses what looks unlike its training images."""

    images: str = Field(
        min_length=1, description="Folder or .zip file of X-rays (.jpeg, .jpg, .png), in any structure."
    )
    out: str = Field(min_length=1, description="CSV file to write: path,probability,decision,device_score,refused.")
    strict: bool = Field(
        False, description="End with exit code 2 when an image was refused; the CSV is written anyway."
    )


@flow(name="score", log_prints=True, validate_parameters=True)
def score(images: str, out: str, strict: bool = False, settings: Settings = Settings()) -> str:
    """Scores a folder or zip with the network of ``settings.run_dir``; returns the address of the table."""
    find_scored_images(images, out, settings)
    counts = score_images(images, out, settings)
    if strict and counts["n_refused"]:
        raise SourceError(
            f"strict: {counts['n_refused']:,} of {counts['n_images']:,} images were refused; {out} names them and why: "
            "put them right or take them out, or leave --strict out"
        )
    return out


if __name__ == "__main__":
    sys.exit(run_command(score, sys.argv[1:], "python -m flows.score", ScoreFlags))
