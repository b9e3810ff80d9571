"""Train: fits, calibrates and evaluates the network on a prepared run folder. Runs on the GPU pool."""

from prefect import flow

from flows.gpu_slot import gpu_slot
from flows.labels import label_run
from flows.run_folders import bring_run, own_run_folder
from tasks.calibration import calibrate
from tasks.evaluation import evaluate
from tasks.settings import Settings
from tasks.suspects import name_suspects
from tasks.training import fit


@flow(name="train", flow_run_name=label_run, log_prints=True, validate_parameters=True)
def train(settings: Settings) -> None:
    """Fits and calibrates the model, and its twin where the audit compares the two; measures the model."""
    with own_run_folder(settings), gpu_slot():
        bring_run(settings)
        for name in name_suspects(settings):
            fit(settings, name)
            calibrate(settings, name)
        evaluate(settings)
