"""Report: one self-contained page about a run, for people.

Reads what the other stages left in the run folder (``manifest.parquet``, ``metrics.json``, ``predictions.csv``,
``history.csv``, ``checks/``, ``explanations/``, ``audit.json``, ``publishing.json``, ``stages/``); writes
``report/index.html``. Names of files and patients stay out of it: an image appears by its ``image_id``. Whatever comes
from outside is escaped by the template.
"""

import base64
import hashlib
from datetime import datetime
from pathlib import Path

from prefect import task

from tasks.files import read_json, write_whole
from tasks.findings import read_metrics
from tasks.records import Facts
from tasks.reporting.audit import describe_audit
from tasks.reporting.devices import describe_devices
from tasks.reporting.gallery import describe_gallery
from tasks.reporting.inputs import NOTICE, SPLIT_NAMES, describe_left_out, describe_source
from tasks.reporting.published import describe_published
from tasks.reporting.results import choose_splits, describe_results, describe_training, draw_history, say_result
from tasks.reporting.words import say_provenance, say_settings
from tasks.runs.artifacts import show_link, show_markdown, show_table
from tasks.runs.bucket import send
from tasks.runs.provenance import describe_run
from tasks.runs.retries import AGAIN
from tasks.runs.run import Run

TEMPLATE = Path(__file__).parent / "templates" / "report.html.j2"
REPORT = "report/index.html"
CHECKPOINTS = {"source": "The data set as it came", "prepared": "What training and evaluation use"}


@task(name="report", **AGAIN)
def write_report(run: Run) -> str:
    """Writes ``report/index.html`` of a run that is trained and evaluated; returns its address.

    Raises:
        RunError: If the run folder lacks a file of an earlier stage.
    """
    page = gather_page(run)
    html = render_page(page)
    write_whole(run.folder / REPORT, html)
    send(run, [REPORT])
    address = run.address(REPORT)
    show_table("left out", page["left_out"]["reasons"], "Images that were left out, by reason and split")
    show_markdown("report", summarise_page(page, address), "Result of the run and where its report is")
    show_link("report page", address, "The report")
    print(f"{page['sentence']} The report is {address} ({len(html.encode()) / 1e6:.1f} MB)")
    return address


def render_page(page: Facts, template: str = TEMPLATE.name) -> str:
    """A page as HTML; every value is escaped unless it is markup made here."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = lambda n: f"{n:,}"
    environment.filters["csp_hash"] = lambda s: base64.b64encode(hashlib.sha256(str(s).encode()).digest()).decode()
    return environment.get_template(template).render(page)


def gather_page(run: Run) -> Facts:
    """All that the template shows, read from the run folder: plain values, and figures as SVG."""
    manifest, metrics = run.manifest(), read_metrics(run.folder)
    provenance = describe_run(run)
    splits, main = choose_splits(metrics, run.settings.evaluation)
    results = describe_results(run, metrics, splits, main)
    return {
        "notice": NOTICE,
        "run_name": run.folder.resolve().name,
        "finished": provenance["finished"],
        "finished_text": f"{datetime.fromisoformat(provenance['finished']):%-d %B %Y, %H:%M} UTC",
        "sentence": say_result(metrics, main),
        "main": main,
        "splits": splits,
        "split_names": SPLIT_NAMES,
        "source": describe_source(run.folder, manifest),
        "left_out": describe_left_out(run.folder, manifest),
        "checks": describe_checks(run.folder),
        "devices": describe_devices(run, manifest, splits),
        "training": {**describe_training(run.folder, run.settings.training), "figure": draw_history(run.folder)},
        "results": results,
        "audit": describe_audit(run.folder),
        "publishing": describe_published(run),
        "gallery": describe_gallery(run.folder, splits, run.settings.explanation, run.facts("explain")),
        "provenance": say_provenance(provenance),
        "settings": say_settings(run.settings),
    }


def describe_checks(run: Path) -> list[Facts]:
    """Both checkpoints with a row per expectation, failed ones first; ``rows`` is ``None`` where one did not run."""
    found = []
    for key, name in CHECKPOINTS.items():
        folder = run / "checks" / key
        checks = read_json(folder / "summary.json") if (folder / "summary.json").exists() else None
        rows = checks and sorted(
            (
                {k: c[k] for k in ("says", "severity", "success", "n", "n_unexpected")} | {"reason": c.get("reason")}
                for c in checks
            ),
            key=lambda row: ((False, None, True).index(row["success"]), row["severity"] != "critical"),
        )
        found.append(
            {
                "key": key,
                "name": name,
                "rows": rows,
                "n_failed": sum(row["success"] is False for row in rows or []),
                "n_critical": sum(row["success"] is False and row["severity"] == "critical" for row in rows or []),
                "n_unjudged": sum(row["success"] is None for row in rows or []),
                "has_docs": (folder / "data_docs" / "index.html").exists(),
            }
        )
    return found


def summarise_page(page: Facts, address: str) -> str:
    """The report in short, as Markdown for Prefect's page: sentence, metrics, ROC curve and one LIME picture."""
    lines = [f"**{page['notice']}**", "", page["sentence"], "", f"Report: `{address}`", ""]
    lines += ["| group | images | AUC | sensitivity | specificity |", "| --- | ---: | --- | --- | --- |"]
    for row in page["results"]["groups"]:
        cells = [row["values"].get(name) for name in ("auc", "sensitivity", "specificity")]
        texts = [f"{c['text']} ({c['interval']})" if c and c["text"] else "not measured" for c in cells]
        lines.append(f"| {row['name']} | {row['n']:,} | " + " | ".join(texts) + " |")
    lines += ["", page["audit"]["sentence"]]
    if page["publishing"]:
        lines += ["", page["publishing"]["sentence"]]
    if page["results"]["points_differ"]:
        lines += ["", say_second_point(page)]
    if page["results"]["roc_png"]:
        lines += ["", f"![ROC curve]({page['results']['roc_png']})"]
    card = next((c for g in page["gallery"]["groups"] for c in g["cards"] if c["picture"]), None)
    if card:
        lines += ["", card["says"], ""]
        lines += [f"![X-ray and LIME map]({card['picture']})"]
    return "\n".join(lines) + "\n"


def say_second_point(page: Facts) -> str:
    """What the second threshold gives on the first group, in a sentence."""
    point = page["results"]["points"][1]
    group = next((group for group in point["groups"] if group["n"]), None)
    if group is None:
        return f"At the threshold for high sensitivity, {point['threshold']}, nothing was measured."
    figures = [f"{m} {group['values'][m]['text'] or 'not measured'}" for m in ("sensitivity", "specificity")]
    return f"{group['name']}, at the threshold for high sensitivity, {point['threshold']}: {', '.join(figures)}."
