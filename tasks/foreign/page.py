"""The page about a network of other people: the parts of a run's report that say what a network looks at.

Reads what ``tasks.foreign.auditing`` left in a folder; writes ``index.html`` beside it.
"""

from datetime import UTC, datetime
from pathlib import Path

from prefect import task

from tasks.explaining.explanations import sum_up
from tasks.files import read_json, write_whole
from tasks.findings import read_audit
from tasks.measures import describe_value
from tasks.pixels.greys import SIDE_PX
from tasks.records import Facts
from tasks.reporting.audit import describe_audit
from tasks.reporting.gallery import describe_gallery
from tasks.reporting.inputs import NOTICE
from tasks.reporting.report import render_page
from tasks.runs.run import Run

PAGE = "index.html"
CONTENTS = [
    ("network", "How the network was read"),
    ("audit", "What the network looks at"),
    ("explanations", "Single images, explained"),
    ("reading", "How to read this page"),
]


@task(name="report on the network")
def write_page(folder: Path, run: Run) -> None:
    """Writes ``index.html`` about an audit in a folder."""
    write_whole(folder / PAGE, render_page(gather_page(folder, run, datetime.now(UTC)), "network.html.j2"))


def gather_page(folder: Path, run: Run, now: datetime) -> Facts:
    """All that the template shows."""
    found = read_audit(folder)
    explained = [read_json(path) for path in sorted((folder / "explanations").glob("*.json"))]
    trust = {"n_images": len(explained), **sum_up(explained)}
    audit = describe_audit(folder)
    return {
        "notice": NOTICE,
        "made": now.isoformat(timespec="seconds"),
        "made_text": f"{now:%-d %B %Y, %H:%M} UTC",
        "run_name": run.folder.resolve().name,
        "side_px": SIDE_PX,
        "contents": CONTENTS,
        "network": found.network,
        "performance": [
            {"who": head[0].lower() + head[1:]}
            | {
                key: describe_value(found.performance[name].estimate(key) or {})
                for key in ("auc", "sensitivity", "specificity")
            }
            for name, head in zip(found.verdict.names, audit["heads"], strict=True)
        ],
        "audit": audit,
        "gallery": describe_gallery(folder, [found.split], run.settings.explanation, trust),
    }
