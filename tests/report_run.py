"""A finished run folder made by hand, with hostile names, for the report and the model card."""

import hashlib
import json
from collections.abc import Callable
from functools import lru_cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from tasks.explaining.auditing import audit_networks
from tasks.explaining.baselines import ask_baselines, ask_shape
from tasks.explaining.subjects import Scene, Subject
from tasks.files import read_json, write_json
from tasks.pixels.borrowed_looks import LOOKS
from tasks.pixels.shifts import SHIFTS
from tasks.records import Facts
from tasks.runs.manifest import write_manifest
from tasks.settings import AuditingSettings, EvaluationSettings, Settings
from tasks.training.evaluation import measure, measure_border, measure_members

HOSTILE = '<script>alert("x")</script>'
VOID = {"meta", "img", "br", "hr", "link", "input", "path", "use", "rect"}


class Page(HTMLParser):
    """The elements of a page; ``errors`` lists end tags that close something else than what is open."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.errors: list[str] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        if not self.open or self.open.pop() != tag:
            self.errors.append(f"</{tag}> at {self.getpos()}")

    def handle_data(self, data: str) -> None:
        if "script" in self.open:
            self.scripts.append(data)
        elif "style" not in self.open:
            self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def value(number: float) -> Facts:
    return {"value": number, "low": round(number - 0.01, 4), "high": round(number + 0.01, 4)}


def group(n: int, auc: float, patients: int = 40) -> Facts:
    quarter = n // 4
    return {
        "n": n,
        "n_patients": patients,
        "auc": value(auc),
        "accuracy": value(0.9123),
        "sensitivity": value(0.9456),
        "specificity": value(0.8765),
        "confusion": {"tp": n - 3 * quarter, "fp": quarter, "tn": quarter, "fn": quarter},
    }


def rate(split: str, name: str, images: int, reviewed: int, with_device: int) -> Facts:
    share = with_device / reviewed if reviewed else None
    return {
        "split": split,
        "class": name,
        "images": images,
        "screened": reviewed,
        "reviewed": reviewed,
        "with_device": with_device,
        "rate": share,
    }


def without(whole: Facts, *names: str) -> Facts:
    return {name: part for name, part in whole.items() if name not in names}


def build_metrics() -> Facts:
    """``metrics.json`` of two networks, a different value for each thing that is told."""
    splits = {"val": group(8, 0.8881), "test": group(8, 0.9731)}
    decisions = {name: without(part, "auc") for name, part in splits.items()}
    sensitive = {
        name: part | {"sensitivity": value(0.9867), "specificity": value(0.7654)} for name, part in decisions.items()
    }
    bins: list[Facts] = [{"from": i / 10, "to": (i + 1) / 10, "n": 0} for i in range(10)]
    bins[2] |= {"n": 2, "mean_probability": 0.2345, "share": 0.5}
    bins[9] |= {"n": 6, "mean_probability": 0.9512, "share": 0.8333}
    alone = {
        name: {"values": [0.93, 0.95], "mean": 0.9401, "deviation": 0.0141}
        for name in ("auc", "accuracy", "sensitivity", "specificity")
    }
    shifts = {name: group(8, 0.88 - 0.01 * i, patients=8) for i, name in enumerate([*SHIFTS, *LOOKS])}
    return {
        "threshold": 0.412345,
        **splits,
        "test_device_free": {"n": 0, "reason": f"no image was screened {HOSTILE}"},
        "test_with_device": {"n": 0, "reason": "no image was screened"},
        "val_device_free": group(6, 0.8772, patients=5),
        "val_with_device": {"n": 2, "auc": {"value": None, "low": None, "high": None}},
        "subtypes": {
            "val": {"virus": {"n": 4, "sensitivity": value(0.8661)}},
            "test": {"virus": {"n": 4, "sensitivity": value(0.9317)}, "bacteria": {"n": 0, "reason": "nobody"}},
        },
        "operating_points": {
            "balanced": {"threshold": 0.412345, **decisions},
            "high_sensitivity": {"threshold": 0.213456, **sensitive},
        },
        "calibration": {
            "val": {"n": 8, "ece": value(0.0361), "bins": bins},
            "test": {"n": 8, "ece": value(0.0471), "bins": bins},
        },
        "bacteria": {"val": group(4, 0.7112), "test": {"n": 0, "reason": "no image is in this group"}},
        "members": {"val": alone, "test": alone},
        "shifts": shifts,
        "border_only": value(0.5912),
        "border_removed": value(0.9014),
        "border_loss": {"value": 0.0097, "low": -0.0021, "high": 0.0203},
        "lungs_only": value(0.9533) | {"n": 8},
        "lungs_removed": value(0.6144) | {"n": 8},
    }


def build_run(run: Path) -> None:
    """Writes the files of a small finished run, with hostile names of files, patients, source and reviewer."""
    run.mkdir(exist_ok=True)
    rows: list[Facts] = []
    for split in ("train", "val", "test"):
        for i in range(8):
            path = f"{split}/{'PNEUMONIA' if i % 2 else 'NORMAL'}/{HOSTILE}{i}.jpeg"
            rows.append(
                {
                    "image_id": hashlib.sha256(path.encode()).hexdigest()[:16],
                    "path": path,
                    "sha256": hashlib.sha256(f"{split}{i}".encode()).hexdigest(),
                    "label": i % 2,
                    "subtype": "virus" if i % 2 else "normal",
                    "patient_id": None if i == 7 else f"person77{i}{HOSTILE}",
                    "group_id": f"person77{i}{HOSTILE}",
                    "source_split": split,
                    "split": split,
                    "excluded": "",
                }
            )
    for row, reason in zip(
        rows, ("duplicate of ", "conflict: the same picture as ", "undecodable: ", "odd "), strict=False
    ):
        row["excluded"] = f"{reason}{HOSTILE}"
    rows[0]["sha256"] = rows[4]["sha256"]
    write_manifest(run, pd.DataFrame(rows))
    ingest = {
        "source": "sample",
        "kind": "folder",
        "name": HOSTILE,
        "sha256": "ab" * 32,
        "archive_sha256": None,
        "n_images": 24,
        "n_distinct": 23,
        "n_nested": 61,
        "n_nested_only": 0,
        "n_clutter": 5,
        "warnings": [f"3 pictures are in no class folder, and are not used, such as 'x{HOSTILE}'"],
    }
    pack = {"n_test_copies": 0, "n_conflicts_test": 1, "n_near": 4, "n_near_test": 2}
    nothing = {"value": None, "low": None, "high": None, "reason": "a class has too few readings"}
    read = {"auc": value(0.9512), "sensitivity": value(0.9034), "specificity": value(0.8978)}
    screen = {
        "review": HOSTILE,
        "n_readings": 9,
        "n_answers": 3,
        "screener": {"name": HOSTILE, "sha256": "cd" * 32},
        "quality": {
            "n_known": 5,
            "all": {"n": 40, **read},
            "pneumonia": {"n": 30, **read},
            "normal": {"n": 0, "reason": "no image is in this group"},
            "cost": {"normal": nothing, "pneumonia": {"value": 0.123, "low": 0.1, "high": 0.15}},
            "residual": {"value": 0.0456, "low": 0.03, "high": 0.06},
        },
        "n_doubtful": 17,
        "n_on_sheet": 11,
        "n_excluded": 2,
        "n_excluded_reviewed": 1,
        "n_excluded_scored": 1,
        "n_excluded_doubtful": 0,
        "n_unscreened_train": 4,
        "rates": [
            rate("train before", "normal", 40, 40, 1),
            rate("train before", "pneumonia", 40, 40, 21),
            rate("val", "normal", 4, 4, 0),
            rate("test", "normal", 4, 0, 0),
            rate("test", "pneumonia", 4, 0, 0),
        ],
    }
    fit = {
        "backend": "tensorflow",
        "val_aucs": [0.97, 0.96],
        "epochs": 3,
        "n_models": 2,
        "n_train": 4,
        "n_train_pneumonia": 2,
        "n_train_subtype_known": 2,
        "n_val": 8,
    }
    calibrate = {
        "n_val": 8,
        "n_weights": 1234,
        "model_sha256": "ef" * 32,
        "n_shifts": 15,
        "slope": 1.5,
        "offset": -0.25,
    }
    for stage, facts in (
        ("ingest", ingest),
        ("pack", pack),
        ("screen", screen),
        ("fit", fit),
        ("calibrate", calibrate),
    ):
        write_json(run / "stages" / f"{stage}.json", {"facts": facts, "seconds": 75.2, "reused": stage == "ingest"})
    checks = [
        {"says": "every label is 0 or 1", "severity": "critical", "success": True, "n": 24, "n_unexpected": 0},
        {
            "says": "no patient is in both",
            "severity": "critical",
            "success": None,
            "reason": "the patient of 3 of 24 images is not known",
            "n": 24,
            "n_unexpected": 0,
        },
        {
            "says": "sizes fit",
            "severity": "warning",
            "success": False,
            "n": 24,
            "n_unexpected": 7,
            "examples": [HOSTILE],
        },
    ]
    for checkpoint in ("source", "prepared"):
        write_json(run / "checks" / checkpoint / "summary.json", checks)
    history = {"member": [1, 1, 1, 2, 2, 2], "epoch": [1, 2, 3] * 2, "loss": [0.7, 0.5, 0.4, 0.8, 0.6, 0.3]}
    pd.DataFrame(history | {"val_auc": [0.8, 0.98, 0.97, 0.7, 0.9, 0.96]}).to_csv(run / "history.csv", index=False)
    table = pd.DataFrame([row for row in rows if row["split"] != "train"])
    table["probability"] = [0.2, 0.9, 0.4, 0.6] * 4
    table["bacteria"] = 0.25
    columns = ["path", "split", "label", "subtype", "probability", "bacteria"]
    table[columns].to_csv(run / "predictions.csv", index=False)
    write_json(run / "metrics.json", build_metrics())
    rng = np.random.default_rng(7)
    explain = {
        "n_images": 4,
        "n_repeated": 0,
        "deletion": 0.3123,
        "insertion": 0.9123,
        "random": 0.6123,
        "n_deletion_better": 4,
        "n_insertion_better": 3,
    }
    write_json(run / "stages" / "explain.json", {"facts": explain, "seconds": 4.2, "reused": False})
    write_json(run / "audit.json", build_audit([row for row in rows if row["split"] == "test"]))
    for row, right in zip(rows[-4:], (True, True, False, False), strict=True):
        found: Facts = {
            "image_id": row["image_id"],
            "split": "test",
            "label": row["label"],
            "subtype": row["subtype"],
            "has_device": None,
            "probability": 0.9995,
            "decision": row["label"] if right else 1 - row["label"],
            "right": right,
            "weights": [0.2, -0.31],
            "r2": None,
            "stability": {"n_seeds": 1, "rank_correlation": None, "top5_overlap": None, "stable": None},
            "faithfulness": {"deletion": 0.3123, "insertion": 0.9123, "random": 0.6123},
            "mask": None,
            "places": {"window_weight": 0.8, "window_area": 0.58},
        }
        write_json(run / "explanations" / f"{row['image_id']}.json", found)
        Image.fromarray(rng.integers(0, 255, (80, 168, 3), dtype=np.uint8)).save(
            run / "explanations" / f"{row['image_id']}.png"
        )


def build_audit(rows: list[Facts]) -> Facts:
    """``audit.json`` of a network that knows nothing, on images nobody screened."""
    table = pd.DataFrame(rows).assign(has_device=pd.array([None] * len(rows), dtype="boolean"), width_px=9, height_px=7)
    pixels = np.random.default_rng(5).integers(0, 255, (len(rows), 224, 224), dtype=np.uint8)
    scene = Scene(table, pixels, np.zeros_like(pixels), np.zeros_like(pixels))
    return audit_scene(scene, {"model": lambda packed: 0.4 + packed[:, :40, :40].mean((1, 2)) / 1000})


@lru_cache(maxsize=1)
def audit_two_networks() -> str:
    """``audit.json`` of two networks, as text: one reads the lungs of made-up images, its twin a bright bar."""
    rng = np.random.default_rng(6)
    n = 160
    labels = np.arange(n) % 2
    device = rng.random(n) < np.where(labels == 1, 0.7, 0.2)
    masks = np.zeros((n, 224, 224), np.uint8)
    masks[device, 60:64, 70:150] = 255
    pixels = rng.integers(60, 80, (n, 224, 224), dtype=np.uint8)
    # Lungs are spotted with pneumonia, the belly without: the grey of a whole picture says nothing.
    for part, size in ((pixels[:, 90:130, 60:160], labels), (pixels[:, 150:190, 60:160], 1 - labels)):
        spots = np.where(rng.random(part.shape) < 0.5, 1, -1) * (6 + 12 * size + rng.normal(0, 3, n))[:, None, None]
        part[:] = np.clip(part + spots, 0, 255).astype(np.uint8)
    pixels[masks > 0] = 250
    table = pd.DataFrame({"label": labels, "split": "test", "group_id": [f"person77{i // 2}" for i in range(n)]})
    table = table.assign(has_device=pd.array(device, dtype="boolean"), width_px=9, height_px=7)

    def read_lungs(packed: np.ndarray) -> np.ndarray:
        low, high = np.percentile(packed[:, 90:130, 60:160], (25, 75), axis=(1, 2))
        return np.asarray(1 / (1 + np.exp(-(high - low - 25) / 4)))

    def read_bars(packed: np.ndarray) -> np.ndarray:
        return np.asarray(1 / (1 + np.exp(-((packed > 150).mean((1, 2)) * 800 - 2))))

    lungs = np.zeros_like(masks)
    lungs[:, 80:140, 50:170] = 255
    return json.dumps(audit_scene(Scene(table, pixels, masks, lungs), {"model": read_lungs, "unfiltered": read_bars}))


def compare_networks(run: Path) -> Settings:
    """Puts the audit of two networks into a run; returns settings that go with it."""
    (run / "audit.json").write_text(audit_two_networks())
    for path in sorted((run / "explanations").glob("*.json")):
        facts: Facts = read_json(path)
        twin: Facts = {key: facts[key] for key in ("decision", "weights", "r2", "faithfulness")}
        twin |= {"probability": 0.7654}
        twin["stability"] = {"n_seeds": 3, "rank_correlation": 0.4321, "top5_overlap": 0.6, "stable": False}
        places = {"device_weight": 0.04, "device_area": 0.05, "window_weight": 0.8, "window_area": 0.58}
        own = {"mask": "own", "places": places, "stability": twin["stability"]}
        twin["places"] = places | {"device_weight": 0.41}
        write_json(path, facts | own | {"has_device": True, "unfiltered": twin})
    return settings_for(run, auditing=AuditingSettings(compare_unfiltered=True))


def audit_scene(scene: Scene, networks: dict[str, Callable[[np.ndarray], np.ndarray]]) -> Facts:
    """``audit.json`` of plain functions in place of networks."""
    # Learnt from other grain: from the audited images themselves 300 cells of a ring would learn them by heart.
    learnt = np.random.default_rng(8).integers(60, 80, scene.packed.shape, dtype=np.uint8)
    baselines = ask_baselines(scene.rows, learnt, scene.rows, scene.packed)
    shape = ask_shape(scene.rows, scene.lungs, scene.lungs)
    settings = Settings(evaluation=EvaluationSettings(n_bootstrap=50), auditing=AuditingSettings(n_images=30))
    suspects = [Subject(name, ask, 0.5, ask(scene.packed)) for name, ask in networks.items()]
    return audit_networks(scene, suspects, (baselines, shape), [], settings)


def settings_for(run: Path, **more: Any) -> Settings:
    return Settings(run_dir=str(run), **more)


def measure_again(run: Path, table: pd.DataFrame, n_members: int = 2, **more: Any) -> Settings:
    """Puts made-up answers into a run, and their measures as evaluation makes them; returns fitting settings.

    Args:
        run: From ``build_run``.
        table: As from ``make_answers``.
        n_members: Networks that were trained.
        more: Settings of evaluation.
    """
    settings = EvaluationSettings(n_bootstrap=20, **more)
    table = table[table["split"].isin(settings.splits)]
    val = make_answers(splits=("val",))
    val["image_id"] = [str(i) for i in range(len(val))]
    shifts = pd.concat([val.assign(shift=name) for name in (*SHIFTS, *LOOKS)], ignore_index=True)
    metrics = measure(table, shifts, settings, 7)
    rows = table[table["split"] == ("test" if (table["split"] == "test").any() else "val")]
    noise = np.random.default_rng(3).random(len(rows))
    metrics |= measure_border(rows, noise, rows["probability"].to_numpy(float) * 0.9, settings, 7)
    metrics["members"] = {}
    for split, part in table.groupby("split"):
        alone = np.stack([part["probability"].to_numpy(float) * (1 - 0.1 * i) for i in range(n_members)], axis=1)
        metrics["members"][split] = measure_members(part, alone, metrics["threshold"])
    write_json(run / "metrics.json", metrics)
    table.to_csv(run / "predictions.csv", index=False)
    history = pd.read_csv(run / "history.csv")
    history[history["member"] <= n_members].to_csv(run / "history.csv", index=False)
    record = read_json(run / "stages" / "fit.json")
    record["facts"] |= {"n_models": n_members, "val_aucs": [0.97, 0.96][:n_members]}
    write_json(run / "stages" / "fit.json", record)
    return settings_for(run, evaluation=settings)


def make_answers(n: int = 60, splits: tuple[str, ...] = ("val", "test"), seed: int = 0) -> pd.DataFrame:
    """Made-up answers of a network that is mostly right; each patient has three images."""
    rng = np.random.default_rng(seed)
    rows = pd.DataFrame({"split": [split for split in splits for _ in range(n)]})
    rows["path"] = [f"{HOSTILE}{i}.jpeg" for i in range(len(rows))]
    rows["label"] = rng.integers(0, 2, len(rows))
    rows["group_id"] = [f"person77{i // 3}" for i in range(len(rows))]
    rows["subtype"] = [("normal", ("bacteria", "virus")[i % 2])[label] for i, label in enumerate(rows["label"])]
    rows["has_device"] = pd.array([(True, False, None)[k] for k in rng.integers(0, 3, len(rows))], dtype="boolean")
    rows["probability"] = np.clip(rows["label"] * 0.35 + rng.uniform(0, 0.65, len(rows)), 0, 1)
    rows["bacteria"] = np.clip((rows["subtype"] == "bacteria") * 0.2 + rng.uniform(0, 0.8, len(rows)), 0, 1)
    return rows
