"""The audit by lung: what a network knows from the lungs and what without them, and where its maps and devices lie.

The place of the lungs is the predicted mask, 4 px wider. Images without lungs are left out here, and counted.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tasks.explaining.baselines import Baseline
from tasks.explaining.probes import Answers, Change, mean_lift, measure_auc, measure_change
from tasks.explaining.subjects import Scene, Subject
from tasks.measures import draw_patients, summarise
from tasks.pixels.covering import cover, find_lungs, widen_lungs
from tasks.records import CLASS_NAMES, Facts

NO_LUNGS = "no lungs are found in the audited images"
VIEWS = ("lungs_only", "lungs_removed", "other_lungs_removed")


def ask_lungs(scene: Scene, subject: Subject, n_bootstrap: int, seed: int) -> Facts:
    """AUC of a network that is shown the lungs only, and one that is shown all but them.

    Returns:
        ``lungs_only``; ``lungs_removed``; ``other_lungs_removed``, the control, where the lungs of another child are
        covered, because a hole tells something by its shape; ``lungs_loss``, AUC of the whole images less that of the
        lungs only; ``lungs_gain``, AUC of the lungs only less that without them; ``hole_gain``, AUC without the lungs
        less that of the control; each with ``n``. And ``lungs_share`` of the picture, and ``n_no_lungs``, images that
        are left out.
    """
    places = widen_lungs(scene.lungs)
    at = find_lungs(places)
    rows, packed, places = scene.rows[at], scene.packed[at], places[at]
    facts: Facts = {"n_no_lungs": int((~at).sum())}
    if not len(rows):
        nothing = {"value": None, "low": None, "high": None, "reason": NO_LUNGS, "n": 0}
        return facts | dict.fromkeys((*VIEWS, "lungs_loss", "lungs_gain", "hole_gain"), nothing)
    weights = draw_patients(rows["group_id"], n_bootstrap, seed)
    others = pick_others(rows["group_id"], seed)
    views = [~places, places] if others is None else [~places, places, places[others]]
    drawn = {
        name: measure_auc(rows, subject.ask(cover(packed, covered)), weights)
        for name, covered in zip(VIEWS, views, strict=False)
    }
    drawn.setdefault(VIEWS[2], np.full(len(weights), np.nan))
    drawn["lungs_loss"] = measure_auc(rows, subject.probability[at], weights) - drawn["lungs_only"]
    drawn["lungs_gain"] = drawn["lungs_only"] - drawn["lungs_removed"]
    drawn["hole_gain"] = drawn["lungs_removed"] - drawn["other_lungs_removed"]
    why = "a class is missing" if rows["label"].nunique() < 2 else "all images are of one child"
    found = {name: summarise(values, why) | {"n": len(rows)} for name, values in drawn.items()}
    return facts | {"lungs_share": round(float(places.mean()), 4)} | found


def measure_shape(rows: pd.DataFrame, shape: Baseline, n_bootstrap: int, seed: int) -> Facts:
    """AUC of the outline of the lungs alone, as from ``ask_shape``, with ``n``; or why there is none."""
    if shape.answer is None:
        return {"value": None, "low": None, "high": None, "reason": shape.reason, "n": 0}
    weights = draw_patients(rows.loc[shape.at, "group_id"], n_bootstrap, seed)
    auc = measure_auc(rows[shape.at], shape.answer, weights)
    return summarise(auc, "a class is missing") | {"n": int(shape.at.sum())}


def pick_others(patients: "pd.Series[str]", seed: int) -> NDArray[np.intp] | None:
    """For each row a row of another patient, seeded; ``None`` where all are of one."""
    codes = pd.factorize(patients.astype(str))[0]
    if not codes.any():
        return None
    rng = np.random.default_rng([seed, 13])
    return np.array([rng.choice(np.flatnonzero(codes != code)) for code in codes], np.intp)


def measure_by_place(scene: Scene, change: Change, answers: Answers, n_bootstrap: int, seed: int) -> Facts:
    """What ``measure_change`` gives where at least half of the changed pixels lie over the lungs, and where less does.

    Returns:
        ``{"over_lungs": …, "elsewhere": …}``; images without lungs, or that the change leaves as they are, are in none.
    """
    places = widen_lungs(scene.lungs[change.at])
    changed = change.changed != scene.packed[change.at]
    known = find_lungs(places) & changed.any((1, 2))
    over = 2 * (changed & places).sum((1, 2)) >= changed.sum((1, 2))
    facts: Facts = {}
    for name, at in (("over_lungs", known & over), ("elsewhere", known & ~over)):
        control = None if answers.control is None else answers.control[at]
        part = replace(answers, before=answers.before[at], after=answers.after[at], control=control)
        facts[name] = measure_change(scene.rows.iloc[change.at[at]], part, n_bootstrap, seed)
    return facts


def weigh_lungs(maps: Sequence[Facts], n_bootstrap: int, seed: int) -> Facts:
    """How much of LIME's weight lies in the lungs, over all maps, by class, and by right and wrong answers.

    Args:
        maps: Explained images with what one network says of them: ``label, decision, group_id``, and ``places`` and
            ``places_against``, as from ``share_weight``.
        n_bootstrap: Draws of patients behind each interval.
        seed: Seed of the draws.

    Returns:
        By group ``positive`` and ``negative``, each with ``share`` (of that weight, 0 to 1), ``lift`` (share over the
        share of the area; 1 is as by chance) and ``n``, the maps that have such weight and lungs; or a reason.
    """
    groups = {"all": list(maps)}
    groups |= {name: [one for one in maps if one["label"] == label] for label, name in CLASS_NAMES.items()}
    for name, is_right in (("right", True), ("wrong", False)):
        groups[name] = [one for one in maps if (one["label"] == one["decision"]) is is_right]
    return {
        name: {
            sign: _weigh([one for one in group if "lungs_area" in (one[key] or {})], key, n_bootstrap, seed)
            for sign, key in (("positive", "places"), ("negative", "places_against"))
        }
        for name, group in groups.items()
    }


def _weigh(maps: list[Facts], key: str, n_bootstrap: int, seed: int) -> Facts:
    if not maps:
        return {"n": 0, "reason": "no explained image of this kind has such weight and lungs"}
    on, area = ([one[key][f"lungs_{what}"] for one in maps] for what in ("weight", "area"))
    patients = pd.Series([one["group_id"] for one in maps])
    share, lift = (mean_lift(on, size, patients, n_bootstrap, seed) for size in ([1.0] * len(maps), area))
    return {"n": len(maps), "share": share, "lift": lift}
