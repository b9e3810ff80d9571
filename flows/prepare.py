"""Prepare: from a source to packed, checked, split and screened images. Runs on the CPU pool."""

from prefect import flow

from flows.labels import label_run
from flows.run_folders import bring_run, own_run_folder
from flows.shards import open_runner, pack_images, screen_images
from tasks.ingestion import ingest
from tasks.quality import check
from tasks.settings import Settings
from tasks.sources import fetch
from tasks.splitting import split


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
