"""What the report says of the audit, and that its page works in a real browser."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_run import Page, build_run, compare_networks, settings_for

from tasks.errors import RunError
from tasks.explaining.verdict import RULES
from tasks.files import read_json, write_json
from tasks.findings import NetworkVerdict, read_audit
from tasks.reporting.audit import INSERTIONS, REMOVALS, describe_audit, say_comparison
from tasks.reporting.lungs import say_lungs
from tasks.reporting.report import write_report
from tasks.runs.run import Run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was compared with its twin, with its report."""
    folder = tmp_path_factory.mktemp("runs") / "compared"
    build_run(folder)
    write_report.fn(Run(compare_networks(folder)))
    return folder


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    return Page((run / "report" / "index.html").read_text())


@pytest.fixture
def opened(browser: Any, run: Path) -> Iterator[Any]:
    """The report in a fresh browser; it has to fetch nothing and complain about nothing."""
    context = browser.new_context(viewport={"width": 1300, "height": 820})
    tab = context.new_page()
    loaded: list[str] = []
    complaints: list[str] = []
    tab.on("request", lambda request: loaded.append(request.url))
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    address = (run / "report" / "index.html").as_uri()
    tab.goto(address)
    yield tab
    context.close()
    assert {url for url in loaded if not url.startswith("data:")} == {address}
    assert complaints == []


def test_the_verdict_comes_first_and_says_what_screening_changed(page: Page) -> None:
    start = page.text.index("What the network looks at", page.text.index("Under other conditions", 900))
    said = page.text[start : start + 700]
    assert f"The model passed the audit: none of {len(RULES)} rules is broken" in said
    assert "Better with screening: " in said
    assert "shift of normal images by drawn devices" in said


def test_every_change_that_the_audit_makes_has_a_title_in_the_report(run: Path) -> None:
    audit = read_json(run / "audit.json")
    for part, titles in (("insertion", INSERTIONS), ("removal", REMOVALS)):
        made = {key for key, found in audit[part]["model"].items() if isinstance(found, dict)}
        assert made and made <= set(titles)


def test_one_picture_shows_what_is_known_with_and_without_lungs_and_a_sentence_says_it(page: Page) -> None:
    section = page.text[page.text.index("With and without the lungs") :]
    for words in ("Whole image", "Only the lungs", "Lungs covered", "guessing", "always right"):
        assert words in section
    assert "This model reads the lungs. Shown nothing but the lungs, it reaches an AUC of 1.00" in section
    assert "Guessing gives 0.50." in section


@pytest.mark.parametrize(
    ("gain", "rest", "says"),
    [
        ("holds", "unclear", "This model reads the lungs; whether it reads what is around them too is not clear."),
        ("holds", "fails", "This model reads the lungs, but also what is around them."),
        ("fails", "holds", "This model knows little from the lungs, and little without them."),
        ("fails", "fails", "This model reads what is around the lungs better than the lungs."),
        ("unclear", "holds", "It is not clear how much of what this model knows comes from the lungs."),
    ],
)
def test_the_sentence_about_the_lungs_follows_the_rules(gain: str, rest: str, says: str, run: Path) -> None:
    audit = read_audit(run)
    rules = [{"setting": "auditing.min_lungs_gain", "outcome": gain}]
    rules.append({"setting": "auditing.max_lungs_removed_auc", "outcome": rest})
    assert say_lungs(audit.blanked["model"], NetworkVerdict(passed=None, rules=rules), "This model").startswith(says)


def test_a_network_that_knows_nothing_is_not_said_to_read_the_lungs(run: Path) -> None:
    audit = read_audit(run)
    guessing = audit.blanked["model"] | {"whole": {"value": 0.51, "low": 0.37, "high": 0.65}}
    assert say_lungs(guessing, audit.verdict.model, "This model").startswith("This model is not seen to tell pneumonia")


def test_a_run_from_before_lungs_were_found_is_shown_without_them(run: Path, tmp_path: Path) -> None:
    audit = read_json(run / "audit.json")
    for network in ("model", "unfiltered"):
        for key in [name for name in audit["blanked"][network] if "lungs" in name or name == "hole_gain"]:
            del audit["blanked"][network][key]
        audit["attribution"][network].pop("lungs", None)
        for part in ("insertion", "removal"):
            for found in audit[part][network].values():
                if isinstance(found, dict):
                    found.pop("over_lungs"), found.pop("elsewhere")
    write_json(tmp_path / "audit.json", audit)
    shown = describe_audit(tmp_path)
    assert shown["lungs"] is None and shown["places"] == []
    assert not any("lungs" in row["title"].lower() for row in shown["sights"] if row["who"] == "shape")


def test_shifts_are_shown_by_the_place_of_the_device_with_their_images(page: Page) -> None:
    table = page.text[page.text.index("Shift by the place of the device") :]
    assert "Device taken off over the lungs" in table and "elsewhere" in table


def test_a_further_removal_is_in_the_table_and_in_the_figure_with_its_own_name(run: Path, tmp_path: Path) -> None:
    audit = read_json(run / "audit.json")
    for found in audit["removal"].values():
        found["swapped_sides"] = found["filled"]
    write_json(tmp_path / "audit.json", audit)
    shown = describe_audit(tmp_path)
    assert [row["label"] for row in shown["changes"]["rows"][-2:]] == ["pneumonia", "pneumonia"]
    assert shown["changes"]["rows"][-1]["title"] == "Swapped sides"
    assert "Swapped sides: " in shown["figure"]


def test_a_damaged_audit_is_refused_by_the_name_of_the_entry(run: Path, tmp_path: Path) -> None:
    audit = read_json(run / "audit.json")
    audit["verdict"]["model"]["passed"] = "yes"
    write_json(tmp_path / "audit.json", audit)
    with pytest.raises(RunError, match=r"audit\.json names no verdict\.model\.passed: run the explain flow on this"):
        describe_audit(tmp_path)


def test_model_and_twin_stand_side_by_side_in_every_table(page: Page) -> None:
    assert page.text.count("This model Without screening") >= 4
    assert (page.errors, page.open) == ([], [])
    assert len(page.all("table")) == len(page.all("caption"))


def test_the_pair_of_maps_that_differ_most_says_how_much_lies_on_the_device(page: Page) -> None:
    assert "41% of the twin’s weight for pneumonia lie on it, 4% of this model’s" in page.text


def test_a_run_without_a_device_says_why_nothing_could_be_computed(tmp_path: Path) -> None:
    build_run(tmp_path)
    made = Page(Path(write_report.fn(Run(settings_for(tmp_path)))).read_text())
    assert "The audit came to no verdict" in made.text
    assert "Not computed: no image of the audited split is known to show no device" in made.text
    assert "Not computed: no image was screened" in made.text
    assert "Not computed: no explained image has a map with positive weight" in made.text
    assert "Without screening" not in made.text


def test_a_run_without_an_audit_is_refused_by_name(tmp_path: Path) -> None:
    build_run(tmp_path)
    (tmp_path / "audit.json").unlink()
    with pytest.raises(RunError, match=r"audit\.json is missing: run the explain flow"):
        write_report.fn(Run(settings_for(tmp_path)))


def test_a_difference_counts_only_where_the_intervals_are_apart() -> None:
    def rule(low: float, high: float, at_most: bool = True) -> dict[str, Any]:
        return {"says": "a figure", "value": (low + high) / 2, "low": low, "high": high, "at_most": at_most}

    def compare(own: dict[str, Any], twin: dict[str, Any]) -> str:
        return say_comparison(NetworkVerdict(passed=None, rules=[own]), NetworkVerdict(passed=None, rules=[twin]))

    start = "Its twin, trained without screening, came to no verdict. "

    assert compare(rule(0.0, 0.1), rule(0.2, 0.3)).startswith(f"{start}Better with screening: a figure.")
    assert compare(rule(0.2, 0.3), rule(0.0, 0.1)).startswith(f"{start}Worse with screening: a figure.")
    assert compare(rule(0.0, 0.2), rule(0.1, 0.3)).startswith(f"{start}Screening made no difference")
    assert compare(rule(0.8, 0.9, False), rule(0.6, 0.7, False)).startswith(f"{start}Better with screening: a figure.")


def test_the_gallery_is_filtered_by_what_its_cards_differ_in(opened: Any) -> None:
    from playwright.sync_api import expect

    cards = opened.locator(".card:visible")
    expect(cards).to_have_count(4)
    opened.locator("select[name=answer]").select_option("wrong")
    expect(cards).to_have_count(2)
    expect(opened.locator("#filter output")).to_have_text("2 of 4 shown")
    opened.locator("select[name=class]").select_option("normal")
    expect(cards).to_have_count(1)
    assert opened.locator(".group:visible").count() == 1
    opened.get_by_role("button", name="Show all").click()
    expect(cards).to_have_count(4)
    assert opened.locator("select[name=device]").count() == 0, "all cards are alike in it"


def test_a_picture_is_enlarged_with_its_words_and_the_arrows_go_on_among_those_shown(opened: Any) -> None:
    opened.locator("select[name=answer]").select_option("right")
    opened.locator(".card:visible .zoom").first.click()
    viewer = opened.locator("#viewer")
    assert viewer.is_visible()
    first = viewer.locator("p").inner_text()
    assert first.startswith("Image ") and "the map of the unscreened twin" in first
    opened.keyboard.press("ArrowRight")
    second = viewer.locator("p").inner_text()
    assert second != first
    opened.keyboard.press("ArrowRight")
    assert viewer.locator("p").inner_text() == first, "two are shown, so the third is the first again"
    assert viewer.locator("img").evaluate("image => image.naturalWidth") > 100
    opened.keyboard.press("Escape")
    assert not viewer.is_visible()


@pytest.mark.parametrize("width", [390, 768, 1300])
def test_the_report_fits_its_screen_without_scrolling_sideways(opened: Any, width: int) -> None:
    opened.set_viewport_size({"width": width, "height": 844})
    assert opened.evaluate("document.documentElement.scrollWidth") <= width


def test_on_paper_every_card_is_there_whatever_was_filtered(opened: Any) -> None:
    opened.locator("select[name=answer]").select_option("wrong")
    opened.emulate_media(media="print")
    assert opened.locator(".card:visible").count() == 4
    assert not opened.locator("#filter").is_visible()
