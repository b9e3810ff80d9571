"""Train a segmenter of lungs on a data set with masks: ``python -m flows.train_lungs --source ZIP --masks ZIP …``."""

import sys

from prefect import flow
from pydantic import BaseModel, Field

from flows.engine.command_line import run_command
from flows.engine.gpu_slot import gpu_slot
from flows.engine.labels import label_run
from flows.engine.run_folders import bring_run, own_run_folder, with_run_folder
from flows.engine.runners import open_runner
from flows.prepare import read_source
from tasks.addresses import Place
from tasks.runs.run import Run
from tasks.settings import Settings
from tasks.training.lungs import LungRecipe, fit_lungs


class TrainLungsFlags(BaseModel):
    """Train a segmenter that finds the lungs, from lungs that people drew and from drawn chests."""

    masks: Place = Field(description="Archive of lung masks: a PNG at the path of each image, white where lung is.")
    table: Place = Field(description="CSV of the masks: path,lower_border_below_prediction.")
    recipe: LungRecipe = Field(LungRecipe(), description=LungRecipe.__doc__)


@flow(name="train-lungs", flow_run_name=label_run, log_prints=True, validate_parameters=True)
def train_lungs(masks: Place, table: Place, settings: Settings = Settings(), recipe: LungRecipe = LungRecipe()) -> str:
    """Trains a segmenter of lungs on a data set with masks; returns its folder."""
    settings = with_run_folder(settings)
    run = Run(settings)
    with own_run_folder(run):
        bring_run(run)
        with open_runner(settings.scaling) as runner:
            read_source(runner, run)
        with gpu_slot():
            fit_lungs(run, masks, table, recipe)
    return str(run.folder / "segmenter")


if __name__ == "__main__":
    sys.exit(run_command(train_lungs, sys.argv[1:], "python -m flows.train_lungs", TrainLungsFlags))
