"""Train a screener on a data set with readings: ``python -m flows.train_screener --source ZIP --review CSV``."""

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
from tasks.training.screener import ScreenerRecipe, fit_screener


class TrainScreenerFlags(BaseModel):
    """Train a screener that finds medical devices, from drawn devices and people's readings."""

    review: Place | None = Field(None, description="CSV of readings (path,device,…); short for --screening.review.")
    recipe: ScreenerRecipe = Field(ScreenerRecipe(), description=ScreenerRecipe.__doc__)


@flow(name="train-screener", flow_run_name=label_run, log_prints=True, validate_parameters=True)
def train_screener(
    settings: Settings = Settings(), review: Place | None = None, recipe: ScreenerRecipe = ScreenerRecipe()
) -> str:
    """Trains a screener on a data set with readings; returns its folder, for ``screening.screener``."""
    if review is not None:
        screening = settings.screening.model_copy(update={"review": review})
        settings = settings.model_copy(update={"screening": screening})
    settings = with_run_folder(settings)
    run = Run(settings)
    with own_run_folder(run):
        bring_run(run)
        with open_runner(settings.scaling) as runner:
            folder = read_source(runner, run)
        with gpu_slot():
            fit_screener(run, folder, recipe)
    return str(run.folder / "screener")


if __name__ == "__main__":
    sys.exit(run_command(train_screener, sys.argv[1:], "python -m flows.train_screener", TrainScreenerFlags))
