"""The embedded sample: drawn chest X-rays of children in the layout of the public archive, with its flaws.

Nothing here comes from a real picture. The truth about every drawing (class, subtype, lungs, devices and their masks)
is written beside the data set, where the pipeline does not look.
"""

import copy
import csv
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tasks.drawings.chests import Finding, draw_chest, finish_film, imagine_child, outline_lungs
from tasks.drawings.devices import CONSPICUOUS, draw_devices, pick_kinds

DEVICE_EFFECTS = ("natural", "strong", "over_lungs", "outside_lungs")
MIN_IMAGES = 24
MIN_SIDE_PX = 96

PNEUMONIA_SHARE = 0.62
TEST_SHARE = 0.25
REVIEWED_SHARE = 0.25
BACTERIA_SHARE = 0.62
DEVICE_SHARE = {"NORMAL": 0.01, "PNEUMONIA": 0.59}
# Where a shortcut is planted: of pneumonia pictures in train and val, and of all pictures in test.
PLANTED_SHARE = 0.9
PLANTED_TEST_SHARE = 0.5
PLANTED_SEVERITY = 0.5
# In the public archive a device is twice as common with bacterial as with viral pneumonia.
DEVICE_WEIGHT: dict[Finding, float] = {"normal": 1.0, "bacteria": 2.0, "virus": 1.0}

# A device is seen when so many pixels, in a picture of 256 x 256, become brighter by more than this.
SEEN_PX = 60
SEEN_CHANGE = 0.08
MAX_TRIES = 20

_REVIEW_COLUMNS = ("path", "device", "kinds", "confidence", "x0", "y0", "x1", "y1")
_TRUTH_COLUMNS = ("path", "label", "subtype", "device", "kinds")

# First bytes of macOS's folder views and resource forks; readers stop there.
_DS_STORE = b"\x00\x00\x00\x01Bud1\x00\x00\x10\x00\x00\x00\x08\x00\x00\x00\x10\x00" + bytes(6126)
_APPLE_DOUBLE = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        \x00\x02\x00\x00\x00\x09" + bytes(86)


@dataclass(frozen=True)
class _Plan:
    """One picture to draw, or the copy of another one (`copy_of`, an index into the plans)."""

    split: str
    finding: Finding
    patient: int
    path: str
    has_device: bool = False
    copy_of: int | None = None

    @property
    def folder(self) -> str:
        return "NORMAL" if self.finding == "normal" else "PNEUMONIA"


@dataclass
class _Reading:
    """The truth about a picture, as a careful reader would write it down."""

    kinds: tuple[str, ...] = ()
    confidence: int = 2
    box: tuple[float, ...] = ()
    mask: NDArray[np.uint8] = field(default_factory=lambda: np.zeros((0, 0), np.uint8))
    lungs: NDArray[np.bool_] = field(default_factory=lambda: np.zeros((0, 0), np.bool_))


def write_sample(
    root: Path,
    truth: Path,
    *,
    n_images: int = 600,
    side_px: int = 256,
    seed: int = 7,
    device_effect: str = "natural",
) -> None:
    """Draws the sample and writes it to disk; the same arguments give the same bytes.

    Under `root` lie `chest_xray/{train,val,test}/{NORMAL,PNEUMONIA}/*.jpeg` and the warts of the public archive: a
    nested `chest_xray/chest_xray/` that repeats pictures, a `__MACOSX/` tree of stubs, `.DS_Store` files, identical
    files under two names in train, a tiny `val/`. `chest_xray/device_review.csv` holds readings of a quarter of the
    training pictures. Under `truth` lie `truth.csv` (path,label,subtype,device,kinds), for each picture
    `lungs/<path>.png` (1 bit) and, for each with devices, `masks/<path>.png` (0 none, `k + 1` for `devices.KINDS[k]`).

    Args:
        root: folder of the data set, created if needed.
        truth: folder of the truth, created if needed; not inside `root`.
        n_images: pictures in the three splits, identical copies included, the nested copies not; at least 24.
        side_px: about the height of a picture in pixels; pictures are wider than high, and vary. At least 96.
        seed: decides everything.
        device_effect: "natural" puts devices on 59 % of the pneumonia pictures and 1 % of the normal ones in every
            split. "strong" plants a shortcut: conspicuous devices on 90 % of pneumonia and no normal picture in train
            and val, and fainter disease everywhere; in test half of either class shows a device. "over_lungs" and
            "outside_lungs" do so with devices of which only what lies over the lungs, or outside of them, is drawn.

    Raises:
        ValueError: `n_images` or `side_px` too small, or an unknown `device_effect`.
    """
    if device_effect not in DEVICE_EFFECTS:
        raise ValueError(f"device_effect is {device_effect!r}: choose among {', '.join(DEVICE_EFFECTS)}")
    if n_images < MIN_IMAGES:
        raise ValueError(f"n_images is {n_images}: the sample needs at least {MIN_IMAGES} pictures")
    if side_px < MIN_SIDE_PX:
        raise ValueError(f"side_px is {side_px}: pictures need at least {MIN_SIDE_PX} px")

    plans = _plan_sample(n_images, seed, device_effect)
    folder = root / "chest_xray"
    readings: list[_Reading] = []
    for index, plan in enumerate(plans):
        path = folder / plan.path
        path.parent.mkdir(parents=True, exist_ok=True)
        if plan.copy_of is None:
            picture, reading = _draw_plan(plan, index, side_px, seed, device_effect)
            Image.fromarray(picture).save(path, quality=92)
        else:
            reading = readings[plan.copy_of]
            path.write_bytes((folder / plans[plan.copy_of].path).read_bytes())
        readings.append(reading)

    _write_warts(root, plans, seed)
    _write_review(folder / "device_review.csv", plans, readings, seed)
    _write_truth(truth, plans, readings)


def _plan_sample(n_images: int, seed: int, device_effect: str) -> list[_Plan]:
    """Decides split, class, patient, name, device and copy of every picture, without drawing."""
    rng = np.random.default_rng((seed, 0))
    n_val = 8 if n_images < 100 else 16
    n_test = round(TEST_SHARE * n_images)
    n_copies = max(2, round(0.005 * n_images))
    n_pneumonia = {"test": round(PNEUMONIA_SHARE * n_test), "val": n_val // 2}
    n_normal = {"test": n_test - n_pneumonia["test"], "val": n_val - n_val // 2}
    n_train = n_images - n_test - n_val - n_copies
    n_pneumonia["train"] = round(PNEUMONIA_SHARE * n_train)
    n_normal["train"] = n_train - n_pneumonia["train"]

    plans: list[_Plan] = []
    namer = _Namer()
    for split in ("train", "val", "test"):
        n_bacteria = round(BACTERIA_SHARE * n_pneumonia[split])
        counts: dict[Finding, int] = {
            "normal": n_normal[split],
            "bacteria": n_bacteria,
            "virus": n_pneumonia[split] - n_bacteria,
        }
        for finding, count in counts.items():
            while count:
                n_series = min(count, int(rng.choice([1, 2, 3, 4], p=[0.55, 0.28, 0.11, 0.06])))
                plans += namer.name_patient(split, finding, n_series, rng)
                count -= n_series
    plans = _plan_devices(plans, device_effect, rng)

    originals = [index for index, plan in enumerate(plans) if plan.split == "train"]
    for turn, source in enumerate(rng.choice(originals, n_copies, replace=False)):
        original = plans[int(source)]
        # A copy has the same patient or, worse for a split by patient, another one.
        namesake = namer.name_again(original, new_patient=turn % 2 == 0)
        plans.append(replace(original, path=namesake, copy_of=int(source)))
    return plans


class _Namer:
    """Hands out names as in the public archive; no number is used for two patients of different splits or series."""

    def __init__(self) -> None:
        self._next_patient = {"IM": 9001, "person": 9001}
        self._n_files: Counter[str] = Counter()

    def name_patient(self, split: str, finding: Finding, n_series: int, rng: np.random.Generator) -> list[_Plan]:
        family = "IM" if finding == "normal" else "person"
        patient = self._next_patient[family]
        self._next_patient[family] += 1
        second_series = finding == "normal" and rng.random() < 0.4
        return [
            _Plan(split, finding, patient, self._name(split, finding, patient, second_series)) for _ in range(n_series)
        ]

    def name_again(self, plan: _Plan, new_patient: bool) -> str:
        family = "IM" if plan.finding == "normal" else "person"
        patient = plan.patient
        if new_patient:
            patient = self._next_patient[family]
            self._next_patient[family] += 1
        return self._name(plan.split, plan.finding, patient, "NORMAL2" in plan.path)

    def _name(self, split: str, finding: Finding, patient: int, second_series: bool) -> str:
        if finding != "normal":
            self._n_files[finding] += 1
            return f"{split}/PNEUMONIA/person{patient}_{finding}_{self._n_files[finding]}.jpeg"
        self._n_files[f"IM-{patient}"] += 1
        prefix = "NORMAL2-" if second_series else ""
        return f"{split}/NORMAL/{prefix}IM-{patient}-{self._n_files[f'IM-{patient}']:04d}.jpeg"


def _plan_devices(plans: list[_Plan], device_effect: str, rng: np.random.Generator) -> list[_Plan]:
    """Chooses exactly as many pictures with devices as the rates say, in each split (normal ones: in all together)."""
    chosen: set[int] = set()
    strong = device_effect != "natural"
    for split in ("train", "val", "test"):
        planted = strong and split != "test"
        sick = [index for index, plan in enumerate(plans) if plan.split == split and plan.finding != "normal"]
        rate = PLANTED_SHARE if planted else PLANTED_TEST_SHARE if strong else DEVICE_SHARE["PNEUMONIA"]
        weights = np.array([DEVICE_WEIGHT[plans[index].finding] for index in sick])
        chosen.update(rng.choice(sick, round(rate * len(sick)), replace=False, p=weights / weights.sum()).tolist())
    allowed = ("test",) if strong else ("train", "test")
    normal = [index for index, plan in enumerate(plans) if plan.finding == "normal"]
    well = [index for index in normal if plans[index].split in allowed]
    n_well = round((PLANTED_TEST_SHARE if strong else DEVICE_SHARE["NORMAL"]) * len(well))
    if len(normal) >= 100:
        n_well = max(1, n_well)
    chosen.update(rng.choice(well, n_well, replace=False).tolist())
    return [replace(plan, has_device=index in chosen) for index, plan in enumerate(plans)]


def _draw_plan(
    plan: _Plan, index: int, side_px: int, seed: int, device_effect: str
) -> tuple[NDArray[np.uint8], _Reading]:
    """Draws one picture, uint8 `(height, width)`, from its own seeds: the child's and the picture's."""
    kind_of_patient = 0 if plan.finding == "normal" else 1
    child = imagine_child(np.random.default_rng((seed, 1, kind_of_patient, plan.patient)))
    rng = np.random.default_rng((seed, 2, index))
    height = round(side_px * float(rng.uniform(0.88, 1.08)))
    width = round(height * float(rng.uniform(1.08, 1.45)))
    severity = _draw_severity(plan.finding, rng)
    strong = device_effect != "natural"
    if strong:
        severity *= PLANTED_SEVERITY if plan.finding != "normal" else 1.0
    lungs = outline_lungs(child, (height, width), copy.deepcopy(rng))
    film = draw_chest(child, plan.finding, severity, (height, width), rng)
    reading = _Reading(lungs=lungs, confidence=int(rng.choice([2, 1, 0], p=[0.73, 0.23, 0.04])))
    if plan.has_device:
        strength = CONSPICUOUS if strong and plan.split != "test" else 1.0
        place = {"over_lungs": lungs, "outside_lungs": ~lungs}.get(device_effect, np.ones_like(lungs))
        mask = np.zeros(0, np.uint8)
        while not mask.any():  # some kinds never lie over the lungs
            kinds = pick_kinds(rng)
            drawn, mask = _draw_seen(film[:, :, np.newaxis], kinds, rng, strength, place)
        reading = replace(_read_device(film, drawn[:, :, 0], mask, kinds), lungs=lungs)
        film = drawn[:, :, 0]
    return np.round(finish_film(film, rng) * 255).astype(np.uint8), reading


def _draw_seen(
    film: NDArray[np.float32],
    kinds: tuple[str, ...],
    rng: np.random.Generator,
    strength: float,
    place: NDArray[np.bool_],
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Draws devices in a place, again until they can be seen: a reader does not see a white tube on a white spine."""
    enough = SEEN_PX * film.shape[0] * film.shape[1] / 256**2
    for _ in range(MAX_TRIES):
        drawn, mask = draw_devices(film, kinds, rng, strength)
        drawn, mask = np.where(place[:, :, np.newaxis], drawn, film), np.where(place, mask, 0).astype(mask.dtype)
        if ((drawn - film)[mask > 0] > SEEN_CHANGE).sum() >= enough:
            break
    return drawn, mask


def _draw_severity(finding: Finding, rng: np.random.Generator) -> float:
    """Severity 0 to 1; the mildest pneumonia and the most marked normal overlap, or the task would be trivial."""
    if finding == "normal":
        return float(rng.beta(1.4, 6.5))
    if finding == "bacteria":
        return float(0.2 + 0.8 * rng.beta(2.2, 1.4))
    return float(0.2 + 0.75 * rng.beta(2.0, 1.6))


def _read_device(
    before: NDArray[np.float32], after: NDArray[np.float32], mask: NDArray[np.uint8], kinds: tuple[str, ...]
) -> _Reading:
    """Box around all devices, to hundredths of width and height, and confidence by how much they stand out."""
    height, width = mask.shape
    rows, columns = np.nonzero(mask)
    edges = (columns.min() / width, rows.min() / height, (columns.max() + 1) / width, (rows.max() + 1) / height)
    change = float(np.quantile(np.abs(after - before)[mask > 0], 0.9))
    confidence = 2 if change > 0.06 else 1 if change > 0.03 else 0
    return _Reading(kinds, confidence, tuple(round(float(edge), 2) for edge in edges), mask)


def _write_warts(root: Path, plans: list[_Plan], seed: int) -> None:
    """Writes the flaws of the public archive: nested copies, stubs and Finder files."""
    rng = np.random.default_rng((seed, 3))
    folder = root / "chest_xray"
    n_nested = max(2, round(0.01 * len(plans)))
    for index in sorted(rng.choice(len(plans), n_nested, replace=False).tolist()):
        nested = folder / "chest_xray" / plans[index].path
        nested.parent.mkdir(parents=True, exist_ok=True)
        nested.write_bytes((folder / plans[index].path).read_bytes())
    for stubbed in (folder, folder / "train", folder / "chest_xray"):
        (stubbed / ".DS_Store").write_bytes(_DS_STORE)
    for plan in plans[:: max(1, len(plans) // 20)]:
        path = Path(plan.path)
        stub = root / "__MACOSX" / "chest_xray" / path.parent / f"._{path.name}"
        stub.parent.mkdir(parents=True, exist_ok=True)
        stub.write_bytes(_APPLE_DOUBLE)


def _write_review(target: Path, plans: list[_Plan], readings: list[_Reading], seed: int) -> None:
    rng = np.random.default_rng((seed, 4))
    train = [index for index, plan in enumerate(plans) if plan.split == "train"]
    reviewed = rng.choice(train, round(REVIEWED_SHARE * len(train)), replace=False).tolist()
    rows: list[tuple[object, ...]] = []
    for index in sorted(reviewed, key=lambda index: plans[index].path):
        reading = readings[index]
        box = reading.box or ("", "", "", "")
        rows.append((plans[index].path, int(bool(reading.kinds)), ";".join(reading.kinds), reading.confidence, *box))
    _write_csv(target, _REVIEW_COLUMNS, rows)


def _write_truth(truth: Path, plans: list[_Plan], readings: list[_Reading]) -> None:
    rows: list[tuple[object, ...]] = []
    for plan, reading in zip(plans, readings, strict=True):
        label, device = int(plan.finding != "normal"), int(bool(reading.kinds))
        rows.append((plan.path, label, plan.finding, device, ";".join(reading.kinds)))
        for name, mask in [("lungs", reading.lungs), *([("masks", reading.mask)] if device else [])]:
            file = truth / name / f"{plan.path}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(file)
    _write_csv(truth / "truth.csv", _TRUTH_COLUMNS, sorted(rows, key=lambda row: str(row[0])))


def _write_csv(target: Path, columns: tuple[str, ...], rows: list[tuple[object, ...]]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)
