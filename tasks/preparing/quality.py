"""Check: Great Expectations suites over the manifest, at two checkpoints.

Reads ``manifest.parquet`` and, once they are packed, the pixels; writes ``checks/<checkpoint>/`` with ``summary.json``
(ours, for the report), ``result.json`` (Great Expectations' own) and ``data_docs/``. *source* runs after ingest and
checks the source's own splits; *prepared* runs after screening and checks the data for training and evaluation.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import pandas as pd

from tasks.errors import DataCheckError
from tasks.files import write_json
from tasks.pixels.looks import LOOKS, judge_looks
from tasks.preparing.groups import measure_association, name_groups
from tasks.records import GROUP_PREFIX, SPLITS, SUBTYPES, Facts
from tasks.runs.artifacts import show_table
from tasks.runs.manifest import hide_patients, key_pictures
from tasks.runs.run import Run
from tasks.runs.stages import STAGES_FOLDER, stage_task
from tasks.settings import QualitySettings

Checkpoint = Literal["source", "prepared"]
LOOKING = "no images are {}"
AT_ONCE = 256


@stage_task("check", task_run_name="check-{checkpoint}")
def check(run: Run, checkpoint: Checkpoint) -> Facts:
    """Runs a checkpoint; a critical failure stops the flow, a warning is shown.

    Raises:
        DataCheckError: If a critical expectation failed; the results are written to the run folder anyway.
    """
    listed = (run.folder / STAGES_FOLDER / "ingest.json").exists()
    own_patients = listed and run.facts("ingest")["patients"]["own"]

    def make(out: Path) -> Facts:
        looks = judge_images(run, run.manifest()["image_id"]) if checkpoint == "prepared" else {}
        facts = add_facts(run.manifest(), checkpoint, run.settings.quality, looks)
        checks = run_checkpoint(facts, checkpoint, run.settings.quality, out / "checks" / checkpoint, own_patients)
        write_json(out / "checks" / checkpoint / "summary.json", checks)
        return {"checks": checks}

    given = {
        "quality": run.settings.quality.model_dump(),
        "checkpoint": checkpoint,
        "own_patients": own_patients,
    }
    facts = run.stage(
        f"check_{checkpoint}",
        reads=["manifest.parquet", *(["arrays/index.json"] if checkpoint == "prepared" else [])],
        given=given,
        make=make,
        packages=("great-expectations",),
    )
    checks, manifest = facts["checks"], run.manifest()
    failed = [c for c in checks if c["success"] is False]
    unjudged = [c for c in checks if c["success"] is None]
    critical = [c for c in failed if c["severity"] == "critical"]
    shown = [{name: value for name, value in item.items() if name != "image_ids"} for item in checks]
    show_table(f"check {checkpoint}", shown, f"Data checks, checkpoint {checkpoint}")
    for item in failed:
        print(f"{item['severity']}: {describe_failure(item, manifest)}")
    for item in unjudged:
        print(f"not judged: {item['says']}: {item['reason']}")
    n_held = len(checks) - len(failed) - len(unjudged)
    print(
        f"checked {checkpoint}: {n_held} of {len(checks)} expectations hold"
        + (f", {len(unjudged)} cannot be judged" if unjudged else "")
    )
    if critical:
        raise DataCheckError(
            f"{run.settings.public_source}: {len(critical)} critical data check(s) failed at checkpoint {checkpoint}: "
            + "; ".join(describe_failure(item, manifest) for item in critical)
            + f" (see {run.folder / 'checks' / checkpoint}, bounds are the quality settings; "
            "manifest.parquet tells the file of an image)"
        )
    return facts


def describe_failure(item: Facts, manifest: pd.DataFrame) -> str:
    """One clause: what was expected, in how many rows it does not hold, and examples.

    Where somebody has to look at files, the examples are files, one for each reason why they are excluded.
    """
    examples = item["examples"]
    if item["severity"] == "critical" or item["says"] in map(LOOKING.format, LOOKS.values()):
        rows = manifest[manifest["image_id"].isin(item["image_ids"])].assign(why=manifest["excluded"].fillna(""))
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
    manifest: pd.DataFrame, checkpoint: Checkpoint, quality: QualitySettings, looks: Mapping[str, str]
) -> pd.DataFrame:
    """A plain table for the suites: the manifest with more columns for expectations across rows.

    At *source* the splits are the source's own, and there are no ``looks``. A share of the rows stands in those that
    make it up. ``n_of_class`` and ``n_classes`` count usable rows of the row's split;
    rows that are not usable keep missing values there, which expectations skip.
    """
    split = manifest["source_split"] if checkpoint == "source" else manifest["split"]
    excluded = manifest["excluded"].fillna("")
    usable = excluded == ""
    table = pd.DataFrame(
        {
            "image_id": manifest["image_id"].astype(object),
            "patient": name_patients(manifest).astype(object).where(manifest["patient_id"].notna(), None),
            "split": split.astype(object),
            "subtype": manifest["subtype"].astype(object),
            "label": manifest["label"].astype("float64"),
            "width_px": manifest["width_px"].astype("float64"),
            "height_px": manifest["height_px"].astype("float64"),
        }
    )
    table["subtype_fits"] = ((manifest["subtype"] == "normal") == (manifest["label"] == 0)).astype(float)
    groups = pd.DataFrame({"split": split, "label": manifest["label"], "patient": manifest["patient_id"]})[usable]
    table["usable_split"] = split.astype(object).where(usable, None)
    sizes = groups.groupby(["split", "label"])["label"].transform("size")
    table["n_of_class"] = sizes.astype("float64").reindex(table.index)
    table["n_wanted"] = [
        float(quality.min_train_images if s == "train" else quality.min_images) for s in split.fillna("")
    ]
    table["n_classes"] = groups.groupby("split")["label"].transform("nunique").astype("float64").reindex(table.index)
    picture = key_pictures(manifest)
    n_splits = groups.assign(picture=picture).groupby("picture")["split"].transform("nunique")
    table["n_splits_of_picture"] = n_splits.astype("float64").reindex(table.index)
    for other in ("val", "test"):
        pair = groups[groups["split"].isin(["train", other])]
        shared = pair.groupby("patient")["split"].transform("nunique")
        table[f"n_splits_train_{other}"] = shared.astype("float64").reindex(table.index)
    undecodable = excluded.str.startswith("undecodable")
    table["share_undecodable"] = undecodable.astype(float).mean() * undecodable.astype(float).where(undecodable)
    table["looks"] = manifest["image_id"].map(dict(looks)).astype(object)
    odd = table["looks"].isin(list(LOOKS))
    table["share_odd"] = odd.astype(float).mean() * odd.astype(float).where(odd)
    # Contradictions in test are not excluded, so reasons alone would miss them.
    decodable = manifest[~excluded.str.startswith("undecodable")]
    n_labels = decodable.groupby(picture[decodable.index])["label"].transform("nunique").reindex(table.index)
    table["contradicts"] = (excluded.str.startswith("conflict") | (n_labels > 1)).astype(float)
    device_in_train = usable & (split == "train") & manifest["has_device"].fillna(False).astype(bool)
    table["device_in_training"] = device_in_train.astype(float)
    training = usable & (split == "train")
    for group in name_groups(manifest):
        table[f"v_{group}"] = measure_association(manifest.loc[training, group], manifest.loc[training, "label"])
    return table


def describe_unknown(table: pd.DataFrame) -> dict[str, str]:
    """Why no patient can be missed between train and val, and train and test; no entry where all are known.

    Args:
        table: As from ``add_facts``.
    """
    reasons = {}
    for other in ("val", "test"):
        patients = table.loc[table["usable_split"].isin(["train", other]), "patient"]
        if n_unknown := int(patients.isna().sum()):
            reasons[other] = f"the patient of {n_unknown:,} of {len(patients):,} images is not known"
    return reasons


def build_suite(
    checkpoint: Checkpoint,
    quality: QualitySettings,
    own_patients: bool = False,
    unknown: Mapping[str, str] = MappingProxyType({}),
    groups: Sequence[str] = (),
) -> list[Any]:
    """The expectations of a checkpoint, each with its severity and, in ``meta``, a sentence for people.

    What nothing contradicts, but cannot be judged either, has the reason in ``meta``.

    Args:
        checkpoint: Which one.
        quality: The bounds.
        own_patients: One patient in both train and test is a leak; the public set uses numbers twice, for different
            children (see ``patients.Pattern``).
        unknown: As from ``describe_unknown``.
        groups: Names of the groups whose association with the class was measured.
    """
    import great_expectations.expectations as gxe

    def meant(says: str, severity: str = "critical", reason: str = "") -> dict[str, Any]:
        return {"severity": severity, "meta": {"says": says, "reason": reason}}

    suite = [
        gxe.ExpectColumnValuesToBeInSet(column="label", value_set=[0.0, 1.0], **meant("every label is 0 or 1")),
        gxe.ExpectColumnValuesToNotBeNull(column="label", **meant("every image has a label")),
        gxe.ExpectColumnValuesToBeInSet(
            column="split", value_set=list(SPLITS), **meant("every split is train, val or test")
        ),
        gxe.ExpectColumnValuesToNotBeNull(column="split", **meant("every image has a split")),
        gxe.ExpectColumnValuesToBeInSet(column="subtype", value_set=list(SUBTYPES), **meant("every subtype is known")),
        gxe.ExpectColumnValuesToBeInSet(column="subtype_fits", value_set=[1.0], **meant("label agrees with subtype")),
        gxe.ExpectColumnValuesToBeUnique(column="image_id", **meant("image ids are unique")),
        gxe.ExpectColumnValuesToBeBetween(
            column="n_splits_of_picture", max_value=1.0, **meant("no picture is in two splits")
        ),
        gxe.ExpectColumnValuesToBeBetween(
            column="n_classes", min_value=2.0, **meant("each split that exists has both classes")
        ),
        gxe.ExpectColumnPairValuesAToBeGreaterThanB(
            column_A="n_of_class",
            column_B="n_wanted",
            or_equal=True,
            ignore_row_if="either_value_is_missing",
            **meant(
                f"each class has {quality.min_train_images} or more usable images in train and {quality.min_images} in "
                "each other split"
            ),
        ),
        gxe.ExpectColumnValuesToBeBetween(
            column="share_undecodable",
            max_value=quality.max_undecodable,
            **meant(f"at most {100 * quality.max_undecodable:g} % of the files do not decode"),
        ),
        gxe.ExpectColumnValuesToBeInSet(
            column="contradicts", value_set=[0.0], **meant("equal pictures have one label", "warning")
        ),
        *(
            gxe.ExpectColumnValuesToBeBetween(
                column=f"{side}_px",
                min_value=float(quality.min_side_px),
                max_value=float(quality.max_side_px),
                **meant(f"{side} is {quality.min_side_px} to {quality.max_side_px:,} px", "warning"),
            )
            for side in ("width", "height")
        ),
        *(
            gxe.ExpectColumnValuesToBeBetween(
                column=f"v_{GROUP_PREFIX}{group}",
                max_value=quality.max_association,
                **meant(
                    f"{group} and class are associated by at most {quality.max_association:g} (Cramér's V) in train",
                    "warning",
                ),
            )
            for group in groups
        ),
    ]
    if checkpoint == "prepared":
        suite += [
            gxe.ExpectColumnDistinctValuesToContainSet(
                column="usable_split", value_set=["train", "val"], **meant("train and val have usable images")
            ),
            gxe.ExpectColumnValuesToBeBetween(
                column="n_splits_train_val",
                max_value=1.0,
                **meant("no patient is in both train and val", reason=unknown.get("val", "")),
            ),
            gxe.ExpectColumnValuesToBeBetween(
                column="n_splits_train_test",
                max_value=1.0,
                **meant(
                    f"no patient is in both train and test{'' if own_patients else ' (the public set uses ids twice)'}",
                    "critical" if own_patients else "warning",
                    unknown.get("test", ""),
                ),
            ),
            *(
                gxe.ExpectColumnValuesToNotBeInSet(
                    column="looks", value_set=[look], **meant(LOOKING.format(says), "warning")
                )
                for look, says in LOOKS.items()
            ),
            gxe.ExpectColumnValuesToBeBetween(
                column="share_odd",
                max_value=quality.max_odd,
                **meant(f"at most {100 * quality.max_odd:g} % of the images are flat, saturated or inverted"),
            ),
            gxe.ExpectColumnValuesToBeInSet(
                column="device_in_training", value_set=[0.0], **meant("no training image is known to show a device")
            ),
        ]
    return suite


def run_checkpoint(
    table: pd.DataFrame, checkpoint: Checkpoint, quality: QualitySettings, out: Path, own_patients: bool = False
) -> list[Facts]:
    """Runs a suite with Great Expectations; writes ``result.json`` and ``data_docs/`` into ``out``.

    Returns:
        A row per expectation: ``says, severity, success, reason, n, n_unexpected, examples`` (up to three),
        ``image_ids``. Where it cannot be judged, ``success`` is ``None`` and ``reason`` says why.
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
    groups = [name.removeprefix(f"v_{GROUP_PREFIX}") for name in table if name.startswith(f"v_{GROUP_PREFIX}")]
    expectations = build_suite(checkpoint, quality, own_patients, describe_unknown(table), groups)
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
    examples = [
        f"image {row.get('image_id')}" + (f" of {row['patient']}" if row.get("patient") else "") for row in rows
    ]
    meta = item.expectation_config.meta
    broken = (item.exception_info or {}).get("raised_exception", False)
    return {
        "says": meta["says"] + (" (could not be evaluated)" if broken else ""),
        "severity": str(getattr(item.expectation_config.severity, "value", item.expectation_config.severity)),
        "success": None if item.success and meta["reason"] else bool(item.success),
        "reason": meta["reason"],
        "n": int(details.get("element_count") or n),
        "n_unexpected": 0 if item.success else int(details.get("unexpected_count") or 1),
        "examples": list(dict.fromkeys(examples))[:3],
        "image_ids": [row.get("image_id") for row in rows],
    }


def name_patients(manifest: pd.DataFrame) -> "pd.Series[str]":
    """The pseudonyms of the patients of a manifest: ``hide_patients`` of its ``patient_id`` and ``sha256``."""
    return hide_patients(manifest["patient_id"], manifest["sha256"])
