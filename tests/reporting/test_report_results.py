"""What the report says of the networks: thresholds, calibration, members, other conditions, and what it cannot say."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from report_run import Page, build_metrics, build_run, group, make_answers, measure_again, settings_for

from tasks.files import write_json
from tasks.findings import MeasuredGroup, Metrics
from tasks.records import Facts
from tasks.reporting.figures import as_svg, draw_reliability, draw_training
from tasks.reporting.report import gather_page, render_page, say_second_point
from tasks.reporting.results import (
    choose_splits,
    describe_points,
    describe_training,
    find_worst_shifts,
    say_aucs,
    say_border,
    say_border_loss,
    say_share,
    say_start,
)
from tasks.runs.run import Run
from tasks.settings import EvaluationSettings, Settings, TrainingSettings


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The page of a run of two networks."""
    run = tmp_path_factory.mktemp("runs") / "run"
    build_run(run)
    return show(settings_for(run))


def show(settings: Settings) -> Page:
    return Page(render_page(gather_page(Run(settings))))


def odd_page(tmp_path: Path, table: pd.DataFrame, n_members: int = 2, **more: Any) -> Page:
    """The page of a run whose answers are made up, checked for what no page may have."""
    build_run(tmp_path)
    made = show(measure_again(tmp_path, table, n_members, **more))
    assert (made.errors, made.open) == ([], [])
    assert not re.search(r"\b(NaN|nan|None|null|NA|Undefined|inf)\b", made.text)
    return made


# -- training ----------------------------------------------------------------------------------------------------------


def test_the_training_of_several_networks_is_told_with_the_auc_of_each(page: Page) -> None:
    assert "trained 2 networks from scratch on 4 images" in page.text
    assert "for 3 epochs each. They differ in their seed alone." in page.text
    assert "The networks end at validation AUCs of 0.970 and 0.960. No epoch was chosen by these figures" in page.text
    assert "1,234 weights" in page.text and "as they are and under 15 changes" in page.text


def test_the_curves_are_told_in_words(page: Page) -> None:
    assert "loss went from 0.750 to 0.350 and the validation AUC from 0.750 to 0.965 in the mean of 2" in page.text


def test_what_networks_start_from_is_said() -> None:
    said = [
        say_start(TrainingSettings(backbone=backbone, weights=weights))
        for backbone, weights in (
            (None, None),
            ("MobileNetV3Small", None),
            ("MobileNetV3Small", "imagenet"),
            ("MobileNetV3Small", "/secret/my.weights.h5"),
        )
    ]
    assert said == [
        "from scratch",
        "from scratch in the form of MobileNetV3Small",
        "from MobileNetV3Small with ImageNet weights",
        "from MobileNetV3Small with weights out of a file",
    ]


def test_few_aucs_are_listed_and_many_are_a_range() -> None:
    assert say_aucs([0.9]) == "0.900"
    assert say_aucs([0.9, 0.8, 0.7]) == "0.900, 0.800 and 0.700"
    assert say_aucs([0.9 + i / 1000 for i in range(11)]) == "from 0.900 to 0.910"


def test_a_negative_offset_is_said_as_minus(tmp_path: Path) -> None:
    build_run(tmp_path)
    assert describe_training(tmp_path, TrainingSettings())["offset"] == "minus 0.25"


# -- results -----------------------------------------------------------------------------------------------------------


def test_both_thresholds_are_told_with_what_they_give_on_each_split(page: Page) -> None:
    table = page.text[page.text.index("What each threshold gives, with") :]
    for said in (
        "Balanced 0.412 Test, all images 8 0.946 0.936 to 0.956 0.876",
        "High sensitivity 0.213 Test, all images 8 0.987 0.977 to 0.997 0.765",
        "Validation, all images 8 0.987",
    ):
        assert said in table


def test_how_each_threshold_was_chosen_is_said(page: Page) -> None:
    assert (
        "Balanced is where the lowest of all sensitivities and specificities under any one of these is highest"
        in page.text
    )
    assert "still finds at least 95 % of the pneumonia images as they are and under each change" in page.text


def test_thresholds_that_are_the_same_are_said_to_be(tmp_path: Path) -> None:
    build_run(tmp_path)
    metrics = build_metrics()
    metrics["operating_points"]["high_sensitivity"] = metrics["operating_points"]["balanced"]
    write_json(tmp_path / "metrics.json", metrics)
    made = show(settings_for(tmp_path))
    assert "In this run they are the same" in made.text
    assert "the ring the threshold for high sensitivity" not in made.text


def test_a_group_that_both_thresholds_were_measured_on_appears_under_both() -> None:
    metrics = build_metrics()
    for point in metrics["operating_points"].values():
        point["test_with_device"] = group(3, 0.9, patients=3)
    names = [[row["name"] for row in point["groups"]] for point in describe_points(Metrics(**metrics), ["test"])]
    assert names == [["Test, all images", "Test, with a device"]] * 2


def test_calibration_is_told_with_its_interval_and_what_the_network_says_on_average(page: Page) -> None:
    assert "Test 8 0.047 0.037 to 0.057 Validation 8 0.036" in page.text
    assert "On the test images the network says 77.2 % on average, and 75 % of them show pneumonia" in page.text
    assert "of 6 from 0.9 to 1.0 (mean 0.95), 83.3 % show pneumonia" in page.text


def test_the_second_answer_is_measured_or_says_why_not(page: Page) -> None:
    table = page.text[page.text.index("Bacteria told from virus, with") :]
    assert "Test 0 not measured: no image is in this group Validation 4 0.711" in table


def test_networks_alone_are_told_by_mean_and_deviation_beside_all_in_one(page: Page) -> None:
    table = page.text[page.text.index("Each network alone and all in one") :]
    assert "Test mean of the networks 0.940 SD 0.014" in table
    assert "all in one 0.973 0.963 to 0.983" in table


def test_the_summary_for_prefect_names_the_second_threshold_once_it_is_another_one() -> None:
    points = describe_points(Metrics(**build_metrics()), ["test", "val"])
    said = say_second_point({"results": {"points": points}})
    assert said == (
        "Test, all images, at the threshold for high sensitivity, 0.213: sensitivity 0.987, specificity 0.765."
    )


def test_the_main_split_is_the_first_that_holds_images() -> None:
    metrics = build_metrics()
    assert choose_splits(Metrics(**metrics), EvaluationSettings()) == (["test", "val"], "test")
    metrics["test"] = {"n": 0, "reason": "none"}
    assert choose_splits(Metrics(**metrics), EvaluationSettings()) == (["test", "val"], "val")
    assert choose_splits(Metrics(**metrics), EvaluationSettings(splits=("test",))) == (["test"], "test")


# -- other conditions --------------------------------------------------------------------------------------------------


def test_validation_is_told_under_each_shift_and_the_worst_is_named(page: Page) -> None:
    table = page.text[page.text.index("Validation under each change, with") :]
    assert table.index("As it is 0.880") < table.index("Brighter 0.870") < table.index("Border blanked 0.780")
    assert (
        "The lowest AUC is 0.730 (border of the other class; 0.880 as they are); no change lowers sensitivity"
        in page.text
    )


def test_a_shift_that_cannot_be_measured_shows_its_reason(tmp_path: Path) -> None:
    build_run(tmp_path)
    metrics = build_metrics()
    metrics["shifts"]["grain"] = {"n": 0, "reason": "no image is in this group"}
    write_json(tmp_path / "metrics.json", metrics)
    assert "Grain not measured: no image is in this group" in show(settings_for(tmp_path)).text


def test_without_validation_as_it_is_no_shift_is_called_worst() -> None:
    assert find_worst_shifts(Metrics(threshold=0.5, shifts={"grain": MeasuredGroup(**group(8, 0.9))})) == []


def test_the_border_is_told_with_what_it_means(page: Page) -> None:
    section = page.text[page.text.index("The border is the outer") :]
    assert "outer 3/28 of each side" in section and "Here the test images are shown" in section
    assert "0.591 AUC where only the border is left (0.581 to 0.601)" in section
    assert "0.010 AUC lost by blanking the border (−0.002 to 0.020)" in section
    assert "the border tells this network something about the class" in section
    assert "Blanking the border makes no difference that can be told from chance." in section


@pytest.mark.parametrize(
    ("low", "high", "says"),
    [(0.51, 0.7, "above 0.5"), (0.3, 0.49, "below 0.5"), (0.4, 0.6, "cannot be told from guessing")],
)
def test_the_meaning_of_the_border_alone_follows_its_interval(low: float, high: float, says: str) -> None:
    assert says in say_border({"value": (low + high) / 2, "low": low, "high": high})


def test_the_meaning_of_what_is_lost_without_the_border_follows_its_interval() -> None:
    said = [say_border_loss({"value": 0.0, "low": low, "high": high}) for low, high in ((0.1, 0.2), (-0.2, -0.1))]
    assert "some of its answers rest on the border" in said[0] and "better" in said[1]


def test_a_border_that_was_not_measured_gives_its_reason() -> None:
    nothing = {"value": None, "low": None, "high": None, "reason": "a class is missing"}
    assert say_border(nothing) == "What the border alone tells the network is not known: a class is missing."
    assert say_border_loss(nothing).endswith("is not known: a class is missing.")


# -- odd runs, measured as evaluation does it --------------------------------------------------------------------------


def test_a_run_without_a_test_split_has_a_page(tmp_path: Path) -> None:
    made = odd_page(tmp_path, make_answers(splits=("val",)))
    assert "On 60 validation images" in made.text
    assert "Test, all images 0 not measured: no image is in the test split" in made.text
    assert "Here the validation images are shown with nothing but the border left" in made.text


def test_a_run_that_leaves_test_unread_has_a_page(tmp_path: Path) -> None:
    made = odd_page(tmp_path, make_answers(), splits=("val",))
    assert "The settings left the test split out of the evaluation." in made.text
    assert "Test, " not in made.text


def test_a_test_split_of_one_class_has_a_page_with_reasons(tmp_path: Path) -> None:
    table = make_answers()
    made = odd_page(tmp_path, table[(table["split"] == "val") | (table["label"] == 1)])
    assert "There is no ROC curve: it needs images of both classes." in made.text
    assert "mean of the networks not measured: a class is missing" in made.text
    assert "not known AUC where only the border is left : a class is missing" in made.text.replace("left:", "left :")


def test_a_run_of_one_network_has_a_page_without_a_spread(tmp_path: Path) -> None:
    made = odd_page(tmp_path, make_answers(), n_members=1)
    assert "This run trained one network from scratch on 4 images" in made.text
    assert "The network ends at a validation AUC of 0.970" in made.text
    assert "what another seed would have given is not known" in made.text
    assert "Each network alone and all in one" not in made.text


def test_a_run_whose_subtypes_nobody_knows_has_a_page(tmp_path: Path) -> None:
    made = odd_page(tmp_path, make_answers().assign(subtype="unknown"))
    assert "Test bacteria 0 not measured: no image is in this group" in made.text


# -- figures and words -------------------------------------------------------------------------------------------------


def test_the_counts_of_a_reliability_plot_are_written_on_it() -> None:
    bins: list[Facts] = [{"from": i / 10, "to": (i + 1) / 10, "n": 0} for i in range(10)]
    bins[3] |= {"n": 1234, "mean_probability": 0.36, "share": 0.4}
    assert "1,234" in as_svg(draw_reliability(bins), "reliability", "Reliability", "Some bins.")


def test_one_network_is_drawn_without_a_legend_and_several_with_one() -> None:
    for n, named in ((1, False), (3, True)):
        figure = draw_training([1, 2], np.ones((n, 2)), np.full((n, 2), 0.9))
        svg = as_svg(figure, "training", "Training", "Two epochs.")
        assert ("each network" in svg) is named


def test_shares_are_said_in_percent() -> None:
    assert [say_share(share) for share in (0.95, 3 / 28, 1.0, 0.0)] == ["95 %", "10.7 %", "100 %", "0 %"]
