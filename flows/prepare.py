"""Prepare: from a source to packed, checked, split and screened images. Runs on the CPU pool."""

from typing import Any

from prefect import flow
from prefect.task_runners import TaskRunner

from flows.engine.labels import label_run
from flows.engine.run_folders import bring_run, own_run_folder
from flows.engine.runners import do_shards, open_runner
from tasks.preparing.ingestion import ingest
from tasks.preparing.packing import pack, pack_shards, plan_packing
from tasks.preparing.quality import check
from tasks.preparing.screening import plan_screening, screen, screen_shards
from tasks.preparing.splitting import split
from tasks.settings import Settings
from tasks.sources.fetching import fetch


@flow(name="prepare", flow_run_name=label_run, log_prints=True, validate_parameters=True)
def prepare(settings: Settings) -> None:
    """Fetches the source, checks it, draws validation, packs pixels and keeps images with devices out of training."""
    with own_run_folder(settings), open_runner(settings) as runner:
        bring_run(settings)
        source = fetch(settings)
        ingest(settings, source)
        check(settings, "source")
        split(settings)
        pack_images(runner, settings, source.folder)
        screen_images(runner, settings, source.folder)
        check(settings, "prepared")


def pack_images(runner: TaskRunner[Any], settings: Settings, folder: str) -> None:
    """Packs the images of a source that no run packed before."""
    shards = plan_packing(settings)
    do_shards(runner, "packed", pack_shards, shards, settings=settings, folder=folder)
    pack(settings, sum(len(files) for files in shards))


def screen_images(runner: TaskRunner[Any], settings: Settings, folder: str) -> None:
    """Screens the packed images that no run screened before, and decides which leave training."""
    do_shards(runner, "screened", screen_shards, plan_screening(settings), settings=settings)
    screen(settings, folder)
