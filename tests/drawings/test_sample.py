"""The embedded sample: its layout, its warts, its truth, and that it is neither trivial nor different tomorrow."""

import csv
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tasks.drawings.devices import KINDS
from tasks.drawings.sample import DEVICE_EFFECTS, _plan_sample, write_sample


@dataclass(frozen=True)
class Sample:
    root: Path
    truth: dict[str, dict[str, str]]
    masks: Path
    review: list[dict[str, str]]

    @property
    def images(self) -> list[Path]:
        splits = (self.root / "chest_xray" / split for split in ("train", "val", "test"))
        return sorted(path for split in splits for path in split.rglob("*.jpeg"))

    def rows(self, split: str, folder: str) -> list[dict[str, str]]:
        return [row for path, row in self.truth.items() if path.startswith(f"{split}/{folder}/")]


def draw(folder: Path, **settings: object) -> Sample:
    root, truth = folder / "root", folder / "truth"
    write_sample(root, truth, side_px=96, **settings)  # type: ignore[arg-type]
    with (truth / "truth.csv").open() as file:
        rows = {row["path"]: row for row in csv.DictReader(file)}
    with (root / "chest_xray" / "device_review.csv").open() as file:
        return Sample(root, rows, truth / "masks", list(csv.DictReader(file)))


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    return draw(tmp_path_factory.mktemp("big"), n_images=300)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    return draw(tmp_path_factory.mktemp("small"), n_images=60)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    return draw(tmp_path_factory.mktemp("planted"), n_images=80, device_effect="strong")


def share_with_device(rows: list[dict[str, str]]) -> float:
    return sum(row["device"] == "1" for row in rows) / len(rows)


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def rank_auc(values: np.ndarray, labels: np.ndarray) -> float:
    ranks = np.argsort(np.argsort(values)) + 1.0
    n_positive = labels.sum()
    u = ranks[labels == 1].sum() - n_positive * (n_positive + 1) / 2
    return float(u / (n_positive * (len(labels) - n_positive)))


def test_the_number_of_images_is_exact_and_truth_lists_each(big: Sample, small: Sample) -> None:
    for sample, n_images in ((big, 300), (small, 60)):
        paths = {str(path.relative_to(sample.root / "chest_xray")) for path in sample.images}
        assert len(paths) == n_images
        assert paths == set(sample.truth)


@pytest.mark.parametrize("n_images", [24, 99, 100, 601, 600])
def test_any_number_of_images_is_planned_exactly_without_a_name_twice(n_images: int) -> None:
    for device_effect in DEVICE_EFFECTS:
        paths = [plan.path for plan in _plan_sample(n_images, 7, device_effect)]
        assert len(paths) == len(set(paths)) == n_images
        folders = {path.rsplit("/", 1)[0] for path in paths}
        assert folders == {f"{split}/{c}" for split in ("train", "val", "test") for c in ("NORMAL", "PNEUMONIA")}


def test_splits_and_classes_have_their_shares(big: Sample, small: Sample) -> None:
    sizes = {split: [len(big.rows(split, c)) for c in ("NORMAL", "PNEUMONIA")] for split in ("train", "val", "test")}
    assert sum(sizes["test"]) == 75 and sizes["val"] == [8, 8]
    assert all(min(pair) > 0 for pair in sizes.values())
    assert sum(row["label"] == "1" for row in big.truth.values()) / 300 == pytest.approx(0.62, abs=0.02)
    assert [len(small.rows("val", c)) for c in ("NORMAL", "PNEUMONIA")] == [4, 4]
    assert len(small.rows("test", "NORMAL")) > 2


def test_label_and_subtype_follow_folder_and_name(big: Sample) -> None:
    for path, row in big.truth.items():
        assert row["label"] == ("1" if "/PNEUMONIA/" in path else "0")
        expected = "bacteria" if "_bacteria_" in path else "virus" if "_virus_" in path else "normal"
        assert row["subtype"] == expected
    assert any("NORMAL2-IM-" in path for path in big.truth) and any("/IM-9" in path for path in big.truth)


def test_no_patient_is_in_test_and_in_train_or_val(big: Sample) -> None:
    def patients(*splits: str) -> set[str]:
        names = [path.split("/")[-1] for path in big.truth if path.split("/")[0] in splits]
        return {
            name.split("_")[0] if "_" in name else "-".join(name.removeprefix("NORMAL2-").split("-")[:2])
            for name in names
        }

    assert patients("test") and not patients("test") & patients("train", "val")


def test_patients_have_one_to_four_images(big: Sample) -> None:
    counts: dict[str, int] = {}
    for path in big.truth:
        name = path.split("/")[-1]
        if "_" in name:
            counts[name.split("_")[0]] = counts.get(name.split("_")[0], 0) + 1
    assert set(counts.values()) >= {1, 2, 3}
    assert max(counts.values()) <= 5  # four, and perhaps an identical copy


def test_images_are_grey_jpegs_wider_than_high_of_many_sizes(small: Sample) -> None:
    sizes = set()
    for path in small.images:
        with Image.open(path) as image:
            assert image.mode == "L" and image.format == "JPEG"
            assert image.width > image.height
            pixels = np.asarray(image)
            assert pixels.min() < 60 and pixels.max() > 150
            sizes.add(image.size)
    assert len(sizes) > 20


def test_the_warts_of_the_public_archive_are_there(big: Sample, small: Sample) -> None:
    for sample in (big, small):
        root = sample.root
        nested = list((root / "chest_xray" / "chest_xray").rglob("*.jpeg"))
        assert len(nested) == max(2, round(0.01 * len(sample.images)))
        for path in nested:
            outer = root / "chest_xray" / path.relative_to(root / "chest_xray" / "chest_xray")
            assert path.read_bytes() == outer.read_bytes()
        stubs = list((root / "__MACOSX").rglob("._*.jpeg"))
        assert stubs and all(stub.read_bytes().startswith(b"\x00\x05\x16\x07") for stub in stubs)
        assert (root / "chest_xray" / ".DS_Store").is_file()


def test_only_train_holds_identical_files_under_two_names(big: Sample, small: Sample) -> None:
    for sample, n_copies in ((big, 2), (small, 2)):
        seen: dict[str, list[str]] = {}
        for path in sample.images:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            seen.setdefault(digest, []).append(str(path.relative_to(sample.root / "chest_xray")))
        repeated = [paths for paths in seen.values() if len(paths) > 1]
        assert sum(len(paths) - 1 for paths in repeated) == n_copies
        assert all(path.startswith("train/") for paths in repeated for path in paths)


def test_devices_are_as_common_as_in_the_public_archive_in_every_split(big: Sample) -> None:
    for split, slack in (("train", 0.02), ("test", 0.02), ("val", 0.1)):
        assert share_with_device(big.rows(split, "PNEUMONIA")) == pytest.approx(0.59, abs=slack)
    normal = [row for row in big.truth.values() if row["label"] == "0"]
    assert sum(row["device"] == "1" for row in normal) in (1, 2, 3)


def test_each_image_with_devices_has_the_mask_of_its_kinds_and_no_other_has_one(big: Sample) -> None:
    masks = {str(path.relative_to(big.masks)).removesuffix(".png"): path for path in big.masks.rglob("*.png")}
    assert set(masks) == {path for path, row in big.truth.items() if row["device"] == "1"}
    for path, target in masks.items():
        mask = np.asarray(Image.open(target))
        with Image.open(big.root / "chest_xray" / path) as image:
            assert mask.shape == (image.height, image.width)
        kinds = big.truth[path]["kinds"].split(";")
        shown = {KINDS[value - 1] for value in np.unique(mask) if value}
        assert shown and shown <= set(kinds) and len(kinds) == len(set(kinds))


def test_the_review_covers_a_quarter_of_train_and_agrees_with_the_truth(big: Sample) -> None:
    n_train = sum(path.startswith("train/") for path in big.truth)
    assert len({row["path"] for row in big.review}) == len(big.review) == round(0.25 * n_train)
    for row in big.review:
        known = big.truth[row["path"]]
        assert (row["device"], row["kinds"]) == (known["device"], known["kinds"])
        assert row["path"].startswith("train/") and row["confidence"] in ("0", "1", "2")
        box = [row[edge] for edge in ("x0", "y0", "x1", "y1")]
        if row["device"] == "0":
            assert box == ["", "", "", ""]
            continue
        x0, y0, x1, y1 = map(float, box)
        assert 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1
        mask = np.asarray(Image.open(big.masks / f"{row['path']}.png")) > 0
        height, width = mask.shape
        inside = mask[int(y0 * height) : round(y1 * height) + 1, int(x0 * width) : round(x1 * width) + 1]
        assert inside.sum() > 0.9 * mask.sum()
    assert {row["device"] for row in big.review} == {"0", "1"}


def test_mean_and_spread_of_grey_do_not_tell_the_classes_apart(big: Sample) -> None:
    labels = np.array([int("PNEUMONIA" in path.parts) for path in big.images])
    pixels = [np.asarray(Image.open(path), np.float32) for path in big.images]
    for values in ([image.mean() for image in pixels], [image.std() for image in pixels]):
        auc = rank_auc(np.array(values), labels)
        assert max(auc, 1 - auc) < 0.75


def test_the_same_arguments_give_the_same_bytes_and_another_seed_does_not(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        draw(tmp_path / name, n_images=24, seed=seed)
    first, again, other = (digests(tmp_path / name) for name in "abc")
    assert first == again
    assert not set(first.values()) & {d for path, d in other.items() if path.endswith(".jpeg") and "MACOSX" not in path}


def test_a_planted_shortcut_is_in_train_and_not_in_test(planted: Sample) -> None:
    assert share_with_device(planted.rows("train", "PNEUMONIA")) == pytest.approx(0.9, abs=0.03)
    assert share_with_device(planted.rows("train", "NORMAL")) == 0.0
    for name in ("PNEUMONIA", "NORMAL"):
        assert share_with_device(planted.rows("test", name)) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"device_effect": "weak"}, "weak"), ({"n_images": 10}, "n_images"), ({"side_px": 32}, "side_px")],
)
def test_wrong_settings_are_refused_by_name_before_anything_is_written(
    tmp_path: Path, settings: dict[str, object], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        write_sample(tmp_path / "root", tmp_path / "truth", **settings)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("device_effect", ["over_lungs", "outside_lungs"])
def test_a_planted_device_lies_in_its_place_alone(tmp_path: Path, device_effect: str) -> None:
    sample = draw(tmp_path, n_images=40, device_effect=device_effect)
    with_device = [path for path, row in sample.truth.items() if row["device"] == "1"]
    assert len(with_device) > 10
    for path in with_device:
        device = np.asarray(Image.open(sample.masks / f"{path}.png")) > 0
        lungs = np.asarray(Image.open(tmp_path / "truth" / "lungs" / f"{path}.png"))
        assert device.any() and (lungs[device] == (device_effect == "over_lungs")).all()
