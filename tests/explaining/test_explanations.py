"""LIME: the library's numbers by faster means, a fair choice of images, and what is said of each of them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from lime.lime_image import LimeImageExplainer
from numpy.typing import NDArray
from PIL import Image
from small_run import write_run

from tasks.errors import RunError
from tasks.explaining.explanations import (
    Film,
    choose_images,
    explain_pieces,
    explain_row,
    explain_shards,
    gather_explanations,
    list_shards,
    plan_explanations,
    plan_images,
    say_explanations,
    share_weight,
    sum_up,
)
from tasks.explaining.lime_sampling import CutImage, cut_image, weigh_pieces
from tasks.explaining.subjects import Network
from tasks.files import write_json
from tasks.records import Facts
from tasks.runs.run import Run
from tasks.settings import ExplanationSettings, Settings

HOW = Settings(explanation=ExplanationSettings(n_samples=200, n_segments=20, batch_size=64), seed=1)


def x_ray(side: int = 64) -> NDArray[np.float32]:
    rng = np.random.default_rng(0)
    ramp = np.linspace(0.2, 0.8, side)
    return np.clip(np.outer(ramp, ramp) + rng.normal(0, 0.05, (side, side)), 0, 1).astype(np.float32)


def lower_right(grey: NDArray[np.float32]) -> NDArray[np.float64]:
    """A network that answers by the texture of the lower right quarter."""
    side = grey.shape[1]
    texture = np.diff(grey[:, side // 2 :, side // 2 :].astype(np.float64)).std((1, 2))
    return np.asarray(1 / (1 + np.exp(2 - 40 * texture)))


def constant(level: float) -> Network:
    return lambda grey: np.full(len(grey), level)


def explain(cut: CutImage, network: Network, n_seeds: int = 1) -> Facts:
    return explain_pieces(cut, network, 0.5, HOW, n_seeds)


def finite(facts: Facts) -> bool:
    json.dumps(facts, allow_nan=False)  # a ValueError for NaN
    return True


# -- the weights -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_samples", "batch_size"), [(200, 64), (130, 256), (101, 10)])
def test_weights_and_fit_equal_those_of_the_stock_library_also_when_the_last_batch_is_short(
    n_samples: int, batch_size: int
) -> None:
    cut = cut_image(x_ray(), 20)
    ours = weigh_pieces(cut, lower_right, n_samples=n_samples, batch_size=batch_size, seed=3)

    def rgb_network(images: NDArray[Any]) -> NDArray[np.float64]:
        probability = lower_right(images[..., 0].astype(np.float32))
        return np.stack([1 - probability, probability], axis=1)

    stock = LimeImageExplainer(random_state=3).explain_instance(
        np.repeat(cut.grey[..., None], 3, axis=2).astype(np.float64),
        rgb_network,
        labels=(1,),
        top_labels=None,
        num_samples=n_samples,
        segmentation_fn=lambda _: cut.pieces,
        random_seed=3,
    )
    weights = dict(stock.local_exp[1])
    expected = np.array([weights[i] for i in range(len(weights))])
    assert np.abs(expected).max() > 0.01
    np.testing.assert_allclose(ours.weights, expected, atol=1e-5)
    found = (ours.r2, ours.intercept, ours.local_probability)
    np.testing.assert_allclose(found, (stock.score, stock.intercept[1], stock.local_pred[0]), atol=1e-4)


def test_hidden_pieces_have_their_mean_grey_and_shown_ones_their_pixels() -> None:
    cut = cut_image(x_ray(), 20)
    shown = np.random.default_rng(1).integers(0, 2, (9, cut.n_pieces)).astype(bool)
    shown[0], shown[1] = True, False
    means = np.array([cut.grey[cut.pieces == piece].mean() for piece in range(cut.n_pieces)])
    expected = np.where(shown[:, cut.pieces], cut.grey, means[cut.pieces])
    copies = cut.show(shown)
    assert copies.dtype == np.float32
    np.testing.assert_allclose(copies, expected, atol=1e-6)


def test_pieces_are_numbered_from_0_without_gaps_and_are_about_as_many_as_asked_for() -> None:
    cut = cut_image(x_ray(128), 64)
    assert np.unique(cut.pieces).tolist() == list(range(cut.n_pieces))
    assert 50 <= cut.n_pieces <= 80


def test_weight_lies_where_the_network_looks() -> None:
    cut = cut_image(x_ray(), 20)
    weights = np.array(explain(cut, lower_right)["weights"])
    touching = np.unique(cut.pieces[32:, 32:])
    assert len(touching) < 0.5 * len(weights)
    assert weights[touching].sum() > 0.8 * np.abs(weights).sum()


def test_several_seeds_are_compared_and_the_first_one_is_shown() -> None:
    cut = cut_image(x_ray(), 20)
    once, thrice = explain(cut, lower_right), explain(cut, lower_right, n_seeds=3)
    assert once["weights"] == thrice["weights"]
    assert once["stability"]["rank_correlation"] is None
    assert thrice["stability"]["n_seeds"] == 3 and 0.1 < thrice["stability"]["rank_correlation"] < 1


@pytest.mark.parametrize("level", [0.3, 0.123, 0.999])
def test_a_constant_network_has_no_weight_no_preference_and_no_nan(level: float) -> None:
    facts = explain(cut_image(x_ray(), 20), constant(level))
    assert finite(facts)
    assert set(np.abs(facts["weights"])) == {0.0}
    assert facts["faithfulness"]["deletion"] == facts["faithfulness"]["insertion"] == facts["faithfulness"]["random"]


@pytest.mark.parametrize("level", [0.3, 0.123, 0.999])
def test_of_a_constant_network_neither_stability_nor_fit_is_told(level: float) -> None:
    facts = explain(cut_image(x_ray(), 20), constant(level), n_seeds=3)
    assert facts["stability"] == {"n_seeds": 3, "rank_correlation": None, "top5_overlap": None, "stable": None}
    assert facts["r2"] is None


@pytest.mark.parametrize("level", [0.0, 0.5])
def test_a_constant_image_is_explained_by_nothing(level: float) -> None:
    facts = explain(cut_image(np.full((64, 64), level, np.float32), 20), lower_right, n_seeds=2)
    assert finite(facts)
    assert np.abs(facts["weights"]).max() < 1e-6


def test_an_image_that_is_a_single_piece_is_explained_without_nan() -> None:
    facts = explain(CutImage(x_ray(), np.zeros((64, 64), np.intp)), lower_right, n_seeds=2)
    assert finite(facts)
    assert len(facts["weights"]) == 1 and facts["weights"][0] > 0
    assert facts["stability"]["stable"] is None
    assert facts["faithfulness"]["hidden"] == [0.0, 1.0]


# -- where the weight lies ---------------------------------------------------------------------------------------------

QUARTERS = np.kron(np.array([[0, 1], [2, 3]]), np.ones((2, 2), int))
LEFT, TOP_ROW = np.zeros((4, 4), bool), np.zeros((4, 4), bool)
LEFT[:, :2], TOP_ROW[0] = True, True


def test_a_place_has_its_share_of_the_positive_weight_and_of_the_area() -> None:
    shares = share_weight(np.array([0.3, -0.5, 0.1, 0.0]), QUARTERS, {"left": LEFT, "top": TOP_ROW})
    assert shares == {"left_weight": 1.0, "left_area": 0.5, "top_weight": 0.375, "top_area": 0.25}


def test_without_positive_weight_no_share_of_it_is_named() -> None:
    assert share_weight(np.array([-0.1, 0.0, -0.2, 0.0]), QUARTERS, {"left": LEFT}) is None


# -- which images ------------------------------------------------------------------------------------------------------


def make_predictions(devices: list[bool | None], n_each: int, n_wrong: int) -> pd.DataFrame:
    """For each class and each of ``devices`` so many rows that are right, and so many that are wrong."""
    rows = [
        {"label": label, "decision": label if i < n_each else 1 - label, "has_device": device}
        for label in (0, 1)
        for device in devices
        for i in range(n_each + n_wrong)
    ]
    names = [f"{i:04d}" for i in range(len(rows))]
    table = pd.DataFrame(rows).assign(image_id=names, split="test", subtype="unknown", probability=0.5)
    return table.assign(has_device=table["has_device"].astype(object))


def test_images_are_chosen_evenly_over_right_and_wrong_of_each_class() -> None:
    chosen = choose_images(make_predictions([None], n_each=16, n_wrong=4), 12, seed=1)
    assert chosen.groupby(["label", "right"]).size().tolist() == [3, 3, 3, 3]
    assert chosen["has_device"].isna().all()


def test_images_are_chosen_evenly_over_those_with_a_device_and_those_without() -> None:
    chosen = choose_images(make_predictions([True, False], n_each=30, n_wrong=4), 16, seed=1)
    assert chosen.groupby(["label", "right", "has_device"]).size().tolist() == [2] * 8


def test_where_a_group_is_scarce_the_others_fill_its_place() -> None:
    table = make_predictions([True, False], n_each=10, n_wrong=1)
    chosen = choose_images(table, 20, seed=1)
    assert chosen.groupby(["right"]).size().to_dict() == {False: 4, True: 16}
    assert len(choose_images(table, 1_000, seed=1)) == len(table)


def test_the_choice_follows_from_the_seed_alone() -> None:
    table = make_predictions([True, False, None], n_each=9, n_wrong=3)
    first, again, other = (choose_images(table, 12, seed)["image_id"].tolist() for seed in (1, 1, 2))
    assert first == again != other


def test_of_an_empty_table_nothing_is_chosen() -> None:
    assert len(choose_images(make_predictions([None], 1, 1).iloc[:0], 12, seed=1)) == 0


# -- a run -------------------------------------------------------------------------------------------------------------

DEVICES = [True, False, None, False, True]


def write_answers(folder: Path, devices: list[bool | None], **explanation: int) -> Settings:
    """A run folder of twice as many images, half of them in test, with these devices; returns fitting settings."""
    run = folder / "run"
    scores = [0.5 if score is None else 0.9 * score for score in devices for _ in (0, 1)]
    manifest = write_run(run, scores, folder / "cache")
    table = manifest[["path", "split", "label"]].assign(subtype="virus", probability=0.75)
    table["has_device"] = [device for device in devices for _ in (0, 1)]
    table.to_csv(run / "predictions.csv", index=False)
    write_json(run / "metrics.json", {"threshold": 0.5})
    flags = {"n_images": 50, "n_samples": 50, "n_segments": 8, "batch_size": 64, "n_repeated": 1, "n_seeds": 2}
    return Settings.model_validate(
        {
            "run_dir": str(run),
            "storage": {"cache": str(folder / "cache"), "raw": str(folder / "raw")},
            "explanation": flags | explanation,
        }
    )


def test_an_image_with_a_device_bears_its_own_mask_and_one_without_that_of_another(tmp_path: Path) -> None:
    plan = plan_images(Run(write_answers(tmp_path, DEVICES)))
    with_device = {row["image_id"] for row in plan if row["has_device"] is True}
    assert [row["has_device"] for row in plan].count(None) == 1 and len(plan) == 5 and len(with_device) == 2
    for row in plan:
        if row["has_device"] is None:
            assert row["mask_of"] is None
        elif row["has_device"]:
            assert row["mask_of"] == row["image_id"]
        else:
            assert row["mask_of"] in with_device


@pytest.mark.parametrize("known", [False, None])
def test_where_no_image_shows_a_device_no_mask_is_laid_on_any(known: bool | None, tmp_path: Path) -> None:
    plan = plan_images(Run(write_answers(tmp_path, [known] * 3)))
    assert [row["mask_of"] for row in plan] == [None] * 3


def test_only_the_first_images_are_explained_with_several_seeds(tmp_path: Path) -> None:
    plan = plan_images(Run(write_answers(tmp_path, DEVICES, n_repeated=2, n_seeds=3, n_images=4)))
    assert [row["n_seeds"] for row in plan] == [3, 3, 1, 1]


def test_test_images_are_explained_and_those_of_validation_only_where_there_is_no_other(tmp_path: Path) -> None:
    settings = write_answers(tmp_path, DEVICES)
    assert {row["split"] for row in plan_images(Run(settings))} == {"test"}
    path = tmp_path / "run" / "predictions.csv"
    table = pd.read_csv(path)
    table[table["split"] != "test"].assign(split="val").to_csv(path, index=False)
    assert {row["split"] for row in plan_images(Run(settings))} == {"val"}


def test_the_decision_follows_from_the_threshold_of_the_run(tmp_path: Path) -> None:
    settings = write_answers(tmp_path, DEVICES)
    assert {row["decision"] for row in plan_images(Run(settings))} == {1}
    write_json(tmp_path / "run" / "metrics.json", {"threshold": 0.8})
    assert {(row["decision"], row["right"]) for row in plan_images(Run(settings))} == {(0, False)}


def make_row(**changes: object) -> Facts:
    row = {"image_id": "a", "split": "test", "label": 1, "subtype": "virus", "has_device": True, "right": True}
    return row | {"probability": 0.1234, "decision": 1, "n_seeds": 1, "mask_of": "a"} | changes


@pytest.mark.parametrize(("mask_of", "said"), [("a", "own"), ("b", "other"), (None, None)])
def test_what_is_said_of_an_image_names_whose_mask_was_laid_on_it(mask_of: str | None, said: str | None) -> None:
    mask = None if mask_of is None else np.zeros((64, 64), np.uint8)
    if mask is not None:
        mask[40:50, 40:50] = 255
    film = Film(x_ray(), mask, None)
    facts, _ = explain_row(make_row(mask_of=mask_of), film, {"model": (lower_right, 0.5)}, HOW)
    assert facts["mask"] == said
    assert ("device_area" in facts["places"]) == (mask is not None)
    assert facts["places"]["window_area"] == pytest.approx(0.76**2, abs=0.02)
    assert facts["probability"] == 0.1234
    assert not {"mask_of", "n_seeds"} & set(facts)
    assert finite(facts)


def test_the_devices_of_another_image_are_not_outlined_on_this_one() -> None:
    mask = np.zeros((64, 64), np.uint8)
    mask[40:50, 40:50] = 255
    networks: dict[str, tuple[Network, float]] = {"model": (lower_right, 0.5)}
    own, other, bare = (
        np.asarray(explain_row(make_row(mask_of=of), Film(x_ray(), laid, None), networks, HOW)[1])
        for of, laid in (("a", mask), ("b", mask), (None, None))
    )
    assert (own != bare).any()
    np.testing.assert_array_equal(other, bare)


def test_weight_for_and_against_pneumonia_is_weighed_in_the_lungs() -> None:
    lungs = np.zeros((64, 64), bool)
    lungs[32:, 32:] = True
    networks: dict[str, tuple[Network, float]] = {
        "model": (lower_right, 0.5),
        "unfiltered": (lambda grey: 1 - lower_right(grey), 0.5),
    }
    facts, picture = explain_row(make_row(mask_of=None), Film(x_ray(), None, lungs), networks, HOW)
    model, twin = facts["places"], facts["unfiltered"]["places_against"]
    assert model["lungs_area"] == twin["lungs_area"] == 0.25
    assert model["lungs_weight"] == twin["lungs_weight"] > 0.6
    bare, without = explain_row(make_row(mask_of=None), Film(x_ray(), None, None), networks, HOW)
    assert "lungs_area" not in bare["places"]
    assert (np.asarray(picture) != np.asarray(without)).any(), "they are outlined"


def save_model(run: Path, name: str, seed: int) -> None:
    from tasks.networks.classifier import build_member, join_members
    from tasks.networks.files import save_network
    from tasks.settings import TrainingSettings

    save_network(join_members([build_member(TrainingSettings(side_px=32, width=4), seed)]), run, name)


def test_shards_explain_each_image_once_and_are_taken_from_the_cache_until_the_network_is_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, run = write_answers(tmp_path, DEVICES), tmp_path / "run"
    save_model(run, "model", 1)
    assert plan_explanations.fn(Run(settings)) == [0, 1]
    explain_shards.fn(Run(settings), [0])
    assert plan_explanations.fn(Run(settings)) == [1]
    explain_shards.fn(Run(settings), [1])
    assert capsys.readouterr().out == "explained images 1 to 4 of 5\nexplained images 5 to 5 of 5\n"
    facts = gather_explanations.fn(Run(settings))
    assert (facts["n_images"], facts["split"], facts["reused"]) == (5, "test", False)
    names = {row["image_id"] for row in plan_images(Run(settings))}
    assert {path.stem for path in (run / "explanations").glob("*.json")} == names
    assert {path.stem for path in (run / "explanations").glob("*.png")} == names
    assert plan_explanations.fn(Run(settings)) == []
    save_model(run, "model", 2)
    assert plan_explanations.fn(Run(settings)) == [0, 1]


def test_a_shard_that_lost_a_file_is_explained_again_and_one_that_is_nowhere_is_not_gathered(tmp_path: Path) -> None:
    settings, run = write_answers(tmp_path, DEVICES), tmp_path / "run"
    save_model(run, "model", 1)
    explain_shards.fn(Run(settings), [0, 1])
    lost = Run(settings).cache / list_shards(Run(settings))[1].name
    next(lost.glob("*.png")).unlink()
    assert plan_explanations.fn(Run(settings)) == [1]
    with pytest.raises(RunError, match=r"^scaling\.runner: 1 of the explained shards not found; "):
        gather_explanations.fn(Run(settings))
    explain_shards.fn(Run(settings), [1])
    assert gather_explanations.fn(Run(settings))["n_images"] == 5


def test_the_twin_is_explained_beside_the_model_by_the_same_pieces(tmp_path: Path) -> None:
    settings, run = write_answers(tmp_path, [True], n_seeds=2), tmp_path / "run"
    settings = settings.model_copy(
        update={"auditing": settings.auditing.model_copy(update={"compare_unfiltered": True})}
    )
    save_model(run, "model", 1)
    save_model(run, "unfiltered", 2)
    (run / "unfiltered").mkdir()
    shifts = pd.DataFrame({"shift": "as it is", "label": [0, 1] * 4, "probability": [0.1, 0.9] * 4})
    shifts.to_csv(run / "unfiltered" / "shifts.csv", index=False)
    explain_shards.fn(Run(settings), [0])
    gather_explanations.fn(Run(settings))
    (path,) = (run / "explanations").glob("*.json")
    said = json.loads(path.read_text())
    assert len(said["weights"]) == len(said["unfiltered"]["weights"])
    assert said["weights"] != said["unfiltered"]["weights"]
    assert said["unfiltered"]["stability"]["n_seeds"] == 2
    with Image.open(path.with_suffix(".png")) as picture:
        assert picture.width == 3 * 320 + 2 * 8


def test_where_no_image_is_asked_for_the_folder_says_so(tmp_path: Path) -> None:
    settings = write_answers(tmp_path, DEVICES, n_images=0)
    assert plan_explanations.fn(Run(settings)) == []
    facts = gather_explanations.fn(Run(settings))
    assert facts["n_images"] == 0 and facts["rank_correlation"] is None
    assert [path.name for path in (tmp_path / "run" / "explanations").iterdir()] == ["none.txt"]


# -- all of them -------------------------------------------------------------------------------------------------------


def make_said(correlation: float | None, deletion: float, insertion: float, r2: float | None) -> Facts:
    stable = None if correlation is None else correlation >= 0.7
    return {
        "r2": r2,
        "stability": {"n_seeds": 2, "rank_correlation": correlation, "top5_overlap": correlation, "stable": stable},
        "faithfulness": {"deletion": deletion, "insertion": insertion, "random": 0.5},
    }


def test_a_run_is_summed_up_by_medians_and_by_how_many_maps_beat_a_random_order() -> None:
    said = [
        make_said(0.9, 0.4, 0.7, 0.8),
        make_said(0.5, 0.3, 0.8, None),
        make_said(None, 0.6, 0.6, 0.4),
        make_said(0.8, 0.5, 0.4, 0.5),
    ]
    facts = sum_up(said)
    assert facts == {
        "n_repeated": 3,
        "n_seeds": 2,
        "rank_correlation": 0.8,
        "top5_overlap": 0.8,
        "n_unstable": 1,
        "r2": 0.5,
        "deletion": 0.45,
        "insertion": 0.65,
        "random": 0.5,
        "n_deletion_better": 2,
        "n_insertion_better": 3,
    }
    line = say_explanations(facts | {"n_images": 4, "reused": True})
    assert line == (
        "explained 4 images; median rank correlation between seeds 0.80 on 3 of them; "
        "deletion beats a random order on 2 of 4"
    )


def test_a_run_without_explanations_is_summed_up_without_figures() -> None:
    facts = sum_up([])
    assert facts["r2"] is None and facts["deletion"] is None and facts["n_deletion_better"] == 0
    assert say_explanations(facts | {"n_images": 0, "reused": False}) == "explained 0 images"
