"""Prepare: from a source to packed, checked, split and screened images. Runs on the CPU pool."""

from prefect import flow

from tasks.ingestion import ingest
from tasks.packing import pack
from tasks.quality import check
from tasks.run_copies import fetch_run
from tasks.screening import screen
from tasks.settings import Settings
from tasks.splitting import split


@flow(name="prepare", log_prints=True, validate_parameters=True)
def prepare(settings: Settings) -> None:
    """Fetches the source, checks it, draws validation, packs pixels and keeps images with devices out of training."""
    fetch_run(settings)
    source = ingest(settings)
    check(settings, "source")
    split(settings)
    pack(settings, source["folder"])
    screen(settings, source["folder"])
    check(settings, "prepared")
