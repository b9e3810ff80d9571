"""Train: fits, calibrates, evaluates and, if asked, exports the network on a prepared run folder. Runs on the GPU pool.

``python -m flows.train --run-dir RUN`` does it alone, and prints the run folder.
"""

import sys

from prefect import flow

from flows.engine.command_line import run_command
from flows.engine.gpu_slot import gpu_slot
from flows.engine.labels import label_run
from flows.engine.run_folders import bring_run, own_run_folder
from tasks.runs.run import Run
from tasks.settings import Settings
from tasks.training.calibration import calibrate
from tasks.training.evaluation import evaluate
from tasks.training.exporting import export, prepare_export
from tasks.training.fitting import fit


@flow(name="train", flow_run_name=label_run, log_prints=True, validate_parameters=True)
def train(settings: Settings) -> str:
    """Fits and calibrates the model, and its twin if the audit compares the two; evaluates the model,
    and exports it if asked.

    Returns the run folder's address.
    """
    run = Run(settings)
    with own_run_folder(run), gpu_slot():
        bring_run(run)
        prepare_export(run)
        for name in settings.networks:
            fit(run, name)
            calibrate(run, name)
        evaluate(run)
        if settings.export:
            export(run)
    return run.address()


if __name__ == "__main__":
    sys.exit(run_command(train, sys.argv[1:], "python -m flows.train"))
