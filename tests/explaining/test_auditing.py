"""The audit tells networks that read lungs from those that read devices or corners, and says what it cannot tell."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from audit_scene import (
    Ask,
    draw_scene,
    read_both,
    read_corner,
    read_device,
    read_lung,
    say_half,
    settings,
    suspect,
    usual_scene,
)
from sklearn.metrics import roc_auc_score
from small_run import write_run

from tasks.errors import AuditError
from tasks.explaining.auditing import (
    NO_CLEAN,
    NO_DEVICE,
    PARTS,
    audit_networks,
    change_devices,
    compare_baselines,
    gather_scene,
    measure_groups,
    require_passed,
    say_verdict,
    verdict_rows,
    weigh_attribution,
)
from tasks.explaining.baselines import Baseline, ask_baselines, ask_shape
from tasks.explaining.probes import Change
from tasks.explaining.subjects import Scene, Subject
from tasks.explaining.verdict import RULES
from tasks.files import write_json
from tasks.pixels.packed import PackedImages
from tasks.records import NORMAL, PNEUMONIA, Facts
from tasks.runs.run import Run
from tasks.settings import Settings


@pytest.fixture(scope="module")
def scene() -> Scene:
    return usual_scene()


@pytest.fixture(scope="module")
def lessons() -> Scene:
    """Training images, from which the baselines learn: other haze than the audited ones, the same children."""
    return draw_scene(((NORMAL, False, 14), (PNEUMONIA, False, 14)), seed=5)


def audited(scene: Scene, lessons: Scene, networks: Mapping[str, Ask], **auditing: object) -> Facts:
    suspects = [suspect(name, ask, scene) for name, ask in networks.items()]
    baselines = ask_baselines(lessons.rows, lessons.packed, scene.rows, scene.packed)
    shape = ask_shape(lessons.rows, lessons.lungs, scene.lungs)
    found = audit_networks(scene, suspects, (baselines, shape), [], settings(**auditing))
    check_whole(found, networks)
    return found


def check_whole(found: Facts, networks: Mapping[str, Ask]) -> None:
    """Every part speaks of every network, JSON takes it, and what has no value has a reason."""
    json.dumps(found, allow_nan=False)
    for part in (*PARTS, "verdict"):
        assert list(found[part]) == list(networks) and all(found[part].values())
    for facts in dictionaries(found):
        if "value" in facts and facts["value"] is None:
            assert facts.get("reason"), facts
        if facts.get("outcome") == "not judged":
            assert facts["reason"], facts


def dictionaries(value: Any) -> Iterator[Facts]:
    if isinstance(value, dict):
        yield value
        for inner in value.values():
            yield from dictionaries(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from dictionaries(inner)


# -- networks whose habits are known -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(scene: Scene, lessons: Scene) -> Facts:
    networks = {"model": read_lung, "device": read_device, "both": read_both, "half": say_half}
    return audited(scene, lessons, networks)


def rules_of(found: Facts, network: str, *parts: str) -> list[Facts]:
    return [rule for rule in found["verdict"][network]["rules"] if rule["part"] in parts]


def test_a_network_that_reads_the_lung_passes(found: Facts) -> None:
    assert found["verdict"]["model"]["passed"] is True
    assert {rule["outcome"] for rule in rules_of(found, "model", "insertion", "removal")} == {"holds"}
    assert found["blanked"]["model"]["inside"]["value"] > 0.9
    assert found["blanked"]["model"]["outside"]["value"] < 0.7


def test_a_network_that_reads_devices_is_caught_by_putting_them_on_and_taking_them_off(found: Facts) -> None:
    verdict = found["verdict"]["device"]
    assert verdict["passed"] is False
    assert {"insertion", "removal"} <= set(verdict["failed"])
    group = found["insertion"]["device"]
    assert group["drawn"]["normal"]["flips"]["value"] > 0.5
    assert group["real"]["normal"]["net_flips"]["value"] > 0.5
    assert (
        found["groups"]["device"]["against"]["auc"]["value"] < 0.4 < found["groups"]["device"]["along"]["auc"]["value"]
    )


def test_a_network_that_reads_lung_and_device_is_caught_though_its_auc_is_high(found: Facts) -> None:
    assert found["baselines"]["both"]["auc"]["value"] > 0.9
    assert {"insertion", "removal"} <= set(found["verdict"]["both"]["failed"])
    assert all(rule["outcome"] == "fails" for rule in rules_of(found, "both", "insertion") if "shift" in rule["says"])


def test_a_network_that_always_says_the_same_does_not_pass_and_its_sections_say_why(found: Facts) -> None:
    assert found["verdict"]["half"]["passed"] is not True
    assert found["insertion"]["half"]["gap"] is None
    shift = found["insertion"]["half"]["drawn"]["normal"]["shift"]
    assert shift["value"] is None and "does not tell the classes apart" in shift["reason"]
    assert found["baselines"]["half"]["auc"]["value"] == 0.5


@pytest.mark.parametrize("ask", [say_half, read_corner])
def test_a_network_that_tells_nothing_apart_does_not_pass_where_no_baseline_does_either(ask: Ask) -> None:
    even = draw_scene(((NORMAL, False, 6), (NORMAL, True, 6), (PNEUMONIA, False, 6), (PNEUMONIA, True, 6)))
    device = Baseline("device", np.ones(24, bool), even.rows["has_device"].to_numpy(float))
    baselines = {"device": device}, Baseline("shape", np.zeros(24, bool), None, "nobody learnt it")
    found = audit_networks(even, [suspect("model", ask, even)], baselines, [], settings())
    assert found["baselines"]["model"]["auc"]["value"] < 0.7
    assert found["verdict"]["model"]["passed"] is not True


def test_each_network_is_asked_about_the_same_changed_images(scene: Scene, lessons: Scene) -> None:
    asked: list[np.ndarray] = []

    def listen(packed: np.ndarray) -> np.ndarray:
        asked.append(packed)
        return say_half(packed)

    audited(scene, lessons, {"model": listen}, n_images=2)
    first, asked[:] = list(asked), []
    audited(scene, lessons, {"model": listen}, n_images=2)
    assert len(first) == len(asked) > 5
    assert all(np.array_equal(one, other) for one, other in zip(first, asked, strict=True))


def test_a_network_that_reads_a_corner_with_the_class_in_it_fails(scene: Scene, lessons: Scene) -> None:
    audited_on, learnt_from = (replace(one, packed=one.packed.copy()) for one in (scene, lessons))
    for one in (audited_on, learnt_from):
        one.packed[:, :10, :10] = np.where(one.rows["label"].to_numpy(int) == 1, 150, 60)[:, None, None]
    verdict = audited(audited_on, learnt_from, {"model": read_corner})["verdict"]["model"]
    assert verdict["passed"] is False
    assert {"baselines", "blanked"} <= set(verdict["failed"])


def test_a_network_that_reads_a_corner_with_nothing_in_it_does_not_pass(scene: Scene, lessons: Scene) -> None:
    found = audited(scene, lessons, {"model": read_corner})
    assert 0.3 < found["baselines"]["model"]["auc"]["value"] < 0.7
    assert found["verdict"]["model"]["passed"] is not True


# -- what cannot be told -----------------------------------------------------------------------------------------------


def test_without_a_device_in_the_split_drawn_ones_are_judged_and_the_rest_says_why(
    scene: Scene, lessons: Scene
) -> None:
    free = draw_scene(((NORMAL, False, 6), (PNEUMONIA, False, 6)))
    found = audited(free, lessons, {"model": read_lung})
    assert found["removal"]["model"] == {"reason": NO_DEVICE}
    assert found["insertion"]["model"]["drawn"]["normal"]["shift"]["value"] is not None
    assert "alike" in found["baselines"]["model"]["each"]["device"]["gain"]["reason"]
    assert found["groups"]["model"]["loss"]["value"] is None
    assert found["verdict"]["model"]["passed"] is True
    reasons = {rule["reason"] for rule in rules_of(found, "model", "insertion") if "real" in rule["says"]}
    assert reasons == {NO_DEVICE}


def test_where_nobody_screened_there_is_no_verdict_on_devices(lessons: Scene) -> None:
    unknown = draw_scene(((NORMAL, False, 6), (PNEUMONIA, False, 6)))
    unknown.rows["has_device"] = pd.array([None] * 12, dtype="boolean")
    found = audited(unknown, lessons, {"model": read_lung})
    assert found["insertion"]["model"] == {"reason": NO_CLEAN}
    assert found["removal"]["model"] == {"reason": NO_DEVICE}
    assert found["groups"]["model"] == {"n": 0, "reason": "no image was screened"}
    assert found["baselines"]["model"]["each"]["device"]["auc"]["reason"] == "no image was screened"
    failed = found["verdict"]["model"]["failed"]
    assert found["verdict"]["model"]["passed"] is (False if failed else None)
    assert not {"insertion", "removal", "groups"} & set(failed)


@pytest.mark.parametrize("label", [NORMAL, PNEUMONIA])
def test_one_class_only_is_audited_as_far_as_it_goes(label: int, lessons: Scene) -> None:
    one = draw_scene(((label, False, 5), (label, True, 5)))
    found = audited(one, lessons, {"model": read_lung})
    assert found["baselines"]["model"]["auc"]["reason"] == "a class is missing"
    assert found["blanked"]["model"]["outside"]["reason"] == "a class is missing"
    other, name = ("pneumonia", "normal") if label == NORMAL else ("normal", "pneumonia")
    for group in (found["insertion"]["model"]["drawn"], found["removal"]["model"]["filled"]):
        assert group[other]["n"] == 0 and other in group[other]["reason"]
        assert group[name]["n"] > 0 and group[name]["logit"]["value"] is not None


@pytest.mark.parametrize("level", [0, 100, 255])
def test_constant_images_are_audited_without_a_crash(level: int, scene: Scene, lessons: Scene) -> None:
    at = [0, 1, 2, 14, 15, 18, 19, 20, 24, 25, 26]
    rows = scene.rows.iloc[at].reset_index(drop=True)
    flat = Scene(rows, np.full_like(scene.packed[at], level), scene.masks[at], scene.lungs[at])
    found = audited(flat, lessons, {"model": read_lung, "device": read_device}, min_images=2)
    assert found["insertion"]["model"]["gap"] is None
    for part, variant in (("insertion", "real"), ("removal", "filled")):
        assert found[part]["device"][variant]["normal"]["logit"]["value"] == 0, "nothing is lifted, nothing is filled"


def test_a_single_image_is_audited_without_a_crash(scene: Scene, lessons: Scene) -> None:
    for at in ([0], [15]):
        one = Scene(scene.rows.iloc[at].reset_index(drop=True), scene.packed[at], scene.masks[at], scene.lungs[at])
        assert audited(one, lessons, {"model": read_lung})["verdict"]["model"]["passed"] is None


# -- the parts, by hand ------------------------------------------------------------------------------------------------


def changes_of(scene: Scene, **auditing: object) -> tuple[dict[str, Change], dict[str, Change]]:
    put_on, taken_off = change_devices(scene, settings(**auditing).auditing, 3)
    assert isinstance(put_on, dict) and isinstance(taken_off, dict)
    return put_on, taken_off


def test_devices_go_on_images_without_and_come_off_images_with_one(scene: Scene) -> None:
    put_on, taken_off = changes_of(scene, n_images=3)
    for change in put_on.values():
        rows = scene.rows.iloc[change.at]
        assert not rows["has_device"].any()
        assert sorted(rows["label"]) == [0] * 3 + [1] * 3
    rows = scene.rows.iloc[taken_off["filled"].at]
    assert rows["has_device"].all()
    assert sorted(rows["label"]) == [0] * 3 + [1] * 3


def test_a_device_that_the_mask_does_not_show_is_neither_lent_nor_taken_off(scene: Scene) -> None:
    masks = scene.masks.copy()
    seen = np.flatnonzero(scene.rows["has_device"].to_numpy(bool))
    masks[seen[1:]] = 0
    put_on, taken_off = changes_of(replace(scene, masks=masks), n_images=2)
    assert taken_off["filled"].at.tolist() == [seen[0]]
    elsewhere = masks[seen[0]] == 0
    assert "real" in put_on
    for turn, row in enumerate(put_on["real"].at):
        differs = put_on["real"].changed[turn] != scene.packed[row]
        assert not (differs & elsewhere & ~grown(masks[seen[0]])).any()


def grown(mask: np.ndarray) -> np.ndarray:
    from tasks.drawings.transplant import grow_mask

    return grow_mask(mask)


def hand_scene(devices: list[bool | None], labels: list[int]) -> Scene:
    rows = pd.DataFrame({"label": pd.array(labels, dtype="Int8"), "has_device": pd.array(devices, dtype="boolean")})
    rows["group_id"] = [f"p{i}" for i in range(len(rows))]
    nothing = np.zeros((len(rows), 28, 28), np.uint8)
    return Scene(rows, nothing, nothing, nothing)


def hand_suspect(*probability: float) -> Subject:
    return Subject("model", say_half, 0.5, np.array(probability))


def test_the_gain_over_a_baseline_is_measured_on_the_images_it_can_answer() -> None:
    scene = hand_scene([False, True, None, True, True, False], [0, 0, 0, 1, 1, 1])
    known = scene.rows["has_device"].notna().to_numpy(bool)
    device = Baseline("device", known, np.array([0, 1, 1, 1, 0], float))
    nothing = Baseline("ring", np.ones(6, bool), None, "training has one class only")
    network = hand_suspect(0.1, 0.6, 0.9, 0.8, 0.7, 0.5)
    found = compare_baselines(scene, network, {"device": device, "ring": nothing}, 100, 1)
    expected = roc_auc_score([0, 0, 1, 1, 1], device.answer)
    assert found["n"] == 6 and found["auc"]["value"] == pytest.approx(5 / 9, abs=1e-4)
    each = found["each"]["device"]
    assert each["n"] == 5
    assert each["auc"]["value"] == pytest.approx(expected, abs=1e-4)
    assert each["gain"]["value"] == pytest.approx(5 / 6 - expected, abs=1e-4)
    assert each["gain"]["low"] <= each["gain"]["value"] <= each["gain"]["high"]
    assert found["each"]["ring"]["gain"] == found["each"]["ring"]["auc"]
    assert found["each"]["ring"]["gain"]["reason"] == "training has one class only"


def test_groups_tell_where_the_device_points_the_wrong_way_from_where_it_helps() -> None:
    #          normal: free, free, device; pneumonia: device, device, free; and two that nobody screened
    devices = [False, False, True, True, True, False, None, None]
    scene = hand_scene(devices, [0, 0, 0, 1, 1, 1, 0, 1])
    probability = (0.1, 0.2, 0.7, 0.9, 0.8, 0.4, 0.99, 0.01)
    found = measure_groups(scene, hand_suspect(*probability), 50, 1)
    assert (found["against"]["n_normal"], found["against"]["n_pneumonia"]) == (1, 1)
    assert (found["along"]["n_normal"], found["along"]["n_pneumonia"]) == (2, 2)
    assert found["against"]["auc"]["value"] == 0.0 and found["along"]["auc"]["value"] == 1.0
    assert found["n"] == 1
    assert found["loss"]["value"] == pytest.approx(8 / 9, abs=1e-4)
    assert (found["with_device"]["n"], found["device_free"]["n"]) == (3, 3)
    assert found["with_device"]["sensitivity"]["value"] == 1.0 and found["with_device"]["specificity"]["value"] == 0.0
    assert found["device_free"]["sensitivity"]["value"] == 0.0 and found["device_free"]["specificity"]["value"] == 1.0


def test_a_group_that_is_empty_says_so() -> None:
    found = measure_groups(hand_scene([False, False], [0, 1]), hand_suspect(0.1, 0.9), 20, 1)
    assert found["with_device"] == {"n": 0, "reason": "no image is in this group"}
    assert found["against"]["n_normal"] == 0 and found["n"] == 0
    assert found["loss"]["value"] is None and "a class is missing" in found["loss"]["reason"]


def explained(mask: str | None, on: float, area: float, inside: float, patient: str) -> Facts:
    places = {"window_weight": inside, "window_area": 0.5}
    if mask:
        places |= {"device_weight": on, "device_area": area}
    facts = {"image_id": patient, "group_id": patient, "mask": mask, "label": 1, "decision": 1}
    return facts | {"places": places, "places_against": None}


MAPS = [
    explained("own", 0.3, 0.1, 0.9, "a"),
    explained("own", 0.2, 0.15, 0.7, "b"),
    explained("other", 0.1, 0.1, 0.8, "c"),
    explained(None, 0.0, 0.0, 0.6, "d"),
    {**explained("own", 0.0, 0.0, 0.0, "e"), "places": None},
]


def test_lifts_are_weight_over_area_on_devices_on_the_same_places_without_and_in_the_window() -> None:
    found = weigh_attribution(MAPS, "model", 50, 1)
    assert (found["n_explained"], found["n_device"], found["n_control"], found["n_window"], found["n"]) == (
        4,
        2,
        1,
        4,
        1,
    )
    assert found["device_lift"]["value"] == pytest.approx(0.5 / 0.25)
    assert found["control_lift"]["value"] == pytest.approx(1.0)
    assert found["window_lift"]["value"] == pytest.approx((0.9 + 0.7 + 0.8 + 0.6) / 2)
    excess = found["excess_lift"]
    assert excess["value"] == pytest.approx(1.0)
    assert excess["low"] == pytest.approx(1 - (2 - 0.2 / 0.15), abs=1e-3) and excess["high"] == pytest.approx(
        2.0, abs=1e-3
    )


def test_the_twin_s_maps_are_its_own() -> None:
    twin = {"places": {"window_weight": 0.5, "window_area": 0.5, "device_weight": 0.6, "device_area": 0.1}}
    maps = [{**item, "unfiltered": twin} for item in MAPS[:3]]
    found = weigh_attribution(maps, "unfiltered", 50, 1)
    assert found["device_lift"]["value"] == found["control_lift"]["value"] == pytest.approx(6.0)
    assert weigh_attribution(maps, "model", 50, 1)["device_lift"]["value"] == pytest.approx(2.0)


def test_the_interval_of_an_excess_adds_the_variances_of_its_two_lifts() -> None:
    on = [explained("own", weight, 0.1, 0.5, f"a{i}") for i, weight in enumerate((0.1, 0.1, 0.1, 0.6))]
    off = [explained("other", weight, 0.1, 0.5, f"b{i}") for i, weight in enumerate((0.0, 0.0, 0.0, 0.4))]
    found = weigh_attribution([*on, *off], "model", 200, 1)
    device, control, excess = found["device_lift"], found["control_lift"], found["excess_lift"]
    assert excess["value"] == pytest.approx(2.25 - 1.0)
    below = np.hypot(device["value"] - device["low"], control["high"] - control["value"])
    above = np.hypot(device["high"] - device["value"], control["value"] - control["low"])
    assert control["high"] - control["value"] > control["value"] - control["low"] + 0.5
    assert excess["low"] == pytest.approx(excess["value"] - below, abs=1e-3)
    assert excess["high"] == pytest.approx(excess["value"] + above, abs=1e-3)


@pytest.mark.parametrize(
    ("maps", "reason"),
    [
        (MAPS[2:4], "no explained image shows a device"),
        (MAPS[:2], "no explained image shows no device"),
        ([explained("own", 0.0, 0.0, 0.5, "a"), MAPS[2]], "the place has no area"),
    ],
)
def test_without_one_side_there_is_no_excess_and_the_other_figures_stay(maps: list[Facts], reason: str) -> None:
    found = weigh_attribution(maps, "model", 20, 1)
    assert found["excess_lift"]["value"] is None and found["excess_lift"]["reason"] == reason
    assert found["window_lift"]["value"] is not None
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("maps", [[], MAPS[4:]])
def test_without_a_map_attribution_says_so(maps: list[Facts]) -> None:
    assert weigh_attribution(maps, "model", 20, 1) == {
        "n": 0,
        "reason": "no explained image has a map with positive weight",
    }


# -- the run -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("splits", "main"), [({"train": "val", "test": "test"}, "test"), ({"train": "val"}, "val")])
def test_test_images_are_audited_and_those_of_validation_where_test_is_left_unread(
    splits: dict[str, str], main: str, tmp_path: Path
) -> None:
    manifest = write_run(tmp_path / "run", [0.0, 0.2, 0.9, 1.0, 0.4], tmp_path / "cache")
    manifest = manifest.assign(split=manifest["split"].replace("train", "val"))
    evaluated = manifest[manifest["split"].isin(splits.values())].sort_values("path")
    evaluated[["path", "split"]].assign(probability=0.5).to_csv(tmp_path / "run" / "predictions.csv", index=False)
    images = PackedImages(tmp_path / "run", tmp_path / "cache")
    storage = {"cache": str(tmp_path / "cache")}
    settings = Settings.model_validate({"run_dir": str(tmp_path / "run"), "storage": storage})
    scene = gather_scene(Run(settings), manifest, images)
    expected = manifest[manifest["split"] == main]
    assert list(scene.rows["path"]) == list(expected["path"]) and len(scene.rows)
    assert np.array_equal(scene.packed, images.read(list(expected["image_id"])))
    brightest = np.rint(255 * expected["device_score"].to_numpy(float))
    assert scene.masks.max((1, 2)).tolist() == brightest.tolist()


def run_with(folder: Path, failed: list[str], fail_on: list[str]) -> Settings:
    verdict = {"model": {"passed": not failed, "failed": failed}, "unfiltered": {"passed": False, "failed": ["groups"]}}
    write_json(folder / "audit.json", {"verdict": verdict, "split": "test", "n_images": 4})
    return Settings.model_validate({"run_dir": str(folder), "auditing": {"fail_on": fail_on}})


@pytest.mark.parametrize(
    ("failed", "fail_on"),
    [([], ["insertion"]), (["insertion"], []), (["insertion", "blanked"], ["removal", "groups"])],
)
def test_a_run_goes_on_where_no_failed_part_is_named(failed: list[str], fail_on: list[str], tmp_path: Path) -> None:
    require_passed.fn(Run(run_with(tmp_path, failed, fail_on)))


def test_a_run_ends_where_the_model_failed_a_named_part(tmp_path: Path) -> None:
    how = run_with(tmp_path, ["insertion", "blanked", "removal"], ["removal", "insertion", "groups"])
    with pytest.raises(AuditError, match=r"auditing\.fail_on: the model failed insertion and removal;.*index\.html"):
        require_passed.fn(Run(how))


def test_the_log_says_what_failed_and_by_which_figure(found: Facts) -> None:
    passed = say_verdict("model", found["verdict"]["model"])
    assert passed.startswith(f"audit of the model: passed; 0 of {len(RULES)} rules unclear, ")
    failed = say_verdict("unfiltered", found["verdict"]["device"])
    assert (
        failed.startswith("audit of its unscreened twin: failed ")
        and "insertion (" in failed
        and "bound 0.05" in failed
    )
    nothing: Facts = {"passed": None, "failed": [], "rules": [], "reason": "too few images"}
    assert say_verdict("model", nothing) == "audit of the model: no verdict, too few images"


def test_each_rule_of_each_network_has_a_row_for_people(found: Facts) -> None:
    rows = verdict_rows(found["verdict"])
    assert len(rows) == sum(len(verdict["rules"]) for verdict in found["verdict"].values())
    assert {row["network"] for row in rows} == set(found["verdict"])
    assert {row["outcome"] for row in rows} <= {"holds", "fails", "unclear", "not judged"}
