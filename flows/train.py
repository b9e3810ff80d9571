"""Train: fits, calibrates and evaluates the network on a prepared run folder. Runs on the GPU pool."""

from prefect import flow

from flows.gpu_slot import gpu_slot
from tasks.calibration import calibrate
from tasks.evaluation import evaluate
from tasks.settings import Settings
from tasks.suspects import name_suspects
from tasks.training import fit


@flow(name="train", log_prints=True, validate_parameters=True)
def train(settings: Settings) -> None:
    """Fits and calibrates the model, and its twin where the audit compares the two; measures the model."""
    with gpu_slot():
        for name in name_suspects(settings):
            fit(settings, name)
            calibrate(settings, name)
        evaluate(settings)
