"""The part of the report that is about the networks: training, results, calibration, and other conditions.

Also what the model card says about them: values and intervals in words.
"""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import pandas as pd

from tasks.findings import NOT_MEASURED, Estimate, GroupsAtThreshold, MeasuredGroup, Metrics
from tasks.measures import describe_value
from tasks.records import Facts
from tasks.reporting.inputs import SPLIT_NAMES
from tasks.reporting.words import say_seconds
from tasks.runs.run import Run
from tasks.runs.stages import read_stage
from tasks.settings import EvaluationSettings, TrainingSettings

FEW_PATIENTS = 30
DECISIONS = ("sensitivity", "specificity", "accuracy")
MEASURES = ("auc", *DECISIONS)
MEASURE_NAMES = {"auc": "AUC", **{name: name for name in DECISIONS}}
GROUP_NAMES = {
    "test": "Test, all images",
    "test_device_free": "Test, no device seen",
    "test_with_device": "Test, with a device",
    "val": "Validation, all images",
    "val_device_free": "Validation, no device seen",
    "val_with_device": "Validation, with a device",
}
POINTS = {"balanced": "Balanced", "high_sensitivity": "High sensitivity"}
UNCHANGED = "as it is"
N_AUCS_SHOWN = 10
"""With more networks than this, the range of their AUCs is shown, not each."""


# -- training ----------------------------------------------------------------------------------------------------------


def describe_training(run: Path, settings: TrainingSettings) -> Facts:
    """Counts of the training, and how the networks were joined."""
    record, joined = read_stage(run, "fit"), read_stage(run, "calibrate").facts
    facts = record.facts
    counts = ("n_train", "n_train_pneumonia", "n_train_subtype_known", "n_models", "epochs")
    return {
        **{name: facts[name] for name in counts},
        **{name: joined[name] for name in ("n_val", "n_weights", "model_sha256")},
        "n_changes": joined["n_shifts"],
        "slope": f"{joined['slope']:.2f}",
        "offset": f"{'plus' if joined['offset'] >= 0 else 'minus'} {abs(joined['offset']):.2f}",
        "start": say_start(settings),
        "aucs": say_aucs(facts["val_aucs"]),
        "took": say_seconds(record.seconds),
        "reused": record.reused,
    }


def draw_history(run: Path) -> str | None:
    """The curves of the training as SVG; ``None`` where the run folder has no history."""
    from tasks.reporting.figures import as_svg, draw_training

    if not (run / "history.csv").exists() or not len(history := pd.read_csv(run / "history.csv")):
        return None
    loss, auc = (history.pivot(index="epoch", columns="member", values=name) for name in ("loss", "val_auc"))
    epochs, n_members = [int(epoch) for epoch in loss.index], loss.shape[1]
    mean = "" if n_members == 1 else f" in the mean of {n_members} networks"
    says = (
        f"From epoch {epochs[0]} to {epochs[-1]} the training loss went from {loss.iloc[0].mean():.3f} to "
        f"{loss.iloc[-1].mean():.3f} and the validation AUC from {auc.iloc[0].mean():.3f} to "
        f"{auc.iloc[-1].mean():.3f}{mean}."
    )
    drawn = draw_training(epochs, loss.to_numpy(float).T, auc.to_numpy(float).T)
    return as_svg(drawn, "training", "Training loss and validation AUC by epoch", says)


def say_start(settings: TrainingSettings) -> str:
    """What the networks start from."""
    if settings.backbone is None:
        return "from scratch"
    if settings.weights in (None, "none"):
        return f"from scratch in the form of {settings.backbone}"
    source = "ImageNet weights" if settings.weights == "imagenet" else "weights out of a file"
    return f"from {settings.backbone} with {source}"


def say_aucs(aucs: Sequence[float]) -> str:
    """The validation AUC of each network, or their range where they are many."""
    texts = [f"{auc:.3f}" for auc in aucs]
    if len(texts) > N_AUCS_SHOWN:
        return f"from {min(texts)} to {max(texts)}"
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"


# -- results -----------------------------------------------------------------------------------------------------------


def choose_splits(metrics: Metrics, settings: EvaluationSettings) -> tuple[list[str], str]:
    """The evaluated splits, test first, and the one whose result stands on top: the first that holds images."""
    splits: list[str] = [name for name in ("test", "val") if name in settings.splits]
    return splits, next((name for name in splits if metrics.groups[name].n), splits[0])


def describe_results(run: Run, metrics: Metrics, splits: Sequence[str], main: str) -> Facts:
    """All of ``metrics.json`` for reading, and the figures of the main split.

    Args:
        run: The run.
        metrics: Its ``metrics.json``.
        splits: The evaluated splits in the order they are shown in.
        main: The split whose result stands on top.
    """
    groups = [
        {"name": GROUP_NAMES[key], **describe_group(group, MEASURES)}
        for key, group in groups_of(metrics, splits).items()
    ]
    groups += [{"name": name, **describe_group(group, MEASURES)} for name, group in list_own_groups(metrics, splits)]
    subtypes = [
        {"split": SPLIT_NAMES[split], "name": subtype, **describe_group(group, ("sensitivity",))}
        for split in splits
        for subtype, group in metrics.subtypes.get(split, {}).items()
    ]
    bacteria = [
        {"name": SPLIT_NAMES[split].capitalize(), **describe_group(metrics.bacteria[split], MEASURES)}
        for split in splits
    ]
    points = describe_points(metrics, splits)
    few = [*groups, *subtypes, *bacteria, *(group for point in points for group in point["groups"])]
    return {
        "threshold": say_threshold(metrics.threshold),
        "groups": groups,
        "points": points,
        "points_differ": points_differ(metrics),
        "min_sensitivity": say_share(run.settings.evaluation.min_sensitivity),
        "subtypes": subtypes,
        "bacteria": bacteria,
        "members": describe_members(metrics, splits),
        "calibration": describe_calibration(metrics, splits, main),
        "shifts": describe_shifts(metrics),
        "worst_shifts": find_worst_shifts(metrics),
        "border": describe_border(metrics, main),
        "few_patients": FEW_PATIENTS,
        "any_few": any(row["few"] for row in few),
        "headline": describe_group(metrics.groups[main], MEASURES),
        "confusion": metrics.groups[main].confusion,
        "n_bootstrap": run.settings.evaluation.n_bootstrap,
        **draw_results(run.folder, metrics, main),
    }


def list_own_groups(metrics: Metrics, splits: Sequence[str]) -> list[tuple[str, MeasuredGroup]]:
    """The groups that ``ingestion.groups`` names, each with its name in the report: ``Test, site: A``."""
    return [
        (f"{SPLIT_NAMES[split].capitalize()}, {name}: {value}", group)
        for split in splits
        for name, values in metrics.by_group.get(split, {}).items()
        for value, group in values.items()
    ]


def draw_results(run: Path, metrics: Metrics, main: str) -> Facts:
    """ROC curve (also as PNG), histogram and reliability of the main split; ``None`` where there is nothing to draw."""
    from tasks.reporting.figures import as_svg, draw_probabilities

    predictions = pd.read_csv(run / "predictions.csv", usecols=["split", "label", "probability"])
    rows = predictions[predictions["split"] == main]
    histogram = None
    if len(rows):
        labels, probabilities = rows["label"].to_numpy(float), rows["probability"].to_numpy(float)
        drawn = draw_probabilities(labels, probabilities, metrics.threshold)
        says = "Histograms of the probability for truly pneumonia and truly normal images, with the threshold."
        histogram = as_svg(drawn, "histogram", "How the probabilities spread by class", says)
    reliability = draw_calibration(metrics.calibration[main], main)
    return {**draw_curve(rows, metrics, main), "histogram": histogram, "reliability": reliability}


def draw_curve(rows: pd.DataFrame, metrics: Metrics, main: str) -> dict[str, str | None]:
    """The ROC curve as SVG and as PNG; ``None`` where a class is missing.

    Args:
        rows: ``label, probability`` of the main split.
        metrics: The run's.
        main: The main split.
    """
    from tasks.reporting.figures import as_png, as_svg, data_uri, draw_roc, roc_points

    if rows["label"].nunique() < 2:
        return {"roc": None, "roc_png": None}
    points = roc_points(rows["label"].to_numpy(float), rows["probability"].to_numpy(float))
    balanced, sensitive = (find_point(metrics.operating_points[name].groups[main]) for name in POINTS)
    second = sensitive if points_differ(metrics) else None
    drawn = draw_roc(points, balanced, metrics.threshold, second)
    auc = say_measure(metrics.groups[main], "auc")
    says = f"{auc}. The balanced threshold gives sensitivity {balanced[0]:.3f} and specificity {balanced[1]:.3f}."
    if second:
        says += f" The one for high sensitivity gives {second[0]:.3f} and {second[1]:.3f}."
    svg = as_svg(drawn, "roc", f"ROC curve on the {SPLIT_NAMES[main]} images", says)
    return {"roc": svg, "roc_png": data_uri(as_png(drawn, 80), "png")}


def find_point(group: MeasuredGroup) -> tuple[float, float]:
    """Sensitivity and specificity of a group that holds both classes."""
    sensitivity, specificity = ((group.estimate(name) or NOT_MEASURED)["value"] for name in DECISIONS[:2])
    return sensitivity, specificity


def draw_calibration(group: MeasuredGroup, main: str) -> str | None:
    """The reliability curve as SVG; ``None`` where no image was measured."""
    from tasks.reporting.figures import as_svg, draw_reliability

    if not group.n:
        return None
    says = "; ".join(
        f"of {part['n']:,} from {part['from']:.1f} to {part['to']:.1f} (mean {part['mean_probability']:.2f}), "
        f"{say_share(part['share'])} show pneumonia"
        for part in group.bins
        if part["n"]
    )
    title = f"Reliability of the probabilities on the {SPLIT_NAMES[main]} images"
    return as_svg(draw_reliability(group.bins), "reliability", title, f"Images by probability: {says}.")


def describe_points(metrics: Metrics, splits: Sequence[str]) -> list[Facts]:
    """Both thresholds with what they give on each group that they were measured on."""
    points = []
    for name, title in POINTS.items():
        point = metrics.operating_points[name]
        groups = [
            {"name": GROUP_NAMES[key], **describe_group(group, DECISIONS)}
            for key, group in groups_of(point, splits).items()
        ]
        points.append({"name": title, "threshold": say_threshold(point.threshold), "groups": groups})
    return points


def points_differ(metrics: Metrics) -> bool:
    """Whether the second threshold is another one than the balanced."""
    balanced, sensitive = (metrics.operating_points[name].threshold for name in POINTS)
    return balanced != sensitive


def describe_members(metrics: Metrics, splits: Sequence[str]) -> list[Facts]:
    """By split, mean and standard deviation of each measure over the networks alone, and that of the model."""
    rows = []
    for split in splits:
        if (members := metrics.members.get(split)) is None:
            continue
        alone = {}
        for name in MEASURES:
            spread = members[name]
            if spread["values"] is None:
                alone[name] = {"text": None, "spread": None, "reason": spread["reason"]}
            else:
                alone[name] = {"text": f"{spread['mean']:.3f}", "spread": f"{spread['deviation']:.3f}", "reason": None}
        joined = describe_group(metrics.groups[split], MEASURES)["values"]
        rows.append({"name": SPLIT_NAMES[split].capitalize(), "alone": alone, "joined": joined})
    return rows


def describe_calibration(metrics: Metrics, splits: Sequence[str], main: str) -> Facts:
    """Expected calibration error by split; mean probability and share of pneumonia of the main one."""
    rows = []
    for split in splits:
        group = metrics.calibration[split]
        ece = describe_group(group, ("ece",))["values"].get("ece")
        rows.append({"name": SPLIT_NAMES[split].capitalize(), "n": group.n, "reason": group.reason, "ece": ece})
    group, mean = metrics.calibration[main], None
    if group.n:
        filled = [part for part in group.bins if part["n"]]
        mean = {
            name: say_share(sum(part["n"] * part[name] for part in filled) / group.n)
            for name in ("mean_probability", "share")
        }
    return {"rows": rows, "mean": mean}


# -- other conditions --------------------------------------------------------------------------------------------------


def describe_shifts(metrics: Metrics) -> list[Facts]:
    """Validation as it is and under each shift, in the order of ``tasks.pixels.shifts``."""
    from tasks.pixels.shifts import SHIFTS

    found = metrics.shifts
    names = [name for name in SHIFTS if name in found] + [name for name in found if name not in SHIFTS]
    return [{"name": name, **describe_group(found[name], MEASURES)} for name in names]


def find_worst_shifts(metrics: Metrics) -> list[Facts]:
    """For AUC, sensitivity and specificity the shift under which it is lowest, and what it is without any."""
    worst = []
    for measure in MEASURES[:3]:
        known = {
            name: value
            for name, group in metrics.shifts.items()
            if (value := group.estimate(measure)) and value["value"] is not None
        }
        if UNCHANGED in known:
            name = min(known, key=lambda name: (known[name]["value"], name != UNCHANGED))
            value = describe_value(known[name])
            row = {"measure": MEASURE_NAMES[measure], "name": name, "unchanged": f"{known[UNCHANGED]['value']:.3f}"}
            worst.append({**row, "text": value["text"], "interval": value["interval"], "lower": name != UNCHANGED})
    return worst


def describe_border(metrics: Metrics, main: str) -> Facts:
    """AUC on the border alone and without it, what leaving it out costs, and what that means."""
    from tasks.pixels.shifts import BORDER

    rows = [
        {"name": name, "short": short, **describe_value(value)}
        for value, name, short in (
            (metrics.border_only, "AUC where only the border is left", "AUC on it alone"),
            (metrics.border_removed, "AUC where the border is blanked", "without it"),
            (metrics.border_loss, "AUC lost by blanking the border", "a loss of"),
        )
    ]
    for row in rows:
        row |= {name: row[name] and row[name].replace("-", "−") for name in ("text", "interval")}
    share = str(Fraction(BORDER).limit_denominator(100))
    says = [say_border(metrics.border_only), say_border_loss(metrics.border_loss)]
    return {"split": SPLIT_NAMES[main], "share": share, "rows": rows, "says": says}


def say_border(only: Estimate) -> str:
    """What the AUC on the border alone means."""
    if only["value"] is None:
        return f"What the border alone tells the network is not known: {only['reason']}."
    if only["low"] > 0.5:
        return "The AUC on the border alone is above 0.5: the border tells this network something about the class."
    if only["high"] < 0.5:
        return "The AUC on the border alone is below 0.5: what the border tells this network points the wrong way."
    return (
        "The AUC on the border alone cannot be told from guessing: there is no sign that this network reads the class "
        "there."
    )


def say_border_loss(loss: Estimate) -> str:
    """What the loss of AUC without the border means."""
    if loss["value"] is None:
        return f"What the network loses without the border is not known: {loss['reason']}."
    if loss["low"] > 0:
        return "Without the border the network is worse: some of its answers rest on the border."
    if loss["high"] < 0:
        return "Without the border the network is better."
    return "Blanking the border makes no difference that can be told from chance."


# -- words -------------------------------------------------------------------------------------------------------------


def groups_of(point: GroupsAtThreshold, splits: Sequence[str]) -> dict[str, MeasuredGroup]:
    """The groups of some splits, in the order that they are shown in."""
    return {key: point.groups[key] for key in GROUP_NAMES if key.split("_")[0] in splits and key in point.groups}


def describe_group(group: MeasuredGroup, measures: Sequence[str]) -> Facts:
    """A group of ``metrics.json`` for reading: texts of values and intervals, or the reason why there are none."""
    if not group.n:
        return {"n": 0, "n_patients": None, "reason": group.reason, "few": False, "values": {}}
    values = {name: describe_value(value) for name in measures if (value := group.estimate(name))}
    few = group.n_patients is not None and group.n_patients < FEW_PATIENTS
    return {"n": group.n, "n_patients": group.n_patients, "reason": None, "few": few, "values": values}


def say_result(metrics: Metrics, split: str) -> str:
    """The result in a sentence."""
    group, name = metrics.groups[split], SPLIT_NAMES[split]
    if not group.n:
        return f"The network was not measured on {name} images: {group.reason}."
    auc, sensitivity, specificity = (say_measure(group, measure) for measure in MEASURES[:3])
    images = f"{group.n:,} {name} image" + ("" if group.n == 1 else "s")
    return f"On {images}: {auc}; at threshold {say_threshold(metrics.threshold)} {sensitivity}, {specificity}."


def say_measure(group: MeasuredGroup, measure: str) -> str:
    """``AUC 0.973 (95 % interval 0.961 to 0.984)``, or why there is none."""
    value = describe_value(group.estimate(measure) or NOT_MEASURED)
    if value["text"] is None:
        return f"no {MEASURE_NAMES[measure]}, because {value['reason']}"
    interval = "" if value["interval"] is None else f" (95 % interval {value['interval']})"
    return f"{MEASURE_NAMES[measure]} {value['text']}{interval}"


def say_threshold(threshold: float) -> str:
    """Three significant digits."""
    return f"{threshold:#.3g}"


def say_share(share: float) -> str:
    """A share in percent: ``95 %``, ``10.7 %``."""
    return f"{round(100 * share, 1):g} %"
