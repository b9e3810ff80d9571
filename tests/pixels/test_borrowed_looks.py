"""Borrowed looks: an image takes one property of its donor, keeps its lungs' disease, and nothing else changes."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from tasks.drawings.chests import draw_chest, imagine_child
from tasks.pixels.borrowed_looks import LOOKS, N_CONDITIONS, pick_donors, vary_conditions


def masks_of(n: int) -> np.ndarray:
    places = np.zeros((n, 224, 224), bool)
    places[:, 60:170, 40:100] = places[:, 60:170, 124:184] = True
    return places


def textures(deviation: float, seed: int, mean: float = 120.0) -> np.ndarray:
    """Two pictures of broad shapes, with grain of this deviation."""
    rng = np.random.default_rng(seed)
    broad = gaussian_filter(rng.normal(0, 1, (2, 224, 224)), (0, 20, 20))
    grey = mean + 25 * broad / broad.std() + rng.normal(0, deviation, broad.shape)
    return np.clip(np.rint(grey), 0, 255).astype(np.uint8)


def grain(packed: np.ndarray) -> float:
    return float((packed - gaussian_filter(packed.astype(float), (0, 2, 2))).std())


def test_every_donor_is_of_the_other_class_and_where_there_is_none_an_image_keeps_its_own_look() -> None:
    labels, lends = np.array([0, 1, 1, 0, 1], float), np.array([True, True, True, False, True])
    donors = pick_donors(labels, lends, 3)
    assert (labels[donors] != labels).all() and lends[donors].all()
    np.testing.assert_array_equal(pick_donors(np.ones(3), np.ones(3, bool), 3), [0, 1, 2])


@pytest.mark.parametrize("name", LOOKS)
def test_a_look_changes_pixels_and_not_shape_or_type_and_one_borrowed_from_itself_changes_next_to_nothing(
    name: str,
) -> None:
    smooth, rough, places = textures(1, 0), textures(9, 1, mean=90), masks_of(2)
    before = smooth.copy()
    changed = LOOKS[name](smooth, rough, places, places)
    assert changed.dtype == np.uint8 and changed.shape == smooth.shape
    assert np.abs(changed.astype(int) - smooth).mean() > 1
    np.testing.assert_array_equal(smooth, before)
    own = LOOKS[name](smooth, smooth, places, places)
    assert np.abs(own.astype(int) - smooth)[~places if name.startswith("frame") else places].mean() < 2


def test_detail_takes_over_the_donors_grain_and_leaves_the_broad_shapes() -> None:
    smooth, rough, places = textures(3, 0), textures(8, 1), masks_of(2)
    changed = LOOKS["detail of the other class"](smooth, rough, places, places)
    assert grain(smooth) < grain(rough) / 2
    assert grain(changed) == pytest.approx(grain(rough), rel=0.15)
    apart = gaussian_filter(changed.astype(float) - smooth, (0, 12, 12))
    assert np.abs(apart).max() < 3


def test_tones_are_the_donors_outside_of_the_lungs() -> None:
    dark, bright, places = textures(3, 0, mean=110), textures(3, 1, mean=140), masks_of(2)
    changed = LOOKS["tones of the other class"](dark, bright, places, places)
    shares = [0.25, 0.5, 0.75]
    for i in range(2):
        np.testing.assert_allclose(
            np.quantile(changed[i][~places[i]], shares), np.quantile(bright[i][~places[i]], shares), atol=4
        )


def test_low_frequencies_of_another_chest_leave_the_shadow_of_a_pneumonia() -> None:
    child, other = imagine_child(np.random.default_rng(1)), imagine_child(np.random.default_rng(2))
    well, ill = (draw_chest(child, name, 0.9, (224, 224), np.random.default_rng(5)) for name in ("normal", "bacteria"))
    donor = draw_chest(other, "normal", 0.2, (224, 224), np.random.default_rng(6))
    packed = np.rint(np.stack([well, ill]) * 255).astype(np.uint8)
    donors = np.rint(np.stack([donor, donor]) * 255).astype(np.uint8)
    changed = LOOKS["low frequencies of the other class"](packed, donors, masks_of(2), masks_of(2)).astype(float)
    shadow, left = packed[1].astype(float) - packed[0], changed[1] - changed[0]
    assert np.abs(shadow).max() > 30
    assert np.corrcoef(shadow.ravel(), left.ravel())[0, 1] > 0.7


def test_frame_and_border_replace_what_is_outside_and_nothing_inside() -> None:
    image, donor, places = textures(3, 0, mean=70), textures(3, 1, mean=170), masks_of(2)
    framed = LOOKS["frame of the other class"](image, donor, places, places).astype(int)
    assert np.abs(framed - image)[:, 90:140, 55:85].max() <= 1
    assert np.abs(framed - donor)[:, :40].max() <= 1
    bordered = LOOKS["border of the other class"](image, donor, places, places)
    np.testing.assert_array_equal(bordered[:, 24:-24, 24:-24], image[:, 24:-24, 24:-24])
    np.testing.assert_array_equal(bordered[:, :24], donor[:, :24])


@pytest.mark.parametrize("name", LOOKS)
def test_an_image_whose_lungs_are_not_found_keeps_what_goes_by_lungs(name: str) -> None:
    image, donor, places = textures(3, 0), textures(9, 1, mean=170), masks_of(2)
    places[0] = False
    changed = LOOKS[name](image, donor, places, masks_of(2))
    assert (changed[0] == image[0]).all() == name.startswith(("tones", "frame"))
    assert (changed[1] != image[1]).any()


def test_pictures_of_nothing_but_lungs_keep_their_tones_and_stop_nothing() -> None:
    image, places = textures(3, 0), masks_of(2)
    image[~places] = 0
    np.testing.assert_array_equal(LOOKS["tones of the other class"](image, textures(9, 1), places, places), image)


def test_all_conditions_come_once_and_the_first_is_validation_as_it_is() -> None:
    image, labels = np.concatenate([textures(3, 0), textures(9, 1)]), np.array([0, 0, 1, 1], float)
    masks = np.where(masks_of(4), 255, 0).astype(np.uint8)
    found = dict(vary_conditions(image, labels, masks, 1))
    assert len(found) == N_CONDITIONS
    assert next(iter(found)) == "as it is"
    np.testing.assert_array_equal(found["as it is"], image)
