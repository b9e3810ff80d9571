"""Report: one self-contained page about a run, for people.

Reads what the other stages left in the run folder (``manifest.parquet``, ``metrics.json``, ``predictions.csv``,
``history.csv``, ``checks/``, ``explanations/``, ``stages/``); writes ``report/index.html``. Names of files and patients
stay out of it: an image appears by its ``image_id``. Whatever comes from outside is escaped by the template.
"""

import base64
import hashlib
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.artifacts import show_markdown, show_table
from tasks.provenance import describe_run, say_provenance, say_settings
from tasks.records import CLASS_NAMES, Facts
from tasks.report_data import NOTICE, SPLIT_NAMES, describe_left_out, describe_source
from tasks.report_devices import describe_devices
from tasks.report_results import choose_splits, describe_results, describe_training, draw_history, say_result
from tasks.settings import Settings
from tasks.storage import read_json, read_manifest, run_folder, write_whole

TEMPLATE = Path(__file__).with_name("report.html.j2")
PICTURES_MB = 12.0
"""Room for LIME pictures, base64 included; the page has to stay below 15 MB."""
WEAK = 0.01
"""A map whose strongest piece moves the probability by less than this says little; its tints are scaled to it."""
CARD_GROUPS = {
    (1, False): ("missed", "Missed pneumonia", "truly pneumonia, called normal"),
    (0, False): ("alarm", "False alarms", "truly normal, called pneumonia"),
    (1, True): ("found", "Pneumonia found", "truly pneumonia, called pneumonia"),
    (0, True): ("cleared", "Normal recognised", "truly normal, called normal"),
}
CHECKPOINTS = {"source": "The data set as it came", "prepared": "What training and evaluation use"}


@task(name="report", cache_policy=NO_CACHE)
def write_report(settings: Settings) -> str:
    """Writes ``report/index.html`` of a run that is trained and evaluated; returns its path.

    Raises:
        RunError: If the run folder lacks a file of an earlier stage.
    """
    run = run_folder(settings)
    page = gather_page(settings, run)
    html = render_page(page)
    path = run / "report" / "index.html"
    write_whole(path, html)
    show_table("left out", page["left_out"]["reasons"], "Images that were left out, by reason and split")
    show_markdown("report", summarise_page(page, path), "Result of the run and where its report is")
    print(f"{page['sentence']} The report is {path} ({len(html.encode()) / 1e6:.1f} MB)")
    return str(path)


def render_page(page: Facts) -> str:
    """The page as HTML; every value is escaped unless it is markup made here."""
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
    return environment.get_template(TEMPLATE.name).render(page)


def gather_page(settings: Settings, run: Path) -> Facts:
    """All that the template shows, read from the run folder: plain values, and figures as SVG."""
    manifest, metrics = read_manifest(run), read_json(run / "metrics.json")
    provenance = describe_run(settings)
    splits, main = choose_splits(metrics, settings.evaluation)
    results = describe_results(run, metrics, splits, main, settings)
    return {
        "notice": NOTICE,
        "run_name": run.resolve().name,
        "finished": provenance["finished"],
        "finished_text": f"{datetime.fromisoformat(provenance['finished']):%-d %B %Y, %H:%M} UTC",
        "sentence": say_result(metrics, main),
        "main": main,
        "splits": splits,
        "split_names": SPLIT_NAMES,
        "source": describe_source(run, manifest),
        "left_out": describe_left_out(run, manifest),
        "checks": describe_checks(run),
        "devices": describe_devices(run, manifest, splits, settings.screening),
        "training": {**describe_training(run, settings.training), "figure": draw_history(run)},
        "results": results,
        "gallery": describe_explanations(run, splits, settings),
        "provenance": say_provenance(provenance),
        "settings": say_settings(settings),
    }


def describe_checks(run: Path) -> list[Facts]:
    """Both checkpoints with a row per expectation, failed ones first; ``rows`` is ``None`` where one did not run."""
    found = []
    for key, name in CHECKPOINTS.items():
        folder = run / "checks" / key
        checks = read_json(folder / "summary.json") if (folder / "summary.json").exists() else None
        rows = checks and sorted(
            ({k: c[k] for k in ("says", "severity", "success", "n", "n_unexpected")} for c in checks),
            key=lambda row: (row["success"], row["severity"] != "critical"),
        )
        found.append(
            {
                "key": key,
                "name": name,
                "rows": rows,
                "n_failed": sum(not row["success"] for row in rows or []),
                "n_critical": sum(not row["success"] and row["severity"] == "critical" for row in rows or []),
                "has_docs": (folder / "data_docs" / "index.html").exists(),
            }
        )
    return found


# -- explanations ------------------------------------------------------------------------------------------------------


def describe_explanations(run: Path, splits: Sequence[str], settings: Settings) -> Facts:
    """LIME cards by right and wrong of each class; pictures as JPEG, as many as the page has room for."""
    from tasks.figures import read_picture

    found = [read_json(path) for path in sorted((run / "explanations").glob("*.json"))]
    found = [item for item in found if item["split"] in splits]
    found.sort(key=lambda item: -item["probability"])
    queues = {key: [item for item in found if (item["label"], item["right"]) == key] for key in CARD_GROUPS}
    # In turns, so that when the room ends no group is the one that lacks all its pictures.
    turns = sorted((turn, g, key) for g, (key, queue) in enumerate(queues.items()) for turn in range(len(queue)))
    cards: dict[tuple[int, bool], list[Facts]] = {key: [] for key in CARD_GROUPS}
    room = PICTURES_MB * 1e6
    for turn, _, key in turns:
        item = queues[key][turn]
        picture = read_picture(run / "explanations" / f"{item['image_id']}.png")
        room -= len(picture or "")
        if room < 0:
            break
        cards[key].append(describe_card(item, picture))
    n_shown = sum(len(queue) for queue in cards.values())
    groups = [
        {"key": name, "title": title, "says": says, "wrong": not key[1], "cards": cards[key]}
        for key, (name, title, says) in CARD_GROUPS.items()
    ]
    split = SPLIT_NAMES[found[0]["split"]] if found else None
    said = {"n": len(found), "n_shown": n_shown, "split": split}
    return {"groups": groups, **said, "n_samples": settings.explanation.n_samples, "weak": WEAK}


def describe_card(item: Facts, picture: str | None) -> Facts:
    """What a card says about one explained image."""
    device = {True: "yes", False: "no"}.get(item["has_device"], "not known")
    strongest = max(item.get("weights") or [0.0], key=abs)
    return {
        "image_id": item["image_id"],
        "picture": picture,
        "truth": CLASS_NAMES[int(item["label"])],
        "subtype": item["subtype"] if item["subtype"] in ("bacteria", "virus") else None,
        "probability": say_probability(item["probability"]),
        "decision": CLASS_NAMES[int(item["decision"])],
        "device": device,
        "r2": "not defined" if item.get("r2") is None else f"{item['r2']:.2f}",
        "weak": abs(strongest) < WEAK,
        "strongest": "below 0.001" if abs(strongest) < 0.001 else f"{strongest:+.3f}".replace("-", "−"),
    }


def say_probability(value: float) -> str:
    """Three decimals; what would round to 0 or 1 is said as below or above the last number that is not."""
    return "below 0.001" if value < 0.001 else "above 0.999" if value > 0.999 else f"{value:.3f}"


def summarise_page(page: Facts, path: Path) -> str:
    """The report in short, as Markdown for Prefect's page: sentence, metrics, ROC curve and one LIME picture."""
    lines = [f"**{page['notice']}**", "", page["sentence"], "", f"Report: `{path}`", ""]
    lines += ["| group | images | AUC | sensitivity | specificity |", "| --- | ---: | --- | --- | --- |"]
    for row in page["results"]["groups"]:
        cells = [row["values"].get(name) for name in ("auc", "sensitivity", "specificity")]
        texts = [f"{c['text']} ({c['interval']})" if c and c["text"] else "not measured" for c in cells]
        lines.append(f"| {row['name']} | {row['n']:,} | " + " | ".join(texts) + " |")
    if page["results"]["points_differ"]:
        lines += ["", say_second_point(page)]
    if page["results"]["roc_png"]:
        lines += ["", f"![ROC curve]({page['results']['roc_png']})"]
    card = next((c for g in page["gallery"]["groups"] for c in g["cards"] if c["picture"]), None)
    if card:
        lines += ["", f"Image {card['image_id']}: truly {card['truth']}, called {card['decision']}.", ""]
        lines += [f"![X-ray and LIME map]({card['picture']})"]
    return "\n".join(lines) + "\n"


def say_second_point(page: Facts) -> str:
    """What the second threshold gives on the first group, in a sentence."""
    point = page["results"]["points"][1]
    group = next((group for group in point["groups"] if group["n"]), None)
    if group is None:
        return f"At the threshold for high sensitivity, {point['threshold']}, nothing was measured."
    said = [f"{m} {group['values'][m]['text'] or 'not measured'}" for m in ("sensitivity", "specificity")]
    return f"{group['name']}, at the threshold for high sensitivity, {point['threshold']}: {', '.join(said)}."
