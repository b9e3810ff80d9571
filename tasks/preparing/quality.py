"""Check: Great Expectations suites over the manifest, at two checkpoints.

Reads ``manifest.parquet`` and, once they are packed, the pixels and which images show no lungs; writes
``checks/<checkpoint>/`` with ``summary.json`` (ours, for the report), ``result.json`` (Great Expectations' own) and
``data_docs/``. *source* runs after ingest and checks the source's own splits; *prepared* runs after screening and
checks the data for training and evaluation.
"""

import json
import logging
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from tasks.errors import DataCheckError
from tasks.files import read_record, write_json
from tasks.pixels.looks import LOOKS, judge_looks
from tasks.pixels.masks import IMPLAUSIBLE
from tasks.preparing.groups import measure_association
from tasks.records import GROUP_PREFIX, SPLITS, SUBTYPES, Facts, group_columns
from tasks.runs.artifacts import show_table
from tasks.runs.manifest import hide_patients, key_pictures
from tasks.runs.run import Run
from tasks.runs.stages import STAGES_FOLDER, stage_task
from tasks.settings import QualitySettings

LOOKING = "no images are {}"
LUNGS = "every image shows two plausible lungs"
Checkpoint = Literal["source", "prepared"]
AT_ONCE = 256
MANY_IMAGES, MUCH = 30, 0.1
"""More images than one child of the public set has, and this share of a source, are rather a word that is none."""
BETWEEN, AMONG, FILLED = "ColumnValuesToBeBetween", "ColumnValuesToBeInSet", "ColumnValuesToNotBeNull"


@stage_task("check", task_run_name="check-{checkpoint}")
def check(run: Run, checkpoint: Checkpoint) -> Facts:
    """Runs a checkpoint; a critical failure stops the flow, a warning is shown.

    Raises:
        DataCheckError: If a critical expectation failed; the results are written to the run folder anyway.
    """
    listed = (run.folder / STAGES_FOLDER / "ingest.json").exists()
    own_patients = listed and run.facts("ingest")["patients"]["own"]

    def make(out: Path) -> Facts:
        manifest = run.manifest()
        looks = judge_images(run, manifest["image_id"]) if checkpoint == "prepared" else {}
        lungless = read_record(run.folder / IMPLAUSIBLE) if checkpoint == "prepared" else {}
        facts = add_facts(manifest, checkpoint, run.settings.quality, looks, lungless)
        checks = run_checkpoint(facts, checkpoint, run.settings.quality, out / "checks" / checkpoint, own_patients)
        write_json(out / "checks" / checkpoint / "summary.json", checks)
        return {"checks": checks}

    quality = run.settings.quality.model_dump()
    facts = run.stage(
        f"check_{checkpoint}",
        reads=["manifest.parquet", *(["arrays/index.json", IMPLAUSIBLE] if checkpoint == "prepared" else [])],
        given={"quality": quality, "checkpoint": checkpoint, "own_patients": own_patients},
        make=make,
        packages=("great-expectations",),
    )
    if critical := show_checks(facts["checks"], checkpoint, run.manifest()):
        raise DataCheckError(
            f"{run.settings.public_source}: {len(critical)} critical data check(s) failed at checkpoint {checkpoint}: "
            f"{'; '.join(critical)} (see {run.folder / 'checks' / checkpoint}, bounds are the quality settings)"
        )
    return facts


def show_checks(checks: Sequence[Facts], checkpoint: Checkpoint, manifest: pd.DataFrame) -> list[str]:
    """Shows the results of a checkpoint; returns a clause for each critical failure."""
    shown = [{name: value for name, value in item.items() if name != "image_ids"} for item in checks]
    show_table(f"check {checkpoint}", shown, f"Data checks, checkpoint {checkpoint}")
    critical = []
    for item in checks:
        if item["success"] is False:
            failure = describe_failure(item, manifest)
            print(f"{item['severity']}: {failure}")
            if item["severity"] == "critical":
                critical.append(failure)
        if item["success"] is None:
            print(f"not judged: {item['says']}: {item['reason']}")
    n_held, n_unjudged = (sum(item["success"] is success for item in checks) for success in (True, None))
    unjudged = f", {n_unjudged} cannot be judged" if n_unjudged else ""
    print(f"checked {checkpoint}: {n_held} of {len(checks)} expectations hold{unjudged}")
    return critical


def describe_failure(item: Facts, manifest: pd.DataFrame) -> str:
    """One clause: what was expected, in how many rows it does not hold, and examples.

    Where somebody has to look at files, the examples are files, one for each reason of exclusion; a log keeps else to
    ids, since names of files may name patients.
    """
    rows = manifest[manifest["image_id"].isin(item["image_ids"])]
    rows = rows.assign(why=rows["excluded"].fillna(""))
    if item["severity"] == "warning" and item["says"] not in (LUNGS, *map(LOOKING.format, LOOKS.values())):
        rows = rows.assign(path="image " + rows["image_id"], why="")
    rows = pd.concat([rows.drop_duplicates("why"), rows]).drop_duplicates("path").head(3)
    examples = [f"{path} ({why})" if why else path for path, why in zip(rows["path"], rows["why"], strict=True)]
    named = f", such as {', '.join(examples)}" if examples else ""
    return f"{item['says']} fails in {item['n_unexpected']:,} of {item['n']:,} rows{named}"


def judge_images(run: Run, image_ids: Sequence[str]) -> dict[str, str]:
    """What is wrong with the pixels of each packed image (``judge_looks``)."""
    images = run.images()
    packed = [image_id for image_id in image_ids if image_id in images]
    parts = [packed[start : start + AT_ONCE] for start in range(0, len(packed), AT_ONCE)]
    return {name: look for part in parts for name, look in zip(part, judge_looks(images.read(part)), strict=True)}


def add_facts(
    manifest: pd.DataFrame,
    checkpoint: Checkpoint,
    quality: QualitySettings,
    looks: Mapping[str, str],
    lungless: Collection[str] = (),
) -> pd.DataFrame:
    """A plain table for the suites: the manifest with more columns for expectations across rows.

    At *source* the splits are the source's own, and there are no ``looks`` of packed images, nor any of them that are
    ``lungless``. A share of the rows stands in those that
    make it up. ``n_of_class`` and ``n_classes`` count usable rows of the row's split;
    rows that are not usable keep missing values there, which expectations skip.
    """
    split = manifest["source_split"] if checkpoint == "source" else manifest["split"]
    excluded = manifest["excluded"].fillna("")
    usable, undecodable = excluded == "", excluded.str.startswith("undecodable")

    def aligned(values: "pd.Series[Any]") -> "pd.Series[float]":
        return values.astype("float64").reindex(manifest.index)

    def share(rows: "pd.Series[bool]") -> "pd.Series[float]":
        return rows.astype(float).mean() * rows.astype(float).where(rows)

    table = pd.DataFrame(
        {
            "image_id": manifest["image_id"].astype(object),
            "patient": name_patients(manifest).astype(object).where(manifest["patient_id"].notna(), None),
            "split": split.astype(object),
            "usable_split": split.astype(object).where(usable, None),
            "subtype": manifest["subtype"].astype(object),
            "subtype_fits": ((manifest["subtype"] == "normal") == (manifest["label"] == 0)).astype(float),
            **{name: manifest[name].astype("float64") for name in ("label", "width_px", "height_px")},
            "share_undecodable": share(undecodable),
            "looks": manifest["image_id"].map(dict(looks)).astype(object),
        }
    )
    table["lungless"] = manifest["image_id"].map({name: float(name in lungless) for name in looks})
    table["share_odd"] = share(table["looks"].isin(list(LOOKS)))
    picture = key_pictures(manifest)
    groups = pd.DataFrame({"split": split, "label": manifest["label"], "patient": manifest["patient_id"]})[usable]
    table["n_of_class"] = aligned(groups.groupby(["split", "label"])["label"].transform("size"))
    table["n_of_patient"] = aligned(manifest.groupby("patient_id")["patient_id"].transform("size"))
    n_wanted = split.eq("train").fillna(False).map({True: quality.min_train_images, False: quality.min_images})
    table["n_lacking"] = n_wanted - table["n_of_class"]
    table["n_classes"] = aligned(groups.groupby("split")["label"].transform("nunique"))
    table["n_splits_of_picture"] = aligned(groups.groupby(picture[usable])["split"].transform("nunique"))
    for other in ("val", "test"):
        pair = groups[groups["split"].isin(["train", other])]
        table[f"n_splits_train_{other}"] = aligned(pair.groupby("patient")["split"].transform("nunique"))
    # Contradictions in test are not excluded, so reasons alone would miss them.
    n_labels = aligned(manifest[~undecodable].groupby(picture[~undecodable])["label"].transform("nunique"))
    table["contradicts"] = (excluded.str.startswith("conflict") | (n_labels > 1)).astype(float)
    training = usable & (split == "train")
    table["device_in_training"] = (training & manifest["has_device"].fillna(False).astype(bool)).astype(float)
    for group in group_columns(manifest):
        table[f"v_{group}"] = measure_association(manifest.loc[training, group], manifest.loc[training, "label"])
    return table


def describe_unknown(table: pd.DataFrame, other: str) -> str:
    """Why it cannot be judged that no patient is in train and another split; empty where all are known."""
    patients = table.loc[table["usable_split"].isin(["train", other]), "patient"]
    n_unknown = int(patients.isna().sum())
    return f"the patient of {n_unknown:,} of {len(patients):,} images is not known" if n_unknown else ""


def build_suite(
    table: pd.DataFrame, checkpoint: Checkpoint, quality: QualitySettings, own_patients: bool = False
) -> list[Any]:
    """The expectations of a checkpoint (``expect``).

    Args:
        table: As from ``add_facts``.
        checkpoint: Which one.
        quality: The bounds.
        own_patients: One patient in both train and test is a leak; the public set uses numbers twice, for different
            children (see ``patients.Pattern``).
    """
    enough = f"{quality.min_train_images} or more usable images in train and {quality.min_images} in each other split"
    sides: Facts = {"min_value": float(quality.min_side_px), "max_value": float(quality.max_side_px)}
    px = f"{quality.min_side_px} to {quality.max_side_px:,} px"
    decoding = f"at most {100 * quality.max_undecodable:g} % of the files are refused or do not decode"
    apart = f"and class are associated by at most {quality.max_association:g} (Cramér's V) in train"
    many = max(MANY_IMAGES, int(MUCH * len(table)))
    groups = [name for name in table if name.startswith(f"v_{GROUP_PREFIX}")]
    suite = [
        expect(AMONG, "label", "every label is 0 or 1", value_set=[0.0, 1.0]),
        expect(FILLED, "label", "every image has a label"),
        expect(AMONG, "split", "every split is train, val or test", value_set=list(SPLITS)),
        expect(FILLED, "split", "every image has a split"),
        expect(AMONG, "subtype", "every subtype is known", value_set=list(SUBTYPES)),
        expect(AMONG, "subtype_fits", "label agrees with subtype", value_set=[1.0]),
        expect("ColumnValuesToBeUnique", "image_id", "image ids are unique"),
        expect(BETWEEN, "n_splits_of_picture", "no picture is in two splits", max_value=1.0),
        expect(BETWEEN, "n_classes", "each split that exists has both classes", min_value=2.0),
        expect(BETWEEN, "n_lacking", f"each class has {enough}", max_value=0.0),
        expect(BETWEEN, "share_undecodable", decoding, max_value=quality.max_undecodable),
        warn(BETWEEN, "n_of_patient", f"no patient has more than {many:,} images", max_value=float(many)),
        warn(AMONG, "contradicts", "equal pictures have one label", value_set=[0.0]),
        *(warn(BETWEEN, f"{side}_px", f"{side} is {px}", **sides) for side in ("width", "height")),
        *(
            warn(BETWEEN, v, f"{v.removeprefix(f'v_{GROUP_PREFIX}')} {apart}", max_value=quality.max_association)
            for v in groups
        ),
    ]
    return suite if checkpoint == "source" else suite + _prepared_suite(table, quality, own_patients)


def _prepared_suite(table: pd.DataFrame, quality: QualitySettings, own_patients: bool) -> list[Any]:
    """The expectations of the prepared data alone."""
    unknown = {other: describe_unknown(table, other) for other in ("val", "test")}
    odd = f"at most {100 * quality.max_odd:g} % of the images are flat, saturated or inverted"
    return [
        expect(
            "ColumnDistinctValuesToContainSet",
            "usable_split",
            "train and val have usable images",
            value_set=["train", "val"],
        ),
        expect(
            BETWEEN, "n_splits_train_val", "no patient is in both train and val", max_value=1.0, reason=unknown["val"]
        ),
        expect(
            BETWEEN,
            "n_splits_train_test",
            "no patient is in both train and test" + ("" if own_patients else " (the public set uses ids twice)"),
            severity="critical" if own_patients else "warning",
            reason=unknown["test"],
            max_value=1.0,
        ),
        *(
            warn("ColumnValuesToNotBeInSet", "looks", LOOKING.format(says), value_set=[look])
            for look, says in LOOKS.items()
        ),
        expect(BETWEEN, "share_odd", odd, max_value=quality.max_odd),
        warn(AMONG, "lungless", LUNGS, value_set=[0.0]),
        expect(AMONG, "device_in_training", "no training image is known to show a device", value_set=[0.0]),
    ]


def expect(kind: str, column: str, says: str, *, severity: str = "critical", reason: str = "", **bounds: Any) -> Any:
    """An expectation by its name in Great Expectations, with its severity and, in ``meta``, a sentence for people.

    What nothing contradicts, but cannot be judged either, has the reason in ``meta``.
    """
    import great_expectations.expectations as gxe

    meta = {"says": says, "reason": reason}
    return getattr(gxe, f"Expect{kind}")(column=column, severity=severity, meta=meta, **bounds)


warn = partial(expect, severity="warning")


def run_checkpoint(
    table: pd.DataFrame, checkpoint: Checkpoint, quality: QualitySettings, out: Path, own_patients: bool = False
) -> list[Facts]:
    """Runs a suite with Great Expectations; writes ``result.json`` and ``data_docs/`` into ``out``.

    Returns:
        A row per expectation: ``says, severity, success, reason, n, n_unexpected, image_ids`` (the first 20). Where it
        cannot be judged, ``success`` is ``None`` and ``reason`` says why.
    """
    import great_expectations as gx

    logging.getLogger("great_expectations.data_context.types.base").setLevel(logging.WARNING)  # temporary folders
    out.mkdir(parents=True, exist_ok=True)
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False, "metric_calculations": False}
    context.delete_data_docs_site("local_site")
    context.add_data_docs_site(
        site_name="run",
        site_config={
            "class_name": "SiteBuilder",
            "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
            "store_backend": {
                "class_name": "TupleFilesystemStoreBackend",
                "base_directory": str((out / "data_docs").resolve()),
            },
        },
    )
    asset = context.data_sources.add_pandas("manifest").add_dataframe_asset("images")
    expectations = build_suite(table, checkpoint, quality, own_patients)
    suite = context.suites.add(gx.ExpectationSuite(name=checkpoint, expectations=expectations))
    definition = context.validation_definitions.add(
        gx.ValidationDefinition(name=checkpoint, data=asset.add_batch_definition_whole_dataframe("all"), suite=suite)
    )
    run = context.checkpoints.add(
        gx.Checkpoint(
            name=checkpoint,
            validation_definitions=[definition],
            actions=[gx.checkpoint.UpdateDataDocsAction(name="data_docs", site_names=["run"])],
            result_format={"result_format": "SUMMARY", "unexpected_index_column_names": ["image_id", "patient"]},
        )
    )
    (result,) = run.run(batch_parameters={"dataframe": table}).run_results.values()
    finite = json.loads(json.dumps(result.to_json_dict(), default=str), parse_constant=lambda _: None)
    write_json(out / "result.json", finite)
    return [summarise_checks(item, len(table)) for item in result.results]


def summarise_checks(item: Any, n: int) -> Facts:
    """One expectation's result, for people."""
    details = item.result or {}
    rows = details.get("partial_unexpected_index_list") or []
    meta = item.expectation_config.meta
    broken = (item.exception_info or {}).get("raised_exception", False)
    return {
        "says": meta["says"] + (" (could not be evaluated)" if broken else ""),
        "severity": str(getattr(item.expectation_config.severity, "value", item.expectation_config.severity)),
        "success": None if item.success and meta["reason"] else bool(item.success),
        "reason": meta["reason"],
        "n": int(details.get("element_count") or n),
        "n_unexpected": 0 if item.success else int(details.get("unexpected_count") or 1),
        "image_ids": [row.get("image_id") for row in rows],
    }


def name_patients(manifest: pd.DataFrame) -> "pd.Series[str]":
    """The pseudonyms of the patients of a manifest: ``hide_patients`` of its ``patient_id`` and ``sha256``."""
    return hide_patients(manifest["patient_id"], manifest["sha256"])
