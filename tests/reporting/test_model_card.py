"""The model card: what it says of a run, no more than the run knows, and that what it quotes stays text."""

import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from report_run import HOSTILE, build_metrics, build_run, group, make_answers, measure_again, settings_for, value

from tasks.errors import RunError
from tasks.files import read_json, write_json
from tasks.findings import Metrics
from tasks.reporting.model_card import CARD, escape_markdown, find_failures, gather_card, render_card, write_card
from tasks.runs.manifest import read_manifest, write_manifest
from tasks.runs.run import Run
from tasks.settings import Settings, TrainingSettings


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The card of a run of two networks with hostile names."""
    run = tmp_path_factory.mktemp("runs") / "my_run"
    build_run(run)
    return Path(write_card.fn(Run(settings_for(run)))).read_text()


def card_of(settings: Settings) -> str:
    return render_card(gather_card(Run(settings)))


def odd_card(tmp_path: Path, table: pd.DataFrame, n_members: int = 2, **more: Any) -> str:
    """The card of a run whose answers are made up, checked for what no card may have."""
    build_run(tmp_path)
    text = card_of(measure_again(tmp_path, table, n_members, **more))
    assert not re.search(r"\b(NaN|nan|None|null|NA|Undefined|inf)\b", text)
    return text


def test_the_card_lies_in_the_run_folder(tmp_path: Path) -> None:
    build_run(tmp_path)
    assert write_card.fn(Run(settings_for(tmp_path))) == str(tmp_path / CARD)
    assert (tmp_path / "model_card.md").read_text().startswith("# Model card: ")


def test_that_it_is_not_for_clinical_use_comes_before_any_number(card: str) -> None:
    assert card.index("not for clinical use") < card.index("AUC 0.973")


def test_headings_come_in_order_and_tables_are_whole(card: str) -> None:
    assert re.findall(r"^#+ (.+)$", card, re.MULTILINE)[1:] == [
        "Intended use",
        "Data",
        "Network and training",
        "How good it is",
        "Known failures and limits",
        "Made by",
    ]
    for block in re.findall(r"(?:^\|.*\n)+", card, re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1, block
    assert not re.search(r"\n{3,}", card)


def test_hostile_names_are_text(card: str) -> None:
    assert HOSTILE not in card and "<script" not in card
    assert "&lt;script&gt;alert" in card
    assert "Model card: my\\_run" in card


@pytest.mark.parametrize("hostile", ["a|b", "`x`", "[a](b)", "*a*", "_a_", "~~a~~", "$a$", "\\"])
def test_each_sign_with_a_meaning_in_markdown_is_escaped(hostile: str) -> None:
    assert re.sub(r"\\(.)", r"\1", escape_markdown(hostile)) == hostile
    assert not re.search(r"(?<!\\)(?:\\\\)*[`*_\[\]|~$]", escape_markdown(hostile))


def test_a_value_stays_on_its_line_and_brings_no_markup() -> None:
    assert escape_markdown("a\n\n# b <i>") == "a # b &lt;i&gt;"


def test_names_of_files_and_patients_stay_out(card: str) -> None:
    assert ".jpeg" not in card and "person77" not in card


def test_settings_that_name_files_are_told_without_their_folder(tmp_path: Path) -> None:
    build_run(tmp_path)
    training = TrainingSettings(epochs=3, backbone="MobileNetV3Small", weights="/home/someone/my.weights.h5")
    text = card_of(settings_for(tmp_path, training=training))
    assert "`training.epochs` 3" in text and "`training.weights` my.weights.h5" in text
    assert "someone" not in text


def test_data_are_told_by_counts_reasons_and_checksum(card: str) -> None:
    assert "24 image files, 23 of them distinct" in card and "ab" * 32 in card
    assert "| Validation | 4 (4) | 4 (3) |" in card, "of one image the patient is unknown"
    assert "- 1: Identical copy of an image that is kept" in card


def test_images_read_by_people_are_counted(tmp_path: Path) -> None:
    build_run(tmp_path)
    assert "All images were screened by another network" in card_of(settings_for(tmp_path))
    manifest = read_manifest(tmp_path)
    write_manifest(tmp_path, manifest.assign(device_reviewed=[True] * 5 + [False] * (len(manifest) - 5)))
    assert "People read 5 images for devices; the others were screened" in card_of(settings_for(tmp_path))


def test_only_a_drawn_sample_is_called_drawn(tmp_path: Path, card: str) -> None:
    assert "drawings" not in card
    build_run(tmp_path)
    stage = read_json(tmp_path / "stages" / "ingest.json")
    stage["facts"]["kind"] = "sample"
    write_json(tmp_path / "stages" / "ingest.json", stage)
    assert "These images are drawings; no patient is behind them" in card_of(settings_for(tmp_path))


def test_groups_are_told_with_intervals_at_both_thresholds(card: str) -> None:
    assert "**Balanced** (0.412)" in card and "**High sensitivity** (0.213)" in card
    assert (
        "| Test, all images | 8 (40) | 0.973 (0.963 to 0.983) | 0.946 (0.936 to 0.956) | 0.876 (0.867 to 0.886) | "
        "0.987 (0.977 to 0.997) | 0.765 (0.755 to 0.775) |"
    ) in card
    assert "| Validation, no device seen | 6 (5) † |" in card
    assert "| Test, with a device | 0 | not measured: no image was screened |" in card


def test_what_is_known_with_and_without_lungs_is_told_in_a_line(card: str) -> None:
    assert "AUC 0.953 (0.943 to 0.963) where nothing but the lungs is left, 0.614 (0.604 to 0.624) where they" in card
    metrics = build_metrics()
    del metrics["lungs_only"], metrics["lungs_removed"]
    assert Metrics(**metrics).lungs_only["reason"] == "it was not measured", "an older run"


def test_calibration_shifts_border_and_seeds_are_told(card: str) -> None:
    assert "expected calibration error test 0.047 (0.037 to 0.057); validation 0.036" in card
    assert "AUC 0.880 as they are, at worst 0.730 (border of the other class)" in card
    assert "AUC on it alone 0.591 (0.581 to 0.601)" in card
    assert "means of the 2 networks alone, test AUC 0.940 (SD 0.014)" in card


def test_versions_seed_commit_and_checksum_are_told(card: str) -> None:
    assert "ef" * 32 in card and "Seed 7." in card and "Keras backend tensorflow" in card and "prefect 3." in card


def test_the_weakest_group_of_each_measure_is_a_known_failure() -> None:
    metrics = build_metrics()
    metrics["test_with_device"] = group(5, 0.8, patients=3) | {"specificity": value(0.3)}
    said = find_failures(Metrics(**metrics), ["test", "val"], "test")
    assert (
        "The group with the lowest specificity is “Test, with a device” (5 images): 0.300 (0.290 to 0.310); on all "
        "test images it is 0.876 (0.867 to 0.886)."
    ) in said
    assert any("lowest sensitivity is “Test, virus” (4 images): 0.932" in sentence for sentence in said)


def test_what_falls_from_validation_to_test_beyond_both_intervals_is_a_known_failure() -> None:
    metrics = build_metrics()
    metrics["test"] |= {"specificity": value(0.55)}
    said = find_failures(Metrics(**metrics), ["test", "val"], "test")
    assert [s for s in said if s.startswith("What was found on validation")] == [
        "What was found on validation does not carry over to test: specificity 0.876 (0.867 to 0.886) on validation, "
        "0.550 (0.540 to 0.560) on test."
    ]


def test_the_worst_shift_and_a_border_that_tells_something_are_known_failures() -> None:
    said = find_failures(Metrics(**build_metrics()), ["test", "val"], "test")
    assert (
        "Under the change “border of the other class”, AUC on validation is 0.730 (0.720 to 0.740) instead of 0.880."
        in said
    )
    assert "The network reads something off the border: AUC 0.591 (0.581 to 0.601) on the border alone." in said
    metrics = build_metrics() | {"border_only": {"value": 0.51, "low": 0.45, "high": 0.57}}
    assert not any(
        "border alone" in sentence for sentence in find_failures(Metrics(**metrics), ["test", "val"], "test")
    )


def test_what_is_never_known_is_said(card: str) -> None:
    assert "whether a clinician agrees with them, or with the answers, is not known" in card
    assert "All images come from one source" in card
    assert "Of 3 images the patient is not known" in card
    assert "Groups marked † hold fewer than 30 patients" in card


def test_a_run_without_a_test_split_has_a_card(tmp_path: Path) -> None:
    text = odd_card(tmp_path, make_answers(splits=("val",)))
    assert "There is no test image to measure on: all figures are of validation and optimistic." in text


def test_a_run_that_leaves_test_unread_has_a_card(tmp_path: Path) -> None:
    text = odd_card(tmp_path, make_answers(), splits=("val",))
    assert "Test images were left unread by the settings" in text
    assert "| Test, all images" not in text


def test_a_test_split_of_one_class_has_a_card_with_reasons(tmp_path: Path) -> None:
    table = make_answers()
    text = odd_card(tmp_path, table[(table["split"] == "val") | (table["label"] == 1)])
    assert "not measured: a class is missing in this group" in text
    assert "test images: What the border alone tells the network is not known: a class is missing" in text


def test_a_run_of_one_network_has_a_card_without_a_spread(tmp_path: Path) -> None:
    text = odd_card(tmp_path, make_answers(), n_members=1)
    assert "- One network; 1,234 weights in all, trained from scratch" in text
    assert "what another seed would have given is not known" in text


def test_a_run_whose_subtypes_nobody_knows_has_a_card(tmp_path: Path) -> None:
    build_run(tmp_path)
    write_manifest(tmp_path, read_manifest(tmp_path).assign(subtype="unknown"))
    text = card_of(measure_again(tmp_path, make_answers().assign(subtype="unknown")))
    assert "Of 12 pneumonia images it is not known whether bacteria or a virus are the cause." in text
    assert "| Test, bacteria | 0 | not measured: no image is in this group |" in text


def test_a_run_folder_without_metrics_is_refused_by_name(tmp_path: Path) -> None:
    build_run(tmp_path)
    (tmp_path / "metrics.json").unlink()
    with pytest.raises(RunError, match=r"metrics\.json is missing"):
        write_card.fn(Run(settings_for(tmp_path)))
