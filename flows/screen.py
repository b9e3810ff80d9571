"""Screen: finds the X-rays of a folder or archive that show a medical device. Needs no run folder.

``python -m flows.screen --images DIR_OR_ZIP --out devices.csv`` (``--help`` lists all flags).
"""

import sys

from prefect import flow
from pydantic import Field

from flows.engine.command_line import run_command
from flows.engine.labels import label_run
from tasks.addresses import Place
from tasks.scoring.batches import TableFlags, demand_all
from tasks.scoring.device_scores import find_images, screen_images
from tasks.settings import Settings


class ScreenFlags(TableFlags):
    """Screens X-rays for medical devices: a score and a decision for each image, and masks of devices and lungs."""

    out: Place = Field(min_length=1, description="CSV file to write: path,device_score,has_device,refused.")
    masks: Place | None = Field(
        None, min_length=1, description="Folder for a mask <image_id>.png of each image; default: no masks."
    )
    lungs: Place | None = Field(None, min_length=1, description="Folder for the same of the lungs; default: none.")


@flow(name="screen", flow_run_name=label_run, log_prints=True, validate_parameters=True)
def screen(
    images: Place,
    out: Place,
    masks: Place | None = None,
    lungs: Place | None = None,
    strict: bool = False,
    settings: Settings = Settings(),
) -> str:
    """Scores a folder or archive of X-rays for medical devices; returns the address of the table."""
    folders = {name: str(folder) for name, folder in (("masks", masks), ("lungs", lungs)) if folder is not None}
    find_images(images, out, folders, settings)
    counts = screen_images(images, out, folders, settings)
    if strict:
        demand_all(counts, out)
    return out


if __name__ == "__main__":
    sys.exit(run_command(screen, sys.argv[1:], "python -m flows.screen", ScreenFlags))
