"""The segmenter of lungs: shapes and files, and what the shipped one finds in drawn chests."""

import hashlib
import json
import re
import zipfile
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import pytest

from tasks.errors import RunError
from tasks.files import sha256_of_file
from tasks.networks.files import save_network
from tasks.networks.segmenter import build_segmenter, load_segmenter, segment_pixels
from tasks.networks.shipped import SHIPPED
from tasks.preparing.patients import find_patients
from tasks.preparing.splitting import patient_rank
from tasks.settings import SplittingSettings
from tasks.training.drawn_pictures import draw_pictures
from tasks.training.lung_quality import measure_dice


@pytest.fixture(scope="module")
def shipped() -> keras.Model:
    return load_segmenter(SHIPPED["segmenter"])


def segment(model: keras.Model, packed: np.ndarray) -> np.ndarray:
    return np.concatenate(list(segment_pixels(model, packed)))


def test_lungs_come_batch_by_batch_in_the_shape_of_the_pictures() -> None:
    packed = np.random.default_rng(0).integers(0, 255, (5, 224, 224), dtype=np.uint8)
    found = list(segment_pixels(build_segmenter(1, (4, 4)), packed, batch_size=2))
    assert [batch.shape for batch in found] == [(2, 224, 224), (2, 224, 224), (1, 224, 224)]
    assert all(batch.dtype == np.uint8 for batch in found)


def test_the_same_seed_builds_the_same_segmenter() -> None:
    one, again, other = (build_segmenter(seed, (4, 4)).get_weights() for seed in (1, 1, 2))
    assert all((a == b).all() for a, b in zip(one, again, strict=True))
    assert not all((a == b).all() for a, b in zip(one, other, strict=True))


def test_a_folder_without_a_segmenter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"^screening\.segmenter: .*model\.keras is missing; name a folder"):
        load_segmenter(tmp_path)
    inputs = keras.Input((224, 224, 1))
    save_network(keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(inputs)), tmp_path)
    with pytest.raises(RunError, match="holds no segmenter of lungs"):
        load_segmenter(tmp_path)
    with (tmp_path / "model.keras").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(RunError, match=r"^screening\.segmenter: .* does not match model\.sha256"):
        load_segmenter(tmp_path)


# -- the shipped one ---------------------------------------------------------------------------------------------------


def test_the_shipped_segmenter_is_small_and_its_card_is_about_it() -> None:
    card = json.loads((SHIPPED["segmenter"] / "card.json").read_text())
    model = SHIPPED["segmenter"] / "model.keras"
    assert model.stat().st_size <= 2e6
    assert card["model_sha256"] == sha256_of_file(model)
    parts = pd.read_csv(SHIPPED["segmenter"] / "masks.csv", dtype=str)["part"].value_counts().to_dict()
    assert parts == {part: sum(kinds.values()) for part, kinds in card["masks"].items()}


def test_the_shipped_segmenter_finds_the_lungs_of_drawn_chests(shipped: keras.Model) -> None:
    pixels, lungs, _ = draw_pictures(24, 424_242, "lungs")
    dice = measure_dice(segment(shipped, pixels), lungs)
    assert dice.mean() >= 0.9 and dice.min() >= 0.8


def test_a_picture_of_one_grey_gives_finite_lungs(shipped: keras.Model) -> None:
    packed = np.stack([np.full((224, 224), grey, np.uint8) for grey in (0, 128, 255)])
    for batch in segment_pixels(shipped, packed):
        assert batch.mean() < 128


def test_no_mask_of_a_patient_in_the_default_validation_split_was_fitted_or_tuned_to(shared_data: Path) -> None:
    part_of = pd.read_csv(SHIPPED["segmenter"] / "masks.csv", dtype=str).set_index("sha256")["part"].to_dict()
    settings = SplittingSettings()
    with zipfile.ZipFile(shared_data / "chest_xray_224.zip") as archive:
        names = [name for name in archive.namelist() if re.match(r"chest_xray/train/.*\.jpeg", name)]
        parts = [part_of.get(hashlib.sha256(archive.read(name)).hexdigest()[:16]) for name in names]
    patients = find_patients(names, None)[0]
    in_val = [patient_rank(patient, settings.salt) < settings.val_fraction for patient in patients]
    found = pd.DataFrame({"patient": patients, "part": parts, "in_val": in_val}).dropna()
    assert len(names) == 5216 and len(found) > 4000
    assert set(found[found["in_val"]]["part"]) == {"report"}
    fitted, others = found[found["part"] == "fit"], found[found["part"].isin(["tune", "report"])]
    assert not set(fitted["patient"]) & set(others["patient"])
