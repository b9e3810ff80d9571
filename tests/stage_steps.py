"""Stages in shards, done in this process without an engine: planned, done one after the other, and gathered."""

from tasks.explaining.explanations import explain_shards, gather_explanations, plan_explanations
from tasks.preparing.ingestion import ingest
from tasks.preparing.mask_shards import draw_masks, plan_masks
from tasks.preparing.packing import pack, pack_shards, plan_packing
from tasks.preparing.screening import screen
from tasks.preparing.segmenting import segment
from tasks.records import Facts
from tasks.runs.run import Run
from tasks.runs.stages import STAGES_FOLDER
from tasks.settings import Settings
from tasks.sources.fetching import fetch_source


def ingest_all(settings: Settings) -> Facts:
    source = fetch_source(settings)
    return ingest.fn(Run(settings), source) | {"folder": source.folder}


def pack_all(settings: Settings, folder: str) -> Facts:
    run = Run(settings)
    listed = (run.folder / STAGES_FOLDER / "ingest.json").exists()
    bits = run.facts("ingest")["bits"] if listed else 16
    shards = plan_packing.fn(run, bits)
    pack_shards.fn(run, folder, bits, shards)
    return pack.fn(run, bits, sum(len(files) for files in shards))


def screen_all(settings: Settings, folder: str) -> Facts:
    draw_masks.fn(Run(settings), plan_masks.fn(Run(settings)))
    facts = screen.fn(Run(settings), folder)
    segment.fn(Run(settings))
    return facts


def explain_all(settings: Settings) -> Facts:
    explain_shards.fn(Run(settings), plan_explanations.fn(Run(settings)))
    return gather_explanations.fn(Run(settings))
