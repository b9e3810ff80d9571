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

import pandas as pd
from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.artifacts import show_markdown, show_table
from tasks.measures import describe_value
from tasks.provenance import describe_run, say_provenance, say_seconds, say_settings
from tasks.records import CLASS_NAMES, SPLITS, Facts
from tasks.report_devices import describe_devices
from tasks.settings import Settings
from tasks.storage import read_json, read_manifest, read_stage, run_folder, write_whole

TEMPLATE = Path(__file__).with_name("report.html.j2")
NOTICE = "Research software. Not a medical device, not for clinical use."
PICTURES_MB = 12.0
"""Room for LIME pictures, base64 included; the page has to stay below 15 MB."""
FEW_PATIENTS = 30
WEAK = 0.01
"""A map whose strongest piece moves the probability by less than this says little; its tints are scaled to it."""
MEASURES = ("auc", "sensitivity", "specificity", "accuracy")
SPLIT_NAMES = {"train": "training", "val": "validation", "test": "test"}
GROUPS = {
    "test": "Test, all images",
    "test_device_free": "Test, no device seen",
    "test_with_device": "Test, with a device",
    "val": "Validation, all images",
    "val_device_free": "Validation, no device seen",
    "val_with_device": "Validation, with a device",
}
REASONS = {
    "duplicate": "Identical copy of an image that stays",
    "conflict": "Identical files with opposite labels: none of them stays",
    "undecodable": "The file cannot be read as an image",
    "shows a medical device (reviewed)": "A person saw a medical device in it (training images only)",
    "shows a medical device (screener)": "The screener sees a medical device in it (training images only)",
    "may show a medical device": "The screener is in doubt about a medical device (training images only)",
}
OTHER_REASON = "Another reason, named in excluded.csv of the run folder"
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
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = lambda n: f"{n:,}"
    environment.filters["csp_hash"] = lambda s: base64.b64encode(hashlib.sha256(str(s).encode()).digest()).decode()
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(page)


def gather_page(settings: Settings, run: Path) -> Facts:
    """All that the template shows, read from the run folder: plain values, and figures as SVG."""
    manifest, metrics = read_manifest(run), read_json(run / "metrics.json")
    provenance = describe_run(settings)
    splits: list[str] = [name for name in ("test", "val") if name in settings.evaluation.splits]
    main = next((name for name in splits if metrics[name]["n"]), splits[0])
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
        "training": describe_training(run),
        "results": results,
        "gallery": describe_explanations(run, splits, settings),
        "provenance": say_provenance(provenance),
        "settings": say_settings(settings),
    }


# -- what went in ------------------------------------------------------------------------------------------------------


def describe_source(run: Path, manifest: pd.DataFrame) -> Facts:
    """Name, kind, checksum and counts of the source, as it came and as it is used."""
    facts = read_stage(run, "ingest")["facts"]
    usable = manifest[manifest["excluded"].fillna("") == ""]
    return {
        "name": facts["name"],
        "kind": {"sample": "drawn sample", "zip": "zip archive"}.get(facts["kind"], facts["kind"]),
        "sha256": facts["sha256"],
        "sha256_of": "the archive" if facts.get("archive_sha256") else "names and contents of all files",
        "n_images": facts["n_images"],
        "n_distinct": facts["n_distinct"],
        "n_copies": facts["n_images"] - facts["n_distinct"],
        "came": count_images(manifest, "source_split"),
        "used": count_images(usable, "split"),
    }


def count_images(manifest: pd.DataFrame, column: str) -> list[Facts]:
    """A row per split that exists: images and patients of each class and in all."""
    rows = []
    for name in SPLITS:
        part = manifest[manifest[column] == name]
        if not len(part):
            continue
        row: Facts = {"split": SPLIT_NAMES[name].capitalize(), "all": _size(part)}
        row |= {CLASS_NAMES[label]: _size(part[part["label"] == label]) for label in CLASS_NAMES}
        rows.append(row)
    return rows


def _size(rows: pd.DataFrame) -> Facts:
    return {"images": len(rows), "patients": int(rows["patient_id"].nunique())}


def describe_left_out(run: Path, manifest: pd.DataFrame) -> Facts:
    """Images that are excluded, by reason and split, and what else was left out or stays on purpose."""
    reasons = manifest["excluded"].fillna("")
    excluded = manifest[reasons != ""].assign(why=reasons[reasons != ""].map(plain_reason))
    ingest, screen = read_stage(run, "ingest")["facts"], read_stage(run, "screen")["facts"]
    rows = []
    for why in (*REASONS.values(), OTHER_REASON):
        part = excluded[excluded["why"] == why]
        if len(part) or why != OTHER_REASON:
            counts = {name: int((part["split"] == name).sum()) for name in SPLITS}
            rows.append({"reason": why, **counts, "all": len(part)})
    told = ("n_vanished", "n_nested", "n_nested_only", "n_clutter", "n_test_copies", "n_patients_unknown")
    also = {name: ingest.get(name, 0) for name in told} | {"n_unscreened_train": screen["n_unscreened_train"]}
    return {"n": len(excluded), "reasons": rows, **also}


def plain_reason(reason: str) -> str:
    """A reason of the manifest without the names of files in it."""
    return next((says for start, says in REASONS.items() if reason.startswith(start)), OTHER_REASON)


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


# -- training and results ----------------------------------------------------------------------------------------------


def describe_training(run: Path) -> Facts:
    """Counts of the training, and its curve when there is a history."""
    from tasks.figures import as_svg, draw_training

    record = read_stage(run, "fit")
    facts = record["facts"]
    figure = None
    if (run / "history.csv").exists() and len(history := pd.read_csv(run / "history.csv")):
        losses, aucs = list(history["loss"]), list(history["val_auc"])
        says = (
            f"Over {len(history)} epochs the training loss went from {losses[0]:.3f} to {losses[-1]:.3f} and the "
            f"validation AUC from {aucs[0]:.3f} to {aucs[-1]:.3f}; epoch {facts['best_epoch']} is kept."
        )
        drawn = draw_training([int(e) for e in history["epoch"]], losses, aucs, facts["best_epoch"])
        figure = as_svg(drawn, "training", "Training loss and validation AUC by epoch", says)
    return {**facts, "figure": figure, "took": say_seconds(record["seconds"]), "reused": record["reused"]}


def describe_results(run: Path, metrics: Facts, splits: Sequence[str], main: str, settings: Settings) -> Facts:
    """The metrics as rows, sensitivity by subtype, and ROC curve, histogram and confusion matrix of the main split."""
    from tasks.figures import as_png, as_svg, data_uri, draw_probabilities, draw_roc, roc_points

    shown = [key for key in GROUPS if key.split("_")[0] in splits and key in metrics]
    groups = [{"name": GROUPS[key], **describe_group(metrics[key], MEASURES)} for key in shown]
    subtypes = [
        {"split": SPLIT_NAMES[split], "name": subtype, **describe_group(group, ("sensitivity",))}
        for split in splits
        for subtype, group in metrics.get("subtypes", {}).get(split, {}).items()
    ]
    group, threshold = metrics[main], metrics["threshold"]
    facts: Facts = {
        "threshold": f"{threshold:.3g}",
        "groups": groups,
        "subtypes": subtypes,
        "few_patients": FEW_PATIENTS,
        "any_few": any(row["few"] for row in [*groups, *subtypes]),
        "headline": describe_group(group, MEASURES),
        "confusion": group.get("confusion"),
        "n_bootstrap": settings.evaluation.n_bootstrap,
        **dict.fromkeys(("roc", "roc_png", "histogram")),
    }
    predictions = pd.read_csv(run / "predictions.csv", usecols=["split", "label", "probability"])
    rows = predictions[predictions["split"] == main]
    labels, probabilities = rows["label"].to_numpy(float), rows["probability"].to_numpy(float)
    if rows["label"].nunique() == 2:
        operating = (float(group["sensitivity"]["value"]), float(group["specificity"]["value"]))
        roc = draw_roc(roc_points(labels, probabilities), operating, threshold)
        says = (
            f"Area under the curve {group['auc']['value']:.3f}; the threshold lies at sensitivity {operating[0]:.3f} "
            f"and specificity {operating[1]:.3f}."
        )
        facts["roc"] = as_svg(roc, "roc", f"ROC curve on the {SPLIT_NAMES[main]} images", says)
        facts["roc_png"] = data_uri(as_png(roc, 80), "png")
    if len(rows):
        drawn = draw_probabilities(labels, probabilities, threshold)
        says = "Histograms of the probability for truly pneumonia and truly normal images, with the threshold."
        facts["histogram"] = as_svg(drawn, "histogram", "How the probabilities spread by class", says)
    return facts


def describe_group(group: Facts, measures: Sequence[str]) -> Facts:
    """A group of ``metrics.json`` for reading: texts of values and intervals, or the reason why there are none."""
    if not group["n"]:
        return {"n": 0, "n_patients": None, "reason": group["reason"], "few": False, "values": {}}
    values = {name: describe_value(group[name]) for name in measures if name in group}
    n_patients = group.get("n_patients")
    few = n_patients is not None and n_patients < FEW_PATIENTS
    return {"n": group["n"], "n_patients": n_patients, "reason": None, "few": few, "values": values}


def say_result(metrics: Facts, split: str) -> str:
    """The result in a sentence."""
    group, name = metrics[split], SPLIT_NAMES[split]
    if not group["n"]:
        return f"The network was not measured on {name} images: {group['reason']}."
    said = describe_group(group, MEASURES)["values"]
    parts = []
    for key, label in (("auc", "AUC"), ("sensitivity", "sensitivity"), ("specificity", "specificity")):
        value = said[key]
        if value["text"] is None:
            parts.append(f"no {label}, because {value['reason']}")
        else:
            interval = "" if value["interval"] is None else f" (95 % interval {value['interval']})"
            parts.append(f"{label} {value['text']}{interval}")
    images = f"{group['n']:,} {name} image" + ("" if group["n"] == 1 else "s")
    return f"On {images}: {parts[0]}; at threshold {metrics['threshold']:.3g} {parts[1]}, {parts[2]}."


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
    if page["results"]["roc_png"]:
        lines += ["", f"![ROC curve]({page['results']['roc_png']})"]
    card = next((c for g in page["gallery"]["groups"] for c in g["cards"] if c["picture"]), None)
    if card:
        lines += ["", f"Image {card['image_id']}: truly {card['truth']}, called {card['decision']}.", ""]
        lines += [f"![X-ray and LIME map]({card['picture']})"]
    return "\n".join(lines) + "\n"
