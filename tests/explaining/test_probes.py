"""Probes: what is changed and what stays, and what a change is said to do to a network."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from audit_scene import SIDE_PX, draw_scene

from tasks.drawings.devices import KINDS
from tasks.drawings.transplant import grow_mask
from tasks.explaining.probes import (
    Answers,
    Change,
    blank,
    draw_on,
    mean_lift,
    measure_auc,
    measure_change,
    measure_gap,
    pick_rows,
    put_real,
    take_off,
    to_packed,
)
from tasks.explaining.subjects import Scene
from tasks.measures import to_logit
from tasks.pixels.window import window_place
from tasks.records import NORMAL, PNEUMONIA


@pytest.fixture(scope="module")
def scene() -> Scene:
    """Rows 0 to 2 normal without a device, 3 and 4 pneumonia with one, 5 pneumonia without."""
    return draw_scene(((NORMAL, False, 3), (PNEUMONIA, True, 2), (PNEUMONIA, False, 1)), seed=2)


def places(*rows: int) -> Any:
    return np.array(rows, np.intp)


# -- which images, and how they are changed ----------------------------------------------------------------------------


def test_packing_rounds_and_stays_in_range() -> None:
    grey = np.array([[-0.2, 0.0, 0.5, 1.0, 1.3]], np.float32)
    packed = to_packed(grey)
    assert packed.dtype == np.uint8
    assert packed.tolist() == [[0, 0, 128, 255, 255]]


def test_the_lung_window_has_its_shares_of_the_side() -> None:
    place = window_place(200)
    rows, columns = np.flatnonzero(place.any(1)), np.flatnonzero(place.any(0))
    assert (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1) == (20, 172, 24, 176)
    assert place.sum() == 152 * 152


@pytest.mark.parametrize("inside", [True, False])
def test_what_is_blanked_has_the_mean_of_what_is_left_which_stays(inside: bool, scene: Scene) -> None:
    before = scene.packed.copy()
    left = blank(scene.packed, inside)
    blanked = window_place(SIDE_PX) == inside
    assert left.dtype == np.uint8 and left.shape == scene.packed.shape
    assert np.array_equal(left[:, ~blanked], scene.packed[:, ~blanked])
    assert (left[:, blanked] == np.rint(scene.packed[:, ~blanked].mean(1))[:, None]).all()
    assert np.array_equal(scene.packed, before)


def known(devices: list[bool | None], labels: list[int]) -> pd.DataFrame:
    return pd.DataFrame({"has_device": pd.array(devices, dtype="boolean"), "label": pd.array(labels, dtype="Int8")})


def test_at_most_n_known_rows_of_each_class_are_picked_and_in_order() -> None:
    rows = known([False] * 6 + [True] * 3 + [None] * 3, [0, 0, 0, 0, 1, 1, 0, 1, 1, 0, 1, 0])
    clean = pick_rows(rows, False, 3, 1)
    assert set(clean) <= set(range(6)) and sorted(clean) == list(clean)
    assert rows["label"].iloc[clean].tolist().count(0) == 3 and {4, 5} <= set(clean)
    assert pick_rows(rows, True, 10, 1).tolist() == [6, 7, 8]


def test_the_same_seed_picks_the_same_rows_and_another_seed_others() -> None:
    rows = known([False] * 40, [0, 1] * 20)
    assert np.array_equal(pick_rows(rows, False, 5, 1), pick_rows(rows, False, 5, 1))
    assert not np.array_equal(pick_rows(rows, False, 5, 1), pick_rows(rows, False, 5, 2))


def test_where_nobody_screened_no_row_is_picked() -> None:
    rows = known([None, None], [0, 1])
    assert not len(pick_rows(rows, False, 5, 1)) and not len(pick_rows(rows, True, 5, 1))


def test_each_kind_and_kinds_together_are_drawn_on_each_image(scene: Scene) -> None:
    at, before = places(0, 2, 5), scene.packed.copy()
    changes = draw_on(scene.packed, at, 4)
    assert set(changes) == {*KINDS, "drawn", "conspicuous"}
    for change in changes.values():
        assert np.array_equal(change.at, at) and change.control is None
        assert change.changed.dtype == np.uint8 and change.changed.shape == (3, SIDE_PX, SIDE_PX)
        brighter = (change.changed.astype(int) - scene.packed[at] > 5).mean((1, 2))
        assert (brighter > 0).all() and (brighter < 0.4).all()
    assert np.array_equal(scene.packed, before)


def test_drawing_follows_from_seed_and_image_alone(scene: Scene) -> None:
    first, again, other = (draw_on(scene.packed, places(0, 2), seed) for seed in (4, 4, 5))
    alone = draw_on(scene.packed, places(2), 4)
    for kind in first:
        assert np.array_equal(first[kind].changed, again[kind].changed)
        assert not np.array_equal(first[kind].changed, other[kind].changed)
        assert np.array_equal(first[kind].changed[1], alone[kind].changed[0])


def test_a_real_device_lands_on_its_place_and_the_control_puts_next_to_nothing_there(scene: Scene) -> None:
    at = places(0, 1)
    change = put_real(scene.packed, at, places(3), scene.masks, 1)
    control = control_of(change)
    assert change.changed.shape == control.shape == (2, SIDE_PX, SIDE_PX)
    assert change.changed.dtype == control.dtype == np.uint8
    place = grow_mask(scene.masks[3])
    for copies in (change.changed, control):
        assert np.array_equal(copies[:, ~place], scene.packed[at][:, ~place])
    device = scene.masks[3] > 0
    added, by_control = ((copies.astype(float) - scene.packed[at])[:, device] for copies in (change.changed, control))
    assert added.mean() > 3
    assert np.abs(by_control).mean() < 0.3 * added.mean()


def test_donors_are_drawn_by_seed(scene: Scene) -> None:
    clean, shown = places(0, 1, 2, 5), places(3, 4)
    first, again, *others = (put_real(scene.packed, clean, shown, scene.masks, seed) for seed in (1, 1, 2, 3))
    assert np.array_equal(first.changed, again.changed) and np.array_equal(control_of(first), control_of(again))
    assert any(not np.array_equal(first.changed, other.changed) for other in others)


def test_a_device_is_filled_on_its_place_and_the_control_fills_that_of_another_image(scene: Scene) -> None:
    change = take_off(scene.packed, places(3, 4), scene.masks, 1)
    control = control_of(change)
    for turn, (row, other) in enumerate(((3, 4), (4, 3))):
        own, others = grow_mask(scene.masks[row]), grow_mask(scene.masks[other])
        before = scene.packed[row]
        assert np.array_equal(change.changed[turn][~own], before[~own])
        assert change.changed[turn][own].mean() < before[own].mean()
        elsewhere = ~(others & ~own)
        assert np.array_equal(control[turn][elsewhere], before[elsewhere])
        assert not np.array_equal(control[turn], before)


def test_without_another_device_the_control_of_a_removal_is_the_image_itself(scene: Scene) -> None:
    change = take_off(scene.packed, places(3), scene.masks, 1)
    assert np.array_equal(control_of(change)[0], scene.packed[3])
    assert not np.array_equal(change.changed[0], scene.packed[3])


def control_of(change: Change) -> np.ndarray:
    assert change.control is not None
    return change.control


# -- what a network says of it -----------------------------------------------------------------------------------------


def rows_of(*labels: int, patients: list[str] | None = None) -> pd.DataFrame:
    table = pd.DataFrame({"label": pd.array(labels, dtype="Int8")})
    return table.assign(group_id=patients or [f"p{i}" for i in range(len(labels))])


def chances(*logits: float) -> Any:
    return 1 / (1 + np.exp(-np.array(logits, float)))


def changed(rows: pd.DataFrame, before: Any, after: Any, control: Any = None, gap: float | None = 4.0) -> Any:
    return measure_change(rows, Answers(before, after, control, 0.5, gap), 50, 1)


def test_a_change_is_told_in_logits_in_gaps_and_in_flips_for_each_class() -> None:
    rows = rows_of(0, 0, 0, 0, 1, 1)
    before = chances(-2, -1, -1, 3, 2, 2)
    after = chances(-1, 1, -1, 4, 1, -2)
    found = changed(rows, before, after)
    normal, pneumonia = found["normal"], found["pneumonia"]
    assert (normal["n"], pneumonia["n"]) == (4, 2)
    assert normal["logit"]["value"] == pytest.approx((1 + 2 + 0 + 1) / 4)
    assert normal["shift"]["value"] == pytest.approx(1 / 4)
    assert normal["flips"]["value"] == pytest.approx(1 / 3, abs=1e-4), "of three that were right"
    assert pneumonia["logit"]["value"] == pytest.approx(-2.5)
    assert pneumonia["shift"]["value"] == pytest.approx(-0.625)
    assert pneumonia["flips"]["value"] == 0.5
    assert "net_shift" not in normal and "net_flips" not in normal


def test_net_figures_are_what_is_left_of_a_change_without_its_control() -> None:
    rows = rows_of(0, 0, 0, 0)
    before, after = chances(-1, -1, -1, -1), chances(1, 1, 1, -1)
    found = changed(rows, before, after, chances(0.6, -0.6, -1, -1))["normal"]
    assert found["shift"]["value"] == pytest.approx(1.5 / 4)
    assert found["net_shift"]["value"] == pytest.approx((1.5 - 0.5) / 4)
    assert found["flips"]["value"] == 0.75
    assert found["net_flips"]["value"] == 0.5


def test_nobody_flips_back_and_the_threshold_itself_counts_as_pneumonia() -> None:
    rows = rows_of(0, 0, 1)
    before, after = np.array([0.3, 0.9, 0.5]), np.array([0.5, 0.1, 0.5])
    found = changed(rows, before, after)
    assert found["normal"]["flips"]["value"] == 1.0, "the one that was right is called pneumonia at the threshold"
    assert found["pneumonia"]["flips"]["value"] == 0.0


def test_intervals_hold_the_figure_and_close_where_all_move_alike_or_are_of_one_patient() -> None:
    before = chances(*([-1.0] * 12))
    moved = chances(*np.linspace(-1, 1, 12))
    wide = changed(rows_of(*[0] * 12), before, moved)["normal"]["shift"]
    assert wide["low"] < wide["value"] < wide["high"]
    alike = changed(rows_of(*[0] * 12), before, chances(*([0.5] * 12)))["normal"]["shift"]
    assert alike["low"] == alike["value"] == alike["high"] == 0.375
    one = changed(rows_of(*[0] * 12, patients=["p"] * 12), before, moved)["normal"]["shift"]
    assert one["low"] == one["value"] == one["high"] == wide["value"]


def test_what_cannot_be_told_says_why() -> None:
    rows, before = rows_of(0, 0), chances(1, 2)
    found = changed(rows, before, chances(0, 0), chances(1, 2), gap=None)
    assert found["pneumonia"] == {"n": 0, "reason": "no pneumonia image is among the changed ones"}
    normal = found["normal"]
    assert normal["logit"]["value"] == -1.5
    for key in ("flips", "net_flips"):
        assert normal[key]["value"] is None and "right side of the threshold" in normal[key]["reason"]
    for key in ("shift", "net_shift"):
        assert normal[key]["value"] is None and "does not tell the classes apart" in normal[key]["reason"]


def test_probabilities_of_0_and_1_move_by_a_finite_step() -> None:
    found = changed(rows_of(0, 1), np.array([0.0, 1.0]), np.array([1.0, 0.0]))
    step = 2 * float(to_logit(np.array([1.0]))[0])
    assert found["normal"]["logit"]["value"] == pytest.approx(step, abs=1e-3)
    assert found["pneumonia"]["logit"]["value"] == pytest.approx(-step, abs=1e-3)


def test_the_gap_lies_between_the_mean_logits_of_the_classes() -> None:
    rows = known([False, False, False, True, None], [0, 0, 1, 1, 1])
    assert measure_gap(rows, chances(-2, -1, 1, 3, 2)) == pytest.approx(3.5)


@pytest.mark.parametrize(
    ("labels", "logits"),
    [
        ([0, 0, 0], [1, 2, 3]),
        ([1, 1, 1], [1, 2, 3]),
        ([0, 1, 1], [0.3, 0.3, 0.3]),
        ([0, 1, 1], [3, 1, 1]),
    ],
)
def test_there_is_no_gap_with_one_class_or_where_nothing_is_told_apart(labels: list[int], logits: list[float]) -> None:
    assert measure_gap(known([False] * 3, labels), chances(*logits)) is None


def test_auc_follows_the_weights() -> None:
    rows, probability = rows_of(0, 0, 1, 1), np.array([0.1, 0.6, 0.5, 0.9])
    weights = np.array([[1, 1, 1, 1], [1, 0, 1, 1], [0, 1, 1, 0], [0, 0, 1, 1]], float)
    found = measure_auc(rows, probability, weights)
    assert found[:3].tolist() == [0.75, 1.0, 0.0]
    assert not np.isfinite(found[3])


def test_a_lift_is_the_share_of_weight_over_the_share_of_area() -> None:
    patients = pd.Series(["a", "b", "c"])
    found = mean_lift([0.3, 0.1, 0.2], [0.1, 0.1, 0.1], patients, 50, 1)
    assert found["value"] == pytest.approx(2.0)
    assert 1.0 <= found["low"] <= found["value"] <= found["high"] <= 3.0
    nowhere = mean_lift([0.0, 0.0], [0.0, 0.0], patients[:2], 50, 1)
    assert nowhere["value"] is None and nowhere["reason"] == "the place has no area"
