"""Stages in shards, done in this process without an engine: planned, done one after the other, and gathered."""

from tasks.explaining.explanations import explain_shards, gather_explanations, plan_explanations
from tasks.preparing.ingestion import ingest
from tasks.preparing.packing import pack, pack_shards, plan_packing
from tasks.preparing.screening import plan_screening, screen, screen_shards
from tasks.records import Facts
from tasks.runs.run import Run
from tasks.settings import Settings
from tasks.sources.fetching import fetch_source


def ingest_all(settings: Settings) -> Facts:
    source = fetch_source(settings)
    return ingest.fn(Run(settings), source) | {"folder": source.folder}


def pack_all(settings: Settings, folder: str) -> Facts:
    shards = plan_packing.fn(Run(settings))
    pack_shards.fn(Run(settings), folder, shards)
    return pack.fn(Run(settings), sum(len(files) for files in shards))


def screen_all(settings: Settings, folder: str) -> Facts:
    screen_shards.fn(Run(settings), plan_screening.fn(Run(settings)))
    return screen.fn(Run(settings), folder)


def explain_all(settings: Settings) -> Facts:
    explain_shards.fn(Run(settings), plan_explanations.fn(Run(settings)))
    return gather_explanations.fn(Run(settings))
