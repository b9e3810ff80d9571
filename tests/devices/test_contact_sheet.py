"""The sheet of doubtful images: which images are on it, and that a person can answer on it in a real browser."""

import base64
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from small_run import write_run

from tasks.devices.answers import keep_answers, match_answers, newest, read_answers, read_kept
from tasks.devices.contact_sheet import SheetRow, doubtful_rows, find_doubtful, render_sheet, write_sheet
from tasks.pixels.masks import Masks
from tasks.pixels.outlines import draw_outline
from tasks.pixels.packed import PackedImages
from tasks.settings import ScreeningSettings

HOW = ScreeningSettings(exclude_from=0.3, threshold=0.5, doubtful_to=0.8)


def make_manifest(**columns: Any) -> pd.DataFrame:
    n = len(columns["device_score"])
    rows = {
        "image_id": [f"{i:016x}" for i in range(n)],
        "path": [f"train/{i}.png" for i in range(n)],
        "sha256": [f"{i:064x}" for i in range(n)],
        "split": "train",
        "device_reviewed": pd.array([False] * n, dtype="boolean"),
        "excluded": pd.array([""] * n, dtype="string"),
    }
    rows |= columns
    return pd.DataFrame(rows | {"device_score": pd.array(columns["device_score"], dtype="Float32")})


def chosen(manifest: pd.DataFrame, how: ScreeningSettings = HOW) -> list[str]:
    return list(doubtful_rows(manifest, how)["path"].str.removeprefix("train/").str.removesuffix(".png"))


# -- which images ------------------------------------------------------------------------------------------------------


def test_images_of_the_doubtful_band_come_nearest_to_the_threshold_first() -> None:
    assert chosen(make_manifest(device_score=[0.1, 0.35, 0.75, 0.5, 0.95, 0.6])) == ["3", "5", "1", "2"]


def test_images_without_a_score_or_read_by_somebody_are_not_doubtful() -> None:
    manifest = make_manifest(device_score=[None, 0.5, 0.5], device_reviewed=pd.array([False, True, None], "boolean"))
    assert chosen(manifest) == ["2"]


def test_images_that_are_used_in_no_case_are_not_doubtful_but_those_the_screener_excludes_are() -> None:
    reasons = [
        "duplicate of x",
        "undecodable: y",
        "conflict: z",
        "shows a medical device (screener)",
        "may show a device",
        pd.NA,
    ]
    manifest = make_manifest(device_score=[0.5] * 6, excluded=pd.array(reasons, dtype="string"))
    assert chosen(manifest) == ["3", "4", "5"]


def test_identical_files_are_asked_about_once() -> None:
    assert chosen(make_manifest(device_score=[0.5, 0.5, 0.5], sha256=["s", "s", "t"])) == ["0", "2"]


def test_no_more_than_the_wanted_number_is_asked_about() -> None:
    manifest = make_manifest(device_score=[0.4, 0.5, 0.7])
    assert chosen(manifest, HOW.model_copy(update={"n_review": 2})) == ["1", "0"]
    assert chosen(manifest, HOW.model_copy(update={"n_review": 0})) == []
    assert len(find_doubtful(manifest, HOW.model_copy(update={"n_review": 1}))) == 3


# -- the page ----------------------------------------------------------------------------------------------------------


def row(**more: Any) -> SheetRow:
    values: dict[str, Any] = {
        "image_id": "0" * 16,
        "path": "train/PNEUMONIA/person1_bacteria_1.jpeg",
        "sha256": "1" * 64,
        "score": 0.5,
        "split": "train",
        "pixels": np.zeros((224, 224), np.uint8),
        "mask": np.zeros((224, 224), np.uint8),
    }
    return SheetRow(**values | more)


def test_hostile_names_stay_text() -> None:
    hostile = '"><script>alert(1)</script>'
    html = render_sheet([row(path=hostile, image_id=hostile, split=hostile)], hostile)
    assert "<script>alert" not in html
    assert html.count("<script") == 1


def test_a_path_like_a_formula_is_written_so_that_it_is_none() -> None:
    assert 'data-path="./=cmd.png"' in render_sheet([row(path="=cmd.png")], "run")


def test_the_outline_surrounds_the_device_at_a_distance() -> None:
    mask = np.zeros((224, 224), np.uint8)
    mask[100:110, 50:60] = 250
    path, sure = draw_outline(mask)
    points = np.array([[float(v) for v in point.split()] for point in re.findall(r"[\d.]+ [\d.]+", path)])
    assert sure
    assert points.min(axis=0) == pytest.approx((47, 97), abs=1)
    assert points.max(axis=0) == pytest.approx((63, 113), abs=1)


def test_a_faint_trace_is_outlined_as_such_and_noise_is_not() -> None:
    mask = np.zeros((224, 224), np.uint8)
    mask[0:9, 0:9] = 60
    path, sure = draw_outline(mask)
    assert path.startswith("M")
    assert path.endswith("Z")
    assert not sure
    assert draw_outline(mask // 10) == ("", False)


def test_sheet_and_listing_are_written_also_when_no_image_is_doubtful(tmp_path: Path) -> None:
    manifest = write_run(tmp_path / "run", [0.1, 0.4], tmp_path / "cache")
    images = PackedImages(tmp_path / "run", tmp_path / "cache")
    masks = Masks(tmp_path / "run", tmp_path / "cache")
    write_sheet(tmp_path / "one", doubtful_rows(manifest, HOW), images, masks, "r")
    listing = pd.read_csv(tmp_path / "one" / "review" / "doubtful.csv")
    assert listing.to_dict("records") == [
        {"path": manifest["path"][1], "sha256": manifest["sha256"][1], "device_score": 0.4, "split": "test"}
    ]
    write_sheet(tmp_path / "none", doubtful_rows(manifest.head(1), HOW), images, masks, "r")
    assert "No image is in doubt" in (tmp_path / "none" / "review" / "index.html").read_text()
    assert list(pd.read_csv(tmp_path / "none" / "review" / "doubtful.csv").columns) == list(listing.columns)


# -- in a browser ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sheet(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pd.DataFrame]:
    """The page of a run with four doubtful images, and its manifest."""
    folder = tmp_path_factory.mktemp("sheet")
    manifest = write_run(folder / "run", [0.5, 0.55, 0.6, 0.7, 0.9], folder / "cache")
    rows = doubtful_rows(manifest, HOW)
    images = PackedImages(folder / "run", folder / "cache")
    masks = Masks(folder / "run", folder / "cache")
    write_sheet(folder / "run", rows, images, masks, "a run")
    return folder / "run" / "review" / "index.html", manifest


@pytest.fixture
def opened(browser: Any, sheet: tuple[Path, pd.DataFrame]) -> Iterator[Any]:
    """The sheet in a fresh browser; it has to load nothing and complain about nothing."""
    context = browser.new_context(viewport={"width": 1300, "height": 820})
    page = context.new_page()
    loaded: list[str] = []
    complaints: list[str] = []
    page.on("request", lambda request: loaded.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(sheet[0].as_uri())
    yield page
    context.close()
    assert {url for url in loaded if not url.startswith(("data:", "blob:"))} == {sheet[0].as_uri()}
    assert complaints == []


def shown(page: Any) -> str:
    """The image id that is to be seen."""
    return page.locator(".case dd.id:visible").inner_text()


def save(page: Any, path: Path) -> Path:
    with page.expect_download() as download:
        page.get_by_role("button", name="Save answers").click()
    assert download.value.suggested_filename == "answers.csv"
    download.value.save_as(path)
    return path


def test_answers_given_with_keys_and_mouse_are_saved_and_taken(
    opened: Any, sheet: tuple[Path, pd.DataFrame], tmp_path: Path
) -> None:
    manifest = sheet[1]
    assert opened.locator("#save").is_disabled()
    assert shown(opened) == manifest["image_id"][0]
    opened.keyboard.press("d")
    assert shown(opened) == manifest["image_id"][1]
    opened.locator(".choice.none:visible").click()
    assert shown(opened) == manifest["image_id"][2]
    opened.keyboard.press("u")
    opened.keyboard.press("n")
    opened.keyboard.press("ArrowLeft")
    assert shown(opened) == manifest["image_id"][2]
    opened.get_by_label("Your name").fill("=Ada, the 'first'")
    assert shown(opened) == manifest["image_id"][2], "letters of a name are no answers"
    assert opened.locator("#count").inner_text() == "3 of 4 answered, 1 cannot tell"
    path = save(opened, tmp_path / "answers.csv")
    assert opened.locator("#state").inner_text() == "Saved: 3 answers in answers.csv."

    answers = read_answers(path, "answers")
    assert path.read_text().splitlines()[0] == "path,sha256,device,reviewer,time"
    assert {(a.path, a.sha256): a.device for a in answers} == {
        (manifest["path"][0], manifest["sha256"][0]): 1,
        (manifest["path"][1], manifest["sha256"][1]): 0,
        (manifest["path"][3], manifest["sha256"][3]): 0,
    }
    assert {a.reviewer for a in answers} == {"Ada, the 'first'"}
    assert all(a.time and abs(a.time - datetime.now(UTC)) < timedelta(minutes=5) for a in answers)
    folder = tmp_path / "device_answers"
    taken = keep_answers(match_answers(answers, manifest, "x"), folder, reviewer="x", place="x", now=datetime.now(UTC))
    assert taken["n_new"] == 3 and newest(read_kept(folder)) == newest(answers)


def test_a_reload_keeps_answers_and_name_and_goes_to_the_first_open_image(
    opened: Any, sheet: tuple[Path, pd.DataFrame], tmp_path: Path
) -> None:
    opened.keyboard.press("d")
    opened.keyboard.press("n")
    opened.get_by_label("Your name").fill("Ada")
    opened.reload()
    assert opened.locator("#count").inner_text() == "2 of 4 answered"
    assert opened.get_by_label("Your name").input_value() == "Ada"
    assert shown(opened) == sheet[1]["image_id"][2]
    assert [a.device for a in read_answers(save(opened, tmp_path / "a.csv"), "x")] == [1, 0]


def test_the_outline_goes_and_comes_with_a_key_and_with_its_box(opened: Any) -> None:
    outline = opened.locator(".case:visible .film svg").first
    assert outline.is_visible()
    opened.keyboard.press("o")
    assert not outline.is_visible()
    opened.get_by_label("Show the outline").check()
    assert outline.is_visible()


def test_arrows_inside_the_choices_choose_and_stay_and_an_answer_can_be_changed_and_taken_back(
    opened: Any, tmp_path: Path
) -> None:
    first = shown(opened)
    opened.locator(".choice.device:visible input").focus()
    opened.keyboard.press(" ")
    opened.keyboard.press("ArrowDown")
    assert shown(opened) == first
    assert [a.device for a in read_answers(save(opened, tmp_path / "a.csv"), "x")] == [0]
    opened.get_by_role("button", name="Take back").click()
    assert opened.locator("#count").inner_text() == "0 of 4 answered"
    assert opened.locator("input:checked[type=radio]").count() == 0


def test_the_page_works_where_the_browser_keeps_nothing_and_says_so(
    browser: Any, sheet: tuple[Path, pd.DataFrame], tmp_path: Path
) -> None:
    context = browser.new_context()
    context.add_init_script(
        "Object.defineProperty(window, 'localStorage', { get() { throw new DOMException('no', 'SecurityError'); } })"
    )
    page = context.new_page()
    page.goto(sheet[0].as_uri())
    page.keyboard.press("d")
    assert page.locator("#forgets").is_visible()
    assert len(read_answers(save(page, tmp_path / "a.csv"), "x")) == 1
    context.close()


def test_class_and_path_are_nowhere_to_be_seen(opened: Any) -> None:
    opened.evaluate("document.querySelectorAll('[hidden]').forEach(part => part.removeAttribute('hidden'))")
    seen = opened.locator("body").inner_text().lower()
    assert "pneumonia" not in seen
    assert "virus" not in seen
    assert "person" not in seen.replace("for a person", "")


@pytest.mark.parametrize("width", [390, 768, 1300])
def test_the_page_fits_its_screen_without_scrolling_sideways(opened: Any, width: int) -> None:
    opened.set_viewport_size({"width": width, "height": 844})
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    box = opened.locator(".film:visible").bounding_box()
    assert box["width"] == pytest.approx(box["height"], abs=1)
    assert box["width"] >= 0.9 * min(width, 640)


def test_the_picture_on_the_page_is_the_packed_one(opened: Any, sheet: tuple[Path, pd.DataFrame]) -> None:
    from tasks.pixels.decoding import decode

    uri = opened.locator(".case:visible img").get_attribute("src")
    pixels = decode(base64.b64decode(uri.split(",")[1]))
    packed = PackedImages(sheet[0].parents[1], sheet[0].parents[2] / "cache").read([sheet[1]["image_id"][0]])[0]
    assert np.abs(pixels.astype(int) - packed.astype(int)).mean() < 2
