"""The part of the report that is about medical devices: how often they are seen, how well, and at what cost."""

from collections.abc import Sequence

import pandas as pd

from tasks.measures import describe_value
from tasks.pixels.outlines import draw_outline, encode_jpeg
from tasks.records import CLASS_NAMES, Facts
from tasks.runs.run import Run

RATE_NAMES = {
    "train before": "Training, before screening",
    "train after": "Training, after screening",
    "val": "Validation",
    "test": "Test",
}
QUALITY_GROUPS = {"all": "All readings", **{name: f"{name.capitalize()} images alone" for name in CLASS_NAMES.values()}}


N_EXAMPLES = 4


def describe_devices(run: Run, manifest: pd.DataFrame, splits: Sequence[str]) -> Facts:
    """How often a device is seen, by class, before and after screening; of test only when test is evaluated."""
    from tasks.reporting.figures import as_svg, draw_rates

    screening = run.settings.screening
    facts = run.facts("screen")
    rows = [
        {**row, "name": RATE_NAMES[row["split"]]}
        for row in facts["rates"]
        if row["split"] in RATE_NAMES and row["images"] and (row["split"] != "test" or "test" in splits)
    ]
    figure = None
    if any(row["screened"] for row in rows):
        short = [row | {"name": row["name"].replace(",", "").removesuffix(" screening")} for row in rows]
        says = "; ".join(
            f"{row['name']}, {row['class']}: " + ("not known" if row["rate"] is None else f"{row['rate']:.1%}")
            for row in rows
        )
        figure = as_svg(draw_rates(short), "devices", "Share of images that show a device", says)
    names = list(dict.fromkeys(row["name"] for row in rows))
    counts = ("n_readings", "n_answers", "n_doubtful", "n_on_sheet")
    excluded = ("n_excluded", "n_excluded_reviewed", "n_excluded_scored", "n_excluded_doubtful")
    return {
        "parts": [{"name": name, "rows": [row for row in rows if row["name"] == name]} for name in names],
        "figure": figure,
        "review": facts["review"],
        "screener": facts["screener"]["name"],
        "screener_sha256": facts["screener"]["sha256"],
        "threshold": f"{screening.threshold:g}",
        "exclude_from": f"{screening.leaves_from:g}",
        "doubtful_to": f"{screening.doubtful_to:g}",
        "quality": describe_quality(facts["quality"]),
        "examples": describe_examples(run, manifest),
        **{name: facts[name] for name in (*counts, *excluded)},
    }


def describe_examples(run: Run, manifest: pd.DataFrame) -> list[Facts]:
    """Training images the screener is surest about, and those it doubts most, with an outline of what it saw."""
    if not (run.folder / "masks" / "index.json").exists():
        return []
    screening = run.settings.screening
    rows = manifest[(manifest["split"] == "train") & (manifest["device_score"] >= screening.leaves_from).fillna(False)]
    rows = rows.drop_duplicates("sha256").sort_values(["device_score", "path"], ascending=[False, True])
    surest = rows.head(N_EXAMPLES)
    others = rows.drop(surest.index)
    nearest = (others["device_score"] - screening.threshold).abs().sort_values(kind="stable").index[:N_EXAMPLES]
    chosen = pd.concat([surest, others.loc[nearest]])
    ids = list(chosen["image_id"])
    pixels, masks = (
        run.images().read(ids),
        run.masks().read(ids),
    )
    examples = []
    for i, (image_id, score) in enumerate(zip(ids, chosen["device_score"], strict=True)):
        outline, sure = draw_outline(masks[i])
        picture = encode_jpeg(pixels[i])
        examples.append(
            {"image_id": image_id, "score": f"{score:.2f}", "picture": picture, "outline": outline, "sure": sure}
        )
    return examples


def describe_quality(quality: Facts) -> Facts:
    """The screener's measures as rows for reading, its cost and what it would leave."""
    rows = []
    for key, name in QUALITY_GROUPS.items():
        group = quality[key]
        values = {m: describe_value(group[m]) for m in ("auc", "sensitivity", "specificity") if m in group}
        rows.append({"name": name, "n": group["n"], "reason": group.get("reason"), "values": values})
    cost = {name: describe_value(value, percent=True) for name, value in quality["cost"].items()}
    return {
        "n": quality["all"]["n"],
        "n_known": quality["n_known"],
        "rows": rows,
        "cost": cost,
        "residual": describe_value(quality["residual"], percent=True),
    }
