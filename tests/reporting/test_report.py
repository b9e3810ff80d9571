"""The report: what the page says, what stays out of it, and that it needs nothing but itself."""

import base64
import hashlib
import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from report_run import HOSTILE, Page, build_run, settings_for

from tasks.errors import RunError
from tasks.files import write_json
from tasks.findings import MeasuredGroup, Metrics
from tasks.reporting import gallery as report_gallery
from tasks.reporting.figures import as_svg, draw_roc, roc_points
from tasks.reporting.inputs import OTHER_REASON, plain_reason
from tasks.reporting.report import gather_page, render_page, summarise_page, write_report
from tasks.reporting.results import say_result
from tasks.reporting.words import say_seconds, say_value
from tasks.runs.run import Run
from tasks.settings import EvaluationSettings

LINKS = ["../review/index.html", "../model_card.md"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "my-run"
    build_run(folder)
    return folder


@pytest.fixture(scope="module")
def html(run: Path) -> str:
    return Path(write_report.fn(Run(settings_for(run)))).read_text()


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


@pytest.fixture(scope="module")
def val_page(run: Path) -> Page:
    """The page when test is left out, over a folder that still holds numbers of test."""
    settings = settings_for(run, evaluation=EvaluationSettings(splits=("val",)))
    return Page(render_page(gather_page(Run(settings))))


def test_the_page_is_well_formed(page: Page, val_page: Page) -> None:
    for some in (page, val_page):
        assert (some.errors, some.open) == ([], [])


def test_the_page_fetches_nothing_from_outside(html: str, page: Page) -> None:
    assert "http:" not in html and "https:" not in html and "@import" not in html
    addresses = [v for _, attributes in page.elements for k, v in attributes.items() if k in ("src", "href", "srcset")]
    assert any(a.startswith("data:image/jpeg") for a in addresses)
    assert [a for a in addresses if not a.startswith(("data:image/", "#"))] == LINKS
    assert set(re.findall(r"url\((.)", html)) <= {"#"}


def test_the_data_docs_are_linked_relative_to_the_page_when_they_exist(run: Path, tmp_path: Path) -> None:
    build_run(tmp_path)
    docs = tmp_path / "checks" / "source" / "data_docs"
    docs.mkdir()
    (docs / "index.html").write_text("docs")
    made = Page(Path(write_report.fn(Run(settings_for(tmp_path)))).read_text())
    links = [a["href"] for a in made.all("a") if not a["href"].startswith("#")]
    assert links == ["../checks/source/data_docs/index.html", *LINKS]
    assert (tmp_path / "report" / links[0]).exists()


def test_names_of_files_and_patients_stay_out_of_the_page(html: str) -> None:
    assert ".jpeg" not in html
    assert "person77" not in html


def test_hostile_text_is_shown_as_text_and_only_our_own_script_may_run(html: str, page: Page) -> None:
    assert HOSTILE not in html
    assert HOSTILE in page.text  # the source is named like this, so it does appear: escaped
    assert len(page.all("script")) == 1
    allowed = base64.b64encode(hashlib.sha256("".join(page.scripts).encode()).digest()).decode()
    policy = next(m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert f"script-src 'sha256-{allowed}'" in policy and policy.startswith("default-src 'none'")


def test_the_result_and_that_it_is_not_for_clinical_use_come_first(page: Page) -> None:
    before = page.text[: page.text.index("What went in", page.text.index("Normal or pneumonia"))]
    assert "On 8 test images: AUC 0.973" in before and "at threshold 0.412 sensitivity 0.946" in before
    assert "not for clinical use" in before


def test_a_group_without_images_shows_its_reason(page: Page) -> None:
    assert "Test, with a device 0 not measured: no image was screened" in page.text


def test_a_measure_without_a_value_says_so(page: Page) -> None:
    assert "Validation, with a device 2 not measured: it cannot be computed" in page.text


def test_groups_of_few_patients_are_marked(page: Page) -> None:
    assert "Validation, no device seen †" in page.text and "† Fewer than 30 patients" in page.text
    assert "Test, all images †" not in page.text


def test_images_that_nobody_read_and_nothing_scored_are_unknown_and_never_zero(page: Page) -> None:
    assert "Test normal 4 0 not known pneumonia 4 0 not known" in page.text
    assert "Validation normal 4 4 0 0.0 %" in page.text


def test_the_screener_s_quality_and_its_cost_are_told_with_intervals_or_reasons(page: Page) -> None:
    assert "on 40 readings that it was not trained on (it was trained on 5 others)" in page.text
    assert "Pneumonia images alone 30 0.951 0.941 to 0.961" in page.text
    assert "Normal images alone 0 not measured: no image is in this group" in page.text
    assert "12.3 % Clean pneumonia images that would be lost (10.0 to 15.0 %)" in page.text
    assert "4.6 % Training images that would still show a device if the score alone decided" in page.text
    assert "not known Clean normal images that would be lost : a class has too few readings" in page.text.replace(
        "lost:", "lost :"
    )


def test_reasons_are_grouped_without_the_names_in_them(page: Page) -> None:
    for says in ("Identical copy of an image that is kept", "The file cannot be read as an image", OTHER_REASON):
        assert f"{says} 1 0 0 1" in page.text
    assert plain_reason(f"duplicate of {HOSTILE}") == "Identical copy of an image that is kept"


def test_failed_checks_come_first_with_the_rows_concerned(page: Page) -> None:
    rows = (
        "Sizes fit warning does not hold 7 of 24",
        "No patient is in both critical not judged: the patient of 3 of 24 images is not known 0 of 24",
        "Every label is 0 or 1 critical holds 0 of 24",
    )
    assert " ".join(rows) in page.text
    assert "1 of 3 expectations does not hold (warning)" in page.text


def test_unknown_patients_are_warned_of_at_the_top(page: Page) -> None:
    start = page.text.index("The patient of 3 of 24 images is not known.")
    assert start < page.text.index("On 8 test images")
    assert "Nobody can tell whether one child is in training and in validation or test" in page.text[start:]


def test_nearly_equal_pictures_and_contradictions_in_test_are_counted(page: Page) -> None:
    assert (
        "4 Pairs of nearly equal pictures, named in same_pictures.csv of the run folder; of 2 of them one" in page.text
    )
    assert "Warning: 3 pictures are in no class folder, and are not used." in page.text
    assert "1 Test images that equal an image with the other label" in page.text


def test_no_missing_value_leaks_onto_the_page(page: Page, val_page: Page) -> None:
    for some in (page, val_page):
        spoken = " ".join(
            [some.text, *(v for _, a in some.elements for k, v in a.items() if k in ("alt", "aria-label"))]
        )
        assert not re.search(r"\b(NaN|nan|None|null|NA|Undefined|inf)\b", spoken)
    assert "R² not defined" in page.text
    assert "Probability above 0.999" in page.text


def test_nothing_measured_on_test_is_shown_when_only_val_was_evaluated(page: Page, val_page: Page) -> None:
    for number in ("0.973", "0.932"):
        assert number in page.text
        assert number not in val_page.text
    assert "On 8 validation images: AUC 0.888" in val_page.text
    assert "The settings left the test split out of the evaluation." in val_page.text
    assert "No image was explained in this run." in val_page.text
    assert "Test, " not in val_page.text


def test_everything_seen_has_words_for_those_who_do_not_see(page: Page) -> None:
    assert len([i for i in page.all("img") if "truly" in i["alt"]]) == 4
    assert all(image.get("alt") for image in page.all("img"))
    drawings = page.all("svg")
    assert len(drawings) == len(page.all("title")) - 1 == len(page.all("desc")) == 6
    assert all(drawing["role"] == "img" and drawing["aria-labelledby"] for drawing in drawings)
    assert len(page.all("table")) == len(page.all("caption"))
    assert all("scope" in head for head in page.all("th"))


def test_headings_go_down_one_step_at_a_time_and_ids_are_unique(page: Page) -> None:
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {v[1:] for _, a in page.elements for k, v in a.items() if k == "href" and v.startswith("#")}
    assert targets <= set(ids)


def test_pictures_beyond_the_room_of_the_page_are_counted_in_words(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = max(len(p.read_bytes()) for p in (run / "explanations").glob("*.png"))
    monkeypatch.setattr(report_gallery, "PICTURES_MB", 1.7 * size / 1e6)
    made = Page(render_page(gather_page(Run(settings_for(run)))))
    n = len([i for i in made.all("img") if "truly" in i["alt"]])
    assert 1 <= n < 4
    assert f"The page has room for {n} of 4 explanations" in made.text


def test_a_run_without_explanations_checks_or_history_still_has_a_page(tmp_path: Path) -> None:
    build_run(tmp_path)
    for path in [*(tmp_path / "explanations").iterdir(), *(tmp_path / "checks").glob("*/*"), tmp_path / "history.csv"]:
        path.unlink()
    made = Page(Path(write_report.fn(Run(settings_for(tmp_path)))).read_text())
    assert "No image was explained in this run." in made.text
    assert "The data set as it came: this check was not run." in made.text
    assert "no history of the epochs" in made.text


def test_a_split_of_one_class_has_no_roc_curve_and_says_why(tmp_path: Path) -> None:
    build_run(tmp_path)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    nothing = {"value": None, "low": None, "high": None, "reason": "a class is missing in this group"}
    metrics["test"] |= {"auc": nothing, "specificity": nothing, "confusion": {"tp": 4, "fp": 0, "tn": 0, "fn": 0}}
    write_json(tmp_path / "metrics.json", metrics)
    table = pd.read_csv(tmp_path / "predictions.csv")
    table[(table["split"] == "val") | (table["label"] == 1)].to_csv(tmp_path / "predictions.csv", index=False)
    made = Page(Path(write_report.fn(Run(settings_for(tmp_path)))).read_text())
    assert "On 8 test images: no AUC, because a class is missing in this group" in made.text
    assert "There is no ROC curve: it needs images of both classes." in made.text


def test_a_run_folder_without_metrics_is_refused_by_name(tmp_path: Path) -> None:
    build_run(tmp_path)
    (tmp_path / "metrics.json").unlink()
    with pytest.raises(RunError, match=r"metrics\.json is missing"):
        write_report.fn(Run(settings_for(tmp_path)))


def test_the_artifact_holds_sentence_metrics_and_two_pictures_below_300_kb(run: Path) -> None:
    page = gather_page(Run(settings_for(run)))
    text = summarise_page(page, str(run / "report" / "index.html"))
    assert page["sentence"] in text and "| Test, with a device | 0 |" in text
    assert text.count("](data:image/") == 2
    assert len(text.encode()) < 300_000
    assert "person77" not in text and ".jpeg" not in text


def test_the_result_of_a_split_that_was_not_measured_is_a_sentence() -> None:
    said = say_result(Metrics(threshold=0.4, val=MeasuredGroup(n=0, reason="no image is in the val split")), "val")
    assert said == "The network was not measured on validation images: no image is in the val split."


def test_a_share_link_among_the_settings_is_not_shown() -> None:
    said = say_value("https://www.dropbox.com/scl/fo/abc/key?rlkey=secret&dl=1")
    assert said.startswith("www.dropbox.com") and "secret" not in said and "key" not in said


def test_seconds_are_said_in_the_unit_that_fits() -> None:
    assert [say_seconds(s) for s in (0.24, 38.4, 59.7, 725, 7380)] == [
        "0.2 s",
        "38 s",
        "1 min 0 s",
        "12 min 5 s",
        "2 h 3 min",
    ]


def test_the_roc_curve_makes_one_slanted_step_where_classes_share_a_probability() -> None:
    points = roc_points(np.array([1.0, 0.0, 1.0, 0.0]), np.array([0.9, 0.5, 0.5, 0.1]))
    assert points.tolist() == [[0, 0], [0, 0.5], [0.5, 1], [1, 1]]


def test_a_roc_curve_of_one_class_is_refused() -> None:
    with pytest.raises(ValueError, match="both classes"):
        roc_points(np.ones(3), np.array([0.1, 0.2, 0.3]))


def test_a_figure_has_the_same_bytes_each_time_and_ids_of_its_own() -> None:
    points = roc_points(np.array([1.0, 0.0]), np.array([0.9, 0.1]))
    first, second = (as_svg(draw_roc(points, (1.0, 1.0), 0.5), "roc", "ROC <curve>", "A & B") for _ in range(2))
    other = as_svg(draw_roc(points, (1.0, 1.0), 0.5), "other", "ROC", "A")
    assert first == second
    assert "ROC &lt;curve&gt;" in first and "A &amp; B" in first
    assert not set(re.findall(r' id="([^"]+)"', first)) & set(re.findall(r' id="([^"]+)"', other))
    assert set(re.findall(r'(?:url\(|href=")#([^)"]+)', first)) <= set(re.findall(r' id="([^"]+)"', first))
