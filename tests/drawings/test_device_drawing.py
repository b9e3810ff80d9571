"""The devices that are drawn, and the masks that say where."""

from collections import Counter

import numpy as np
import pytest

from tasks.drawings.devices import KINDS, MASKED_DENSITY, draw_devices, pick_kinds


def grey(height: int = 224, width: int = 256, level: float = 0.45) -> np.ndarray:
    return np.full((height, width, 1), level, np.float32)


@pytest.mark.parametrize("shape", [(64, 64), (150, 97), (224, 224), (968, 1304)])
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_shows_at_any_size_with_its_own_mask_value(kind: str, shape: tuple[int, int]) -> None:
    image = grey(*shape)
    drawn, mask = draw_devices(image, [kind], np.random.default_rng(3))
    assert drawn.shape == image.shape and drawn.dtype == np.float32
    assert mask.shape == shape and mask.dtype == np.uint8
    assert set(np.unique(mask)) == {0, KINDS.index(kind) + 1}
    assert (drawn - image)[:, :, 0][mask > 0].max() > 0.02


@pytest.mark.parametrize("seed", range(12))
def test_every_visible_change_is_masked_and_the_rest_is_nearly_untouched(seed: int) -> None:
    rng = np.random.default_rng(seed)
    image = rng.uniform(0, 1, (200, 230, 1)).astype(np.float32)
    drawn, mask = draw_devices(image, KINDS, rng, strength=1.5)
    change = np.abs(drawn - image)[:, :, 0]
    assert change[mask == 0].max() <= 2.1 * MASKED_DENSITY  # two unmasked halos may overlap
    assert change[mask > 0].max() > 0.15
    far = np.ones_like(mask, bool)
    for y, x in np.argwhere(mask > 0):
        far[max(0, y - 9) : y + 10, max(0, x - 9) : x + 10] = False
    assert np.array_equal(drawn[:, :, 0][far], image[:, :, 0][far])


@pytest.mark.parametrize("level", [0.0, 0.4])
def test_every_kind_leaves_something_in_the_picture_whatever_the_seed(level: float) -> None:
    image = grey(96, 110, level)
    for seed in range(60):
        for kind in KINDS:
            assert draw_devices(image, [kind], np.random.default_rng((seed, 7)))[1].any(), (seed, kind)


def test_most_of_a_mask_is_really_brighter() -> None:
    shares = []
    for seed in range(30):
        image = grey()
        drawn, mask = draw_devices(image, [KINDS[seed % 4]], np.random.default_rng(seed))
        shares.append(((drawn - image)[:, :, 0][mask > 0] > 0.005).mean())
    assert np.median(shares) > 0.85


def test_the_image_stays_in_range_and_the_input_is_not_modified() -> None:
    for level in (0.0, 1.0):
        image = grey(level=level)
        drawn, _ = draw_devices(image, KINDS, np.random.default_rng(1), strength=5.0)
        assert drawn.min() >= 0.0 and drawn.max() <= 1.0
        assert np.array_equal(image, grey(level=level))


def test_a_device_is_screened_over_the_anatomy_instead_of_painted() -> None:
    rng = np.random.default_rng(5)
    image = np.clip(grey() + rng.normal(0, 0.05, (224, 256, 1)), 0, 1).astype(np.float32)
    drawn, mask = draw_devices(image, ["tube"], np.random.default_rng(2))
    here = mask > 0
    assert np.corrcoef(drawn[here, 0], image[here, 0])[0, 1] > 0.5


def test_the_same_seed_draws_the_same_and_another_seed_something_else() -> None:
    first, second, other = (draw_devices(grey(), KINDS, np.random.default_rng(seed)) for seed in (4, 4, 5))
    assert np.array_equal(first[0], second[0]) and np.array_equal(first[1], second[1])
    assert not np.array_equal(first[1], other[1])


def test_strength_makes_the_same_device_stand_out_more() -> None:
    faint, plain = (draw_devices(grey(), ["line"], np.random.default_rng(8), strength)[0] for strength in (0.5, 1.0))
    assert (plain - grey()).max() > 1.5 * (faint - grey()).max()


def test_no_kinds_leave_the_image_as_it_is() -> None:
    drawn, mask = draw_devices(grey(), [], np.random.default_rng(0))
    assert np.array_equal(drawn, grey()) and not mask.any()


def test_a_device_keeps_its_share_of_the_picture_when_the_picture_grows() -> None:
    for kind in KINDS:
        shares = []
        for side in (96, 320):
            masks = [draw_devices(grey(side, side), [kind], np.random.default_rng(seed))[1] for seed in range(12)]
            shares.append(np.mean([(mask > 0).mean() for mask in masks]))
        assert 0.4 < shares[1] / shares[0] <= 1.3, kind


@pytest.mark.parametrize(
    ("image", "kinds", "strength", "named"),
    [
        (grey(), ["tube", "pacemaker"], 1.0, "pacemaker"),
        (grey()[:, :, 0], ["tube"], 1.0, r"\(224, 256\)"),
        (grey(40, 80), ["tube"], 1.0, r"\(40, 80, 1\)"),
        (np.zeros((80, 80, 1), np.uint8), ["tube"], 1.0, "uint8"),
        (grey(), ["tube"], 0.0, "strength"),
    ],
)
def test_wrong_input_is_refused_by_name(image: np.ndarray, kinds: list[str], strength: float, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        draw_devices(image, kinds, np.random.default_rng(0), strength)


def test_kinds_are_picked_as_often_as_in_the_public_archive() -> None:
    rng = np.random.default_rng(0)
    picks = [pick_kinds(rng) for _ in range(4000)]
    assert all(1 <= len(pick) <= 4 and len(set(pick)) == len(pick) for pick in picks)
    counts = Counter(kind for pick in picks for kind in pick)
    for kind, share in {"electrode": 0.45, "tube": 0.45, "line": 0.40, "clip": 0.25}.items():
        assert counts[kind] / len(picks) == pytest.approx(share, abs=0.04)
