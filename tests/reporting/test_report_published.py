"""What the report says of the published model, and a run from weighing to publishing through the engine."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from report_run import HOSTILE, Page, build_run, compare_networks, make_answers, measure_again

from tasks.files import read_json, write_json
from tasks.publishing.published import publish, weigh
from tasks.records import Facts
from tasks.reporting.published import say_weighed
from tasks.reporting.report import gather_page, summarise_page, write_report
from tasks.runs.run import Run
from tasks.settings import AuditingSettings, PublishingSettings, Settings

GROUPS = ("val", "val_device_free")


def build_published_run(run: Path, model: str, enabled: bool = True, **aucs: float) -> Settings:
    """A finished run whose audit passed, with these AUCs where they are given; its settings."""
    run.parent.mkdir(exist_ok=True)
    build_run(run)
    measured = measure_again(run, make_answers())
    settings = compare_networks(run).model_copy(
        update={
            "evaluation": measured.evaluation,
            "publishing": PublishingSettings(enabled=enabled),
            "auditing": AuditingSettings(compare_unfiltered=True),
        }
    )
    metrics: Facts = read_json(run / "metrics.json")
    for name, auc in aucs.items():
        metrics[name]["auc"] = {"value": auc, "low": auc - 0.0123, "high": auc + 0.0123}
    write_json(run / "metrics.json", metrics)
    checks = read_json(run / "checks" / "prepared" / "summary.json")
    write_json(run / "checks" / "prepared" / "summary.json", [c for c in checks if c["success"] is not None])
    (run / "model.keras").write_text(model)
    write_json(run / "run.json", {"news": "none"})
    return settings


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is published, and a worse one with its report."""
    folder = tmp_path_factory.mktemp("folder") / "runs"
    publish.fn(Run(build_published_run(folder / "20260105T030000Z-set", "first", val=0.9512, val_device_free=0.9434)))
    worse = build_published_run(folder / "20260112T030000Z-set", "second", val=0.9123, val_device_free=0.9478)
    weigh.fn(Run(worse))
    write_report.fn(Run(worse))
    return folder


@pytest.fixture(scope="module")
def page(runs: Path) -> Page:
    return Page((runs / "20260112T030000Z-set" / "report" / "index.html").read_text())


def test_both_models_stand_side_by_side_with_intervals_and_what_was_decided(page: Page) -> None:
    start = page.text.index("Compared with the published model", page.text.index("With and without a device"))
    said = page.text[start : page.text.index("Single images, explained", start)]
    assert (
        "This model is not published: AUC on validation 0.9123 is below the published 0.9512 by more than "
        "publishing.max_drop 0.01. 20260105T030000Z-set stays published." in said
    )
    assert (
        "Figure This model Published model AUC, validation 0.912 0.900 to 0.925 60 images 0.951 0.939 to 0.964 60"
        in said
    )
    assert "AUC, validation without a device 0.948 0.935 to 0.960" in said
    runs = "Audit passed passed Run 20260112T030000Z-set 20260105T030000Z-set"
    assert re.search(rf"{runs} Published since not yet \d+ [A-Z][a-z]+ 20\d\d, \d\d:\d\d UTC", said)


def test_the_section_is_well_formed_and_can_be_reached(page: Page) -> None:
    assert (page.errors, page.open) == ([], [])
    assert len(page.all("table")) == len(page.all("caption"))
    assert {"href": "#published"} in page.all("a")
    sections = [a["id"] for a in page.all("section")]
    assert sections[sections.index("published") - 1] == "audit"


def test_nothing_is_said_of_publishing_where_it_is_off(tmp_path: Path) -> None:
    settings = build_published_run(tmp_path / "runs" / "run", "model", enabled=False)
    weigh.fn(Run(settings))
    made = Page(Path(write_report.fn(Run(settings))).read_text())
    assert "Compared with the published model" not in made.text and "#published" not in [
        a["href"] for a in made.all("a")
    ]


def test_the_first_model_stands_alone_and_the_artifact_says_what_becomes_of_it(tmp_path: Path) -> None:
    settings = build_published_run(tmp_path / "runs" / "run", "model", val=0.9, val_device_free=0.9)
    weigh.fn(Run(settings))
    says = "Nothing is published yet. This model passed the audit and will be published once its run is sealed."
    page = gather_page(Run(settings))
    assert says in summarise_page(page, "address")
    made = Page(Path(write_report.fn(Run(settings))).read_text())
    assert says in made.text and "Published model" not in made.text


def test_of_the_published_model_itself_is_said_that_it_is_and_what_now_speaks_against_it() -> None:
    same: Facts = {"decision": "same", "reasons": [], "notes": [], "published": {}, "this": {}, "max_drop": 0.01}
    assert say_weighed(same) == "This very model is already published."
    said = say_weighed(same | {"reasons": ["the audit failed (groups)"]})
    assert said.endswith("already published. It would not be published now: the audit failed (groups).")


def test_a_hostile_name_in_what_is_published_is_shown_as_text(tmp_path: Path) -> None:
    settings = build_published_run(tmp_path / "runs" / "run", "model")
    facts = weigh.fn(Run(settings))
    assert facts is not None
    other = {**facts["this"], "run": HOSTILE, "published": "2026-01-05T03:00:00+00:00"}
    write_json(tmp_path / "runs" / "run" / "publishing.json", facts | {"published": other, "notes": [HOSTILE]})
    html = Path(write_report.fn(Run(settings))).read_text()
    assert HOSTILE not in html and HOSTILE in Page(html).text


@pytest.fixture
def opened(browser: Any, runs: Path) -> Iterator[Any]:
    context = browser.new_context()
    tab = context.new_page()
    tab.goto((runs / "20260112T030000Z-set" / "report" / "index.html").as_uri())
    yield tab
    context.close()


@pytest.mark.parametrize("width", [390, 1300])
def test_the_table_fits_its_screen(opened: Any, width: int) -> None:
    opened.set_viewport_size({"width": width, "height": 844})
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    table = opened.locator("#published table")
    assert table.is_visible()
    room = opened.locator("#published .scroll")
    assert room.evaluate("part => part.scrollWidth") <= room.evaluate("part => part.clientWidth")


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_engine")
def test_through_the_engine_a_better_run_takes_over_and_a_worse_one_does_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    @flow(name="end of a run", log_prints=True)
    def end_run(settings: Settings) -> None:
        run = Run(settings)
        weigh(run)
        write_report(run)
        publish(run)

    runs = tmp_path / "runs"
    end_run(build_published_run(runs / "first", "first", val=0.9, val_device_free=0.9))
    end_run(build_published_run(runs / "worse", "worse", val=0.95, val_device_free=0.8))
    end_run(build_published_run(runs / "better", "better", val=0.95, val_device_free=0.9))
    published = read_json(runs / "published.json")
    assert (published["run"], [one["run"] for one in published["earlier"]]) == ("better", ["first"])
    assert "not to be published: AUC on validation without devices 0.8 is below the published 0.9" in caplog.text
    assert "to be published once sealed: it passed the audit" in caplog.text
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

    with get_client(sync_client=True) as client:
        named = ArtifactFilter(key=ArtifactFilterKey(any_=["published"]))
        shown = [str(one.data) for one in client.read_artifacts(artifact_filter=named)]
    assert len(shown) >= 3  # other tests of this session publish too
    assert any(text.startswith("published: better (AUC on validation 0.950") for text in shown)
