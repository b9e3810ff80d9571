"""The flows through a real Prefect engine, on the small sample and on small archives."""

import json
import re
import zipfile
from pathlib import Path

import numpy as np
import onnxruntime
import pandas as pd
import pytest
from PIL import Image

from flows.engine.command_line import read_flags, run_command
from tasks.files import sha256_of_file
from tasks.pixels.greys import to_float
from tasks.pixels.packed import PackedImages
from tasks.runs.manifest import MANIFEST_DTYPES, read_manifest
from tasks.runs.run import Run
from tasks.settings import Settings

pytestmark = pytest.mark.usefixtures("prefect_engine")

STAGES = [
    "audit",
    "calibrate",
    "check_prepared",
    "check_source",
    "evaluate",
    "explain",
    "fit",
    "ingest",
    "pack",
    "screen",
    "segment",
    "split",
]


def run_pipeline(flags: list[str], capfd: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of the command, in this process."""
    from flows.pipeline import pipeline

    capfd.readouterr()
    code = run_command(pipeline, flags, "test")
    shown = capfd.readouterr()
    return code, shown.out, shown.err


def test_a_run_leaves_every_file_that_the_design_names(finished_run: Path) -> None:
    for name in (
        "manifest.parquet",
        "excluded.csv",
        "checks/source/result.json",
        "checks/source/data_docs/index.html",
        "checks/prepared/result.json",
        "arrays/index.json",
        "model.keras",
        "model.sha256",
        "members/member_1.keras",
        "history.csv",
        "shifts.csv",
        "familiar.npz",
        "predictions.csv",
        "metrics.json",
        "masks/index.json",
        "lungs/index.json",
        "lungs/bounds.json",
        "lungs/implausible.json",
        "review/index.html",
        "audit.json",
        "report/index.html",
        "model_card.md",
        "run.json",
    ):
        assert (finished_run / name).stat().st_size > 0, name
    assert len(list((finished_run / "explanations").glob("*.png"))) == 4
    assert not list(finished_run.rglob("*.partial"))


def test_the_manifest_has_its_columns_in_their_types(finished_run: Path) -> None:
    manifest = read_manifest(finished_run)
    assert {name: str(dtype) for name, dtype in manifest.dtypes.items()} == MANIFEST_DTYPES
    assert len(manifest) == 60
    assert manifest["image_id"].str.fullmatch("[0-9a-f]{16}").all()
    assert manifest["device_score"].between(0, 1).all() and manifest["has_device"].notna().all()


def test_no_training_row_shows_a_device_or_may_show_one(finished_run: Path) -> None:
    manifest = read_manifest(finished_run)
    how = read_flags([], "test").screening
    train = manifest[(manifest["split"] == "train") & (manifest["excluded"] == "")]
    assert not train["has_device"].any()
    assert (train.loc[~train["device_reviewed"], "device_score"] < how.leaves_from).all()
    left = manifest[manifest["excluded"].str.contains("medical device")]
    assert len(left) > 0
    assert set(left["split"]) == {"train"}
    assert (left["has_device"] | (left["device_score"] >= how.leaves_from)).all()


def test_excluded_csv_repeats_the_manifest_for_people(finished_run: Path) -> None:
    manifest = read_manifest(finished_run)
    listed = pd.read_csv(finished_run / "excluded.csv")
    assert dict(zip(listed["path"], listed["reason"], strict=True)) == {
        path: reason for path, reason in zip(manifest["path"], manifest["excluded"], strict=True) if reason
    }


def test_metrics_follow_from_the_predictions(finished_run: Path) -> None:
    metrics = json.loads((finished_run / "metrics.json").read_text())
    predictions = pd.read_csv(finished_run / "predictions.csv")
    test = predictions[predictions["split"] == "test"]
    assert list(predictions.columns) == ["path", "split", "label", "subtype", "has_device", "probability", "bacteria"]
    assert metrics["test"]["n"] == len(test)
    decided = (test["probability"] >= metrics["threshold"]).astype(int)
    assert metrics["test"]["accuracy"]["value"] == pytest.approx((decided == test["label"]).mean(), abs=1e-4)
    assert metrics["test_device_free"]["n"] + metrics["test_with_device"]["n"] == len(test)
    assert metrics["test_with_device"]["n"] == test["has_device"].sum() > 0


def test_the_seal_says_what_made_the_run(finished_run: Path) -> None:
    seal = json.loads((finished_run / "run.json").read_text())
    assert seal["source"]["address"] == "sample"
    assert len(seal["source"]["sha256"]) == 64
    assert seal["settings"]["sample"]["n_images"] == 60
    assert seal["keras_backend"] == "tensorflow"
    assert sorted(seal["seconds"]) == STAGES
    assert seal["packages"]["prefect"]
    assert max(p.stat().st_mtime for p in finished_run.rglob("*")) == pytest.approx(
        (finished_run / "run.json").stat().st_mtime, abs=1
    )


def test_a_second_run_in_a_new_folder_does_nothing_again_and_says_so_in_log_and_states(
    finished_run: Path,
    small_flags: list[str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    code, out, _ = run_pipeline([*small_flags, "--run-dir", str(tmp_path / "again")], capfd)
    assert code == 0
    assert out.strip().splitlines()[-1] == str(tmp_path / "again" / "report" / "index.html")
    told = caplog.text.count("taken from the cache")
    assert told == len(STAGES)
    assert len(re.findall("Finished in state Cached", caplog.text)) == len(STAGES)
    assert re.search(r"Cached\('.*kind sample, n_clutter \d+, .*n_images 60", caplog.text), "the facts are the message"
    assert "shards" not in "".join(record.message for record in caplog.records if record.message.startswith("Created"))
    for name in ("manifest.parquet", "model.keras", "predictions.csv", "metrics.json"):
        assert sha256_of_file(tmp_path / "again" / name) == sha256_of_file(finished_run / name), name
    assert json.loads((tmp_path / "again" / "run.json").read_text())["reused"] == STAGES


def test_a_changed_setting_repeats_its_stage_and_no_earlier_one(
    finished_run: Path, small_flags: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = [*small_flags, "--run-dir", str(tmp_path), "--evaluation.n-bootstrap", "50", "--explanation.n-images", "1"]
    assert run_pipeline(flags, capfd)[0] == 0
    reused = json.loads((tmp_path / "run.json").read_text())["reused"]
    assert reused == [stage for stage in STAGES if stage not in ("evaluate", "explain", "audit")]


@pytest.mark.slow
def test_an_exported_network_gives_the_predictions_of_the_run_and_holds_its_threshold(
    finished_run: Path, small_flags: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_pipeline([*small_flags, "--run-dir", str(tmp_path), "--export", "onnx"], capfd)[0] == 0
    assert json.loads((tmp_path / "run.json").read_text())["reused"] == STAGES, "nothing else was done for it"
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    predictions = pd.read_csv(tmp_path / "predictions.csv").head(5)
    ids = read_manifest(tmp_path).set_index("path")["image_id"]
    settings = Settings.model_validate(json.loads((tmp_path / "run.json").read_text())["settings"])
    pixels = PackedImages(tmp_path, Path(settings.storage.cache)).read([ids[path] for path in predictions["path"]])
    found = session.run(["probability"], {"pixels": to_float(pixels)})[0][:, 0]
    np.testing.assert_allclose(found, predictions["probability"], atol=1e-4)
    told = session.get_modelmeta().custom_metadata_map
    assert float(told["threshold"]) == json.loads((tmp_path / "metrics.json").read_text())["threshold"]
    assert told["version"] == sha256_of_file(tmp_path / "model.keras")


@pytest.mark.slow
def test_evaluating_validation_alone_leaves_test_out_of_all_that_follows(
    finished_run: Path, small_flags: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = [*small_flags, "--run-dir", str(tmp_path), "--evaluation.splits", "val", "--explanation.n-images", "2"]
    assert run_pipeline(flags, capfd)[0] == 0
    assert set(pd.read_csv(tmp_path / "predictions.csv")["split"]) == {"val"}
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert {name: metrics[name]["n"] for name in ("test", "test_device_free", "test_with_device")} == {
        "test": 0,
        "test_device_free": 0,
        "test_with_device": 0,
    }
    explained = [json.loads(p.read_text())["split"] for p in (tmp_path / "explanations").glob("*.json")]
    assert explained == ["val", "val"]


@pytest.mark.slow
def test_the_twin_is_trained_explained_and_audited_beside_the_same_model(
    finished_run: Path, small_flags: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = [*small_flags, "--run-dir", str(tmp_path), "--auditing.compare-unfiltered", "true"]
    assert run_pipeline(flags, capfd)[0] == 0
    assert sha256_of_file(tmp_path / "model.keras") == sha256_of_file(finished_run / "model.keras")
    for name in ("unfiltered.keras", "unfiltered.sha256", "unfiltered/shifts.csv", "unfiltered/history.csv"):
        assert (tmp_path / name).stat().st_size > 0, name
    assert sha256_of_file(tmp_path / "unfiltered.keras") != sha256_of_file(tmp_path / "model.keras")
    facts = [
        json.loads((tmp_path / "stages" / f"{stage}.json").read_text())["facts"] for stage in ("fit", "fit_unfiltered")
    ]
    assert len({(fact["n_train"], fact["n_train_pneumonia"], fact["epochs"]) for fact in facts}) == 1
    audit = json.loads((tmp_path / "audit.json").read_text())
    assert all(set(audit[part]) == {"model", "unfiltered"} for part in ("insertion", "removal", "verdict", "groups"))
    explained = [json.loads(path.read_text()) for path in (tmp_path / "explanations").glob("*.json")]
    assert all(len(item["weights"]) == len(item["unfiltered"]["weights"]) for item in explained)
    assert Image.open(next((tmp_path / "explanations").glob("*.png"))).width == 976


def test_a_part_that_fail_on_names_ends_the_run_after_its_report_and_before_its_seal(
    finished_run: Path, small_flags: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # No network can be better than every baseline by 1.
    flags = [*small_flags, "--run-dir", str(tmp_path), "--auditing.min-gain", "1", "--auditing.min-images", "2"]
    code, _, err = run_pipeline([*flags, "--auditing.fail-on", "baselines,insertion"], capfd)
    assert code == 2
    assert "auditing.fail_on: the model failed baselines" in err.splitlines()[-1]
    assert (tmp_path / "report" / "index.html").exists()
    assert not (tmp_path / "run.json").exists()


def write_archive(path: Path, sample: Path, drop: str = "") -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(p for p in sample.rglob("*") if p.is_file()):
            name = file.relative_to(sample).as_posix()
            if not drop or drop not in name:
                archive.write(file, name)


def test_the_sample_as_a_zip_gives_the_manifest_of_the_folder(
    finished_run: Path, workspace: Path, small_flags: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from flows.prepare import prepare

    (sample,) = (p for p in (workspace / "raw").glob("sample-*/archive"))
    write_archive(tmp_path / "set.zip", sample)
    for source, run in ((tmp_path / "set.zip", "zip"), (sample, "folder")):
        prepare(read_flags([*small_flags, "--source", str(source), "--run-dir", str(tmp_path / run)], "test"))
        pd.testing.assert_frame_equal(read_manifest(tmp_path / run), read_manifest(finished_run))
    stage = json.loads((tmp_path / "zip" / "stages" / "ingest.json").read_text())["facts"]
    assert stage["archive_sha256"] == sha256_of_file(tmp_path / "set.zip")


@pytest.mark.usefixtures("finished_run")
@pytest.mark.parametrize("fault", ["truncated", "no zip", "class missing", "wrong checksum", "review contradicts"])
def test_bad_input_ends_in_one_sentence_with_code_2_and_leaves_nothing_half_written(
    fault: str, workspace: Path, small_flags: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (sample,) = (p for p in (workspace / "raw").glob("sample-*/archive"))
    archive, extra = tmp_path / "bad.zip", []
    write_archive(archive, sample, drop="test/NORMAL" if fault == "class missing" else "")
    if fault == "truncated":
        archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    if fault == "no zip":
        archive.write_text("not an archive")
    if fault == "wrong checksum":
        extra = ["--ingestion.sha256", "0" * 64]
    if fault == "review contradicts":
        path = pd.read_csv(sample / "chest_xray" / "device_review.csv")["path"][0]
        (tmp_path / "review.csv").write_text(f"path,device\n{path},0\n{path},1\n")
        extra = ["--screening.review", str(tmp_path / "review.csv")]
    run, raw = tmp_path / "run", tmp_path / "raw"
    flags = [*small_flags, "--source", str(archive), "--run-dir", str(run), "--storage.raw", str(raw), *extra]
    code, out, err = run_pipeline(flags, capfd)
    last = err.strip().splitlines()[-1]
    assert code == 2
    assert out == ""
    assert last.startswith("error: ")
    assert "bad.zip" in last or "review.csv" in last
    assert "Traceback" not in err
    assert not (run / "run.json").exists()
    if fault != "review contradicts":
        assert not [path for path in raw.rglob("*") if path.is_file()]
        assert not run.exists()


def test_a_critical_check_stops_the_flow_and_names_the_expectation(
    finished_run: Path, small_flags: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = [*small_flags, "--run-dir", str(tmp_path / "run"), "--quality.min-train-images", "1000"]
    code, _, err = run_pipeline(flags, capfd)
    assert code == 2
    assert "1000 or more usable images in train" in err.strip().splitlines()[-1]
    assert (tmp_path / "run" / "checks" / "source" / "summary.json").exists()
    assert not (tmp_path / "run" / "model.keras").exists()


def test_a_file_in_place_of_the_run_folder_is_refused_and_kept(
    small_flags: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").write_text("mine")
    code, _, err = run_pipeline([*small_flags, "--run-dir", str(tmp_path / "run")], capfd)
    assert code == 2
    assert "run_dir" in err.strip().splitlines()[-1]
    assert (tmp_path / "run").read_text() == "mine"


def test_probabilities_of_a_run_come_from_its_model_file(finished_run: Path) -> None:
    from tasks.networks.classifier import predict
    from tasks.networks.files import load_network

    predictions = pd.read_csv(finished_run / "predictions.csv").head(5)
    ids = read_manifest(finished_run).set_index("path")["image_id"]
    pixels = PackedImages(finished_run, finished_run.parent / "cache").read([ids[path] for path in predictions["path"]])
    np.testing.assert_allclose(predict(load_network(finished_run), pixels), predictions["probability"], atol=1e-5)


def test_a_run_of_unchanged_input_ends_early_in_a_state_that_says_nothing_new(
    finished_run: Path, small_flags: list[str], tmp_path: Path
) -> None:
    from flows.pipeline import pipeline

    flags = [*small_flags, "--ingestion.skip-unchanged", "true", "--run-dir", str(tmp_path / "run")]
    state = pipeline(read_flags(flags, "test"), return_state=True)
    assert (state.name, state.type.value) == ("Nothing new", "COMPLETED")
    earlier = Path(str(state.result())).parents[1]
    assert sha256_of_file(earlier / "predictions.csv") == sha256_of_file(finished_run / "predictions.csv")
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("finished_run")
def test_changed_settings_or_a_lost_run_count_as_news(small_flags: list[str]) -> None:
    from tasks.publishing.news import find_finished
    from tasks.sources.fetching import fetch_source

    same = read_flags(small_flags, "test")
    sha256 = fetch_source(same).sha256
    report = find_finished.fn(Run(same), sha256)
    assert report is not None
    assert find_finished.fn(Run(read_flags([*small_flags, "--training.epochs", "3"], "test")), sha256) is None
    seal = Path(report).parents[1] / "run.json"
    hidden = seal.rename(seal.with_suffix(".hidden"))
    try:
        assert find_finished.fn(Run(same), sha256) is None
    finally:
        hidden.rename(seal)


@pytest.mark.usefixtures("finished_run")
def test_when_images_join_only_they_are_packed_and_nobody_changes_split(
    workspace: Path, small_flags: list[str], tmp_path: Path
) -> None:
    import shutil

    from flows.prepare import prepare

    (sample,) = (p for p in (workspace / "raw").glob("sample-*/archive"))
    grown = tmp_path / "grown"
    shutil.copytree(sample, grown)
    rng = np.random.default_rng(0)
    for i in range(5):
        picture = Image.fromarray(rng.integers(0, 256, (90, 100), dtype=np.uint8))
        picture.save(grown / "chest_xray" / "train" / "PNEUMONIA" / f"person99{i}_virus_{i}.jpeg")
    for source, run in ((sample, "before"), (grown, "after")):
        prepare(read_flags([*small_flags, "--source", str(source), "--run-dir", str(tmp_path / run)], "test"))
    before, after = (read_manifest(tmp_path / run).set_index("path") for run in ("before", "after"))
    assert len(after) == len(before) + 5
    pd.testing.assert_series_equal(after.loc[before.index, "split"], before["split"])
    assert json.loads((tmp_path / "after" / "stages" / "pack.json").read_text())["facts"]["n_new"] == 5
