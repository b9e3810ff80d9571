"""Prepare: from a source to packed, checked, split and screened images. Runs on the CPU pool.

``python -m flows.prepare --run-dir RUN`` does it alone, and prints the run folder.
"""

import sys
from typing import Any

from prefect import flow
from prefect.task_runners import TaskRunner

from flows.engine.command_line import run_command
from flows.engine.labels import label_run
from flows.engine.run_folders import bring_run, own_run_folder
from flows.engine.runners import do_shards, open_runner
from tasks.preparing.ingestion import ingest
from tasks.preparing.mask_shards import draw_masks, plan_masks
from tasks.preparing.packing import pack, pack_shards, plan_packing
from tasks.preparing.quality import check
from tasks.preparing.screening import screen
from tasks.preparing.segmenting import segment
from tasks.preparing.splitting import split
from tasks.runs.run import Run
from tasks.settings import Settings
from tasks.sources.fetching import fetch


@flow(name="prepare", flow_run_name=label_run, log_prints=True, validate_parameters=True)
def prepare(settings: Settings) -> str:
    """Fetches the source, checks it, packs pixels, draws validation and excludes images with devices from training.

    Returns the run folder's address.
    """
    run = Run(settings)
    with own_run_folder(run), open_runner(settings.scaling) as runner:
        bring_run(run)
        folder = read_source(runner, run)
        screen_images(runner, run, folder)
        check(run, "prepared")
    return run.address()


def read_source(runner: TaskRunner[Any], run: Run) -> str:
    """Fetches, lists, checks, packs and splits the images of the run's source; returns the source's folder."""
    source = fetch(run.settings)
    ingest(run, source)
    check(run, "source")
    pack_images(runner, run, source.folder)
    split(run)
    return source.folder


def pack_images(runner: TaskRunner[Any], run: Run, folder: str) -> None:
    """Packs the images of a source that are not in the cache."""
    bits = run.facts("ingest")["bits"]
    shards = plan_packing(run, bits)
    do_shards(runner, "packed", pack_shards, shards, run=run, folder=folder, bits=bits)
    pack(run, bits, sum(len(files) for files in shards))


def screen_images(runner: TaskRunner[Any], run: Run, folder: str) -> None:
    """Draws masks of the packed images that are not in the cache, of devices and of lungs, and judges both."""
    do_shards(runner, "screened", draw_masks, plan_masks(run), run=run)
    screen(run, folder)
    segment(run)


if __name__ == "__main__":
    sys.exit(run_command(prepare, sys.argv[1:], "python -m flows.prepare"))
