"""The audit by lung is right where the lungs, and what a network reads, are known."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tasks.explaining.baselines import ask_shape
from tasks.explaining.lungs import NO_LUNGS, VIEWS, ask_lungs, measure_by_place, measure_shape, pick_others, weigh_lungs
from tasks.explaining.probes import Answers, Change
from tasks.explaining.subjects import Scene, Subject
from tasks.findings import read_audit, read_metrics
from tasks.records import Facts

SIDE, N = 56, 60
UPPER, LOWER = np.s_[:, 22:26, 14:20], np.s_[:, 32:36, 14:20]
"""Two places in every left lung."""
CORNER = np.s_[:, :6, :6]


def draw_lungs(labels: np.ndarray, seed: int, growth: int = 0) -> np.ndarray:
    """Masks of two lungs each, here and there; ``growth`` px longer with pneumonia."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((len(labels), SIDE, SIDE), np.uint8)
    for mask, label in zip(masks, labels, strict=True):
        top, bottom = 18 - rng.integers(0, 4), 39 + rng.integers(0, 4) + growth * label
        left, right = 14 - rng.integers(0, 3), 41 + rng.integers(0, 3)
        mask[top:bottom, left:21] = mask[top:bottom, 35:right] = 255
    return masks


def draw_scene(growth: int = 0, seed: int = 0) -> Scene:
    """Pneumonia makes lungs brighter above than below, and the left corner brighter than the right one."""
    labels = np.arange(N) % 2
    rng = np.random.default_rng([seed, 1])
    packed = rng.normal(100, 6, (N, SIDE, SIDE))
    sign = np.where(labels == 1, 1, -1)[:, None, None] * rng.uniform(2, 12, (N, 1, 1))
    for part, amount in ((UPPER, sign), (LOWER, -sign), (CORNER, sign), (np.s_[:, :6, -6:], -sign)):
        packed[part] += amount
    rows = pd.DataFrame({"label": labels, "group_id": [f"p{i // 2}" for i in range(N)], "split": "test"})
    nothing = np.zeros((N, SIDE, SIDE), np.uint8)
    return Scene(rows, np.rint(packed).astype(np.uint8), nothing, draw_lungs(labels, seed, growth))


def read_lung(packed: np.ndarray) -> np.ndarray:
    return to_answer(packed[UPPER].mean((1, 2)) - packed[LOWER].mean((1, 2)))


def read_corner(packed: np.ndarray) -> np.ndarray:
    return to_answer(packed[CORNER].mean((1, 2)) - packed[:, :6, -6:].mean((1, 2)))


def read_hole(packed: np.ndarray) -> np.ndarray:
    """How much of the picture has one and the same grey."""
    return to_answer(np.array([np.bincount(image.ravel()).max() / 100 - 10 for image in packed]))


def to_answer(figure: np.ndarray) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-figure / 10)), np.float64)


def ask(scene: Scene, network: Callable[[np.ndarray], np.ndarray], seed: int = 1) -> Facts:
    return ask_lungs(scene, Subject("model", network, 0.5, network(scene.packed)), 50, seed)


# -- what is known from the lungs --------------------------------------------------------------------------------------


def test_a_network_that_reads_in_the_lungs_needs_nothing_else_and_knows_nothing_without() -> None:
    found = ask(draw_scene(), read_lung)
    assert found["lungs_only"]["value"] > 0.95 and found["lungs_loss"]["value"] == 0
    assert found["lungs_removed"]["value"] == found["other_lungs_removed"]["value"] == 0.5
    assert all(found[name]["n"] == N for name in VIEWS)
    assert found["n_no_lungs"] == 0 and 0.2 < found["lungs_share"] < 0.6


def test_a_network_that_reads_a_corner_needs_no_lungs_and_knows_nothing_from_them() -> None:
    found = ask(draw_scene(), read_corner)
    assert found["lungs_only"]["value"] == 0.5
    assert found["lungs_removed"]["value"] > 0.95 and found["hole_gain"]["value"] == 0
    assert found["lungs_loss"]["value"] == pytest.approx(found["lungs_removed"]["value"] - 0.5)
    assert found["lungs_gain"]["high"] < 0, "it knows less from the lungs than without them"


def test_a_network_that_reads_the_shape_of_a_hole_gains_by_its_own_over_another_s() -> None:
    found = ask(draw_scene(growth=9), read_hole)
    assert found["lungs_removed"]["value"] > 0.9 and found["hole_gain"]["low"] > 0.2
    assert ask(draw_scene(), read_hole)["hole_gain"]["low"] < 0.05


def test_the_shape_of_the_lungs_tells_the_class_where_their_length_goes_with_it_and_else_not() -> None:
    labels = np.arange(200) % 2
    train = pd.DataFrame({"label": labels})
    for growth, low, high in ((9, 0.95, 1.0), (0, 0.35, 0.65)):
        told = ask_shape(train, draw_lungs(labels, 2, growth), draw_lungs(labels, 3, growth))
        assert told.answer is not None
        above = told.answer[labels == 1][:, None] > told.answer[labels == 0]
        assert low <= above.mean() <= high


def test_images_without_lungs_are_left_out_and_counted() -> None:
    scene = draw_scene()
    lungs = scene.lungs.copy()
    lungs[:10] = 0
    found = ask(replace(scene, lungs=lungs), read_lung)
    assert found["n_no_lungs"] == 10 and found["lungs_only"]["n"] == N - 10
    told = ask_shape(scene.rows, lungs, lungs)
    assert told.answer is not None and told.at.sum() == len(told.answer) == N - 10
    assert measure_shape(scene.rows, told, 20, 1)["n"] == N - 10


def test_where_no_lungs_are_found_nothing_is_measured_and_the_reason_is_given() -> None:
    scene = draw_scene()
    found = ask(replace(scene, lungs=np.zeros_like(scene.lungs)), read_lung)
    assert all(found[name] | {"n": 0} == found[name] and found[name]["reason"] == NO_LUNGS for name in VIEWS)
    told = measure_shape(scene.rows, ask_shape(scene.rows, scene.lungs, np.zeros_like(scene.lungs)), 20, 1)
    assert told == {"value": None, "low": None, "high": None, "reason": NO_LUNGS, "n": 0}


def test_one_child_alone_has_no_control() -> None:
    scene = draw_scene()
    found = ask(replace(scene, rows=scene.rows.assign(group_id="p")), read_lung)
    assert found["other_lungs_removed"]["value"] is None and "one child" in found["hole_gain"]["reason"]
    assert found["lungs_removed"]["value"] == 0.5


def test_the_other_lungs_are_those_of_another_child_and_a_seed_gives_them_again() -> None:
    patients = pd.Series([f"p{i // 4}" for i in range(40)])
    others = pick_others(patients, 1)
    assert others is not None
    assert (patients.to_numpy() != patients.to_numpy()[others]).all()
    again, another = pick_others(patients, 1), pick_others(patients, 2)
    assert again is not None and another is not None
    assert np.array_equal(others, again) and not np.array_equal(others, another)


def test_the_metrics_and_the_audit_of_a_run_say_the_same_of_its_model(finished_run: Path) -> None:
    metrics, audit = read_metrics(finished_run), read_audit(finished_run)
    assert metrics.lungs_only["n"] > 0
    for name in ("lungs_only", "lungs_removed"):
        assert getattr(metrics, name) == audit.blanked["model"][name]


# -- devices by place --------------------------------------------------------------------------------------------------


def test_devices_over_the_lungs_and_elsewhere_are_told_apart_and_what_left_no_trace_is_in_neither() -> None:
    scene = draw_scene()
    at = np.array([0, 2, 4, 6, 8], np.intp)  # normal images
    changed = scene.packed[at].copy()
    changed[:2, 24:28, 14:20] = 250  # in the left lung
    changed[2:4, :3, 20:40] = 250  # above the shoulders
    after = np.array([0.1, 0.1, 0.9, 0.9, 0.9])
    answers = Answers(np.full(5, 0.1), after, np.full(5, 0.1), 0.5, 2.0)
    found = measure_by_place(scene, Change(at, changed, changed), answers, 20, 1)
    over, elsewhere = found["over_lungs"]["normal"], found["elsewhere"]["normal"]
    assert (over["n"], elsewhere["n"]) == (2, 2)
    assert over["shift"]["value"] == over["net_flips"]["value"] == 0
    assert elsewhere["shift"]["value"] > 1 and elsewhere["net_flips"]["value"] == 1
    assert found["over_lungs"]["pneumonia"]["n"] == 0


# -- maps --------------------------------------------------------------------------------------------------------------


def explained(label: int, decision: int, weight: float, against: float | None = None) -> Facts:
    facts: Facts = {"label": label, "decision": decision, "group_id": f"p{label}{weight}"}
    facts["places"] = {"lungs_weight": weight, "lungs_area": 0.25}
    return facts | {"places_against": None if against is None else {"lungs_weight": against, "lungs_area": 0.25}}


def test_the_weight_in_the_lungs_is_given_by_class_and_by_answer_as_share_and_lift() -> None:
    maps = [explained(1, 1, 0.9, 0.1), explained(1, 0, 0.5), explained(0, 0, 0.25, 0.3)]
    found = weigh_lungs([*maps, {**maps[0], "places": {"window_weight": 1.0}}], 20, 1)
    assert found["pneumonia"]["positive"]["n"] == 2, "without lungs there is no share"
    assert found["pneumonia"]["positive"]["share"]["value"] == pytest.approx(0.7)
    assert found["pneumonia"]["positive"]["lift"]["value"] == pytest.approx(2.8)
    assert found["normal"]["positive"]["lift"]["value"] == 1.0
    assert found["wrong"]["positive"]["share"]["value"] == 0.5
    assert found["wrong"]["negative"]["n"] == 0 and "no explained image" in found["wrong"]["negative"]["reason"]
    assert found["all"]["negative"]["n"] == 3 and found["right"]["positive"]["n"] == 2
