"""Stages in shards, done in this process without an engine: planned, done one after the other, and gathered."""

from tasks.explaining.explanations import explain_shards, gather_explanations, plan_explanations
from tasks.preparing.ingestion import ingest
from tasks.preparing.packing import pack, pack_shards, plan_packing
from tasks.preparing.screening import plan_screening, screen, screen_shards
from tasks.records import Facts
from tasks.settings import Settings
from tasks.sources.fetching import fetch_source


def ingest_all(settings: Settings) -> Facts:
    source = fetch_source(settings)
    return ingest.fn(settings, source) | {"folder": source.folder}


def pack_all(settings: Settings, folder: str) -> Facts:
    shards = plan_packing.fn(settings)
    pack_shards.fn(settings, folder, shards)
    return pack.fn(settings, sum(len(files) for files in shards))


def screen_all(settings: Settings, folder: str) -> Facts:
    screen_shards.fn(settings, plan_screening.fn(settings))
    return screen.fn(settings, folder)


def explain_all(settings: Settings) -> Facts:
    explain_shards.fn(settings, plan_explanations.fn(settings))
    return gather_explanations.fn(settings)
