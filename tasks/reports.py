"""Report: one self-contained page about a run."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.settings import Settings
from tasks.storage import run_folder, write_whole


@task(name="report", cache_policy=NO_CACHE)
def write_report(settings: Settings) -> str:
    """Writes the report."""
    run = run_folder(settings)
    path = run / "report" / "index.html"
    write_whole(path, "<html>")
    return str(path)
