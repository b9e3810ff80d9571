"""Train: fits, calibrates and evaluates the network on a prepared run folder. Runs on the GPU pool."""

from prefect import flow

from tasks.calibration import calibrate
from tasks.evaluation import evaluate
from tasks.settings import Settings
from tasks.training import fit


@flow(name="train", log_prints=True, validate_parameters=True)
def train(settings: Settings) -> None:
    """Fits the network on what prepare left in the run folder, calibrates and measures it."""
    fit(settings)
    calibrate(settings)
    evaluate(settings)
