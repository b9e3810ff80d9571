"""Whether an image looks like the chest X-rays a network was trained on: what is refused, what is not, and the file."""

import io
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from tasks.errors import RunError
from tasks.networks.familiarity import (
    FILE,
    MARGIN,
    MIN_IMAGES,
    Familiarity,
    choose_bound,
    fit_familiarity,
    load_familiarity,
    save_familiarity,
)
from tasks.pixels.decoding import decode
from tasks.pixels.greys import SIDE_PX


@pytest.fixture(scope="module")
def chests(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """Drawn chest X-rays in an order by chance, uint8 ``(n, 224, 224)``."""
    from tasks.drawings.sample import write_sample

    folder = tmp_path_factory.mktemp("drawn")
    write_sample(folder / "set", folder / "truth", n_images=200, side_px=96, seed=3)
    paths = sorted(path for path in folder.glob("set/**/*.jpeg") if not path.name.startswith("."))
    pixels = np.unique(np.stack([decode(path.read_bytes()) for path in paths]), axis=0)
    return np.random.default_rng(1).permutation(pixels)


@pytest.fixture(scope="module")
def known(chests: np.ndarray) -> np.ndarray:
    return chests[:120]


@pytest.fixture(scope="module")
def others(chests: np.ndarray) -> np.ndarray:
    return chests[120:]


@pytest.fixture(scope="module")
def familiarity(known: np.ndarray) -> Familiarity:
    return fit(known)


def fit(packed: np.ndarray, seed: int = 7) -> Familiarity:
    """Fitted in one batch, seeded as calibration does."""
    return fit_familiarity([packed], [seed, len(packed)])


def refused(familiarity: Familiarity, packed: np.ndarray) -> float:
    """The share of images that are refused."""
    return float((familiarity.distances(packed) > familiarity.bound).mean())


def squares(*images: np.ndarray) -> np.ndarray:
    """Pictures of any size as packed pixels, some parts of each too."""
    made = []
    for image in images:
        grey = Image.fromarray(image).convert("L")
        side = min(grey.size)
        boxes = ((0, 0, *grey.size), (0, 0, side, side), (side // 4, side // 4, side, side))
        made += [grey.crop(box).resize((SIDE_PX, SIDE_PX), Image.Resampling.BILINEAR) for box in boxes]
    return np.stack([np.asarray(image) for image in made])


def charts(n: int) -> np.ndarray:
    from matplotlib.figure import Figure

    made, rng = [], np.random.default_rng(2)
    for i in range(n):
        figure: Any = Figure(figsize=(4, 4), dpi=60)
        axes = figure.add_subplot()
        _ = axes.plot(rng.normal(size=40).cumsum()) if i % 2 else axes.bar(range(8), rng.random(8))
        stream = io.BytesIO()
        figure.savefig(stream, format="png")
        made.append(decode(stream.getvalue()))
    return np.stack(made)


def strange_images(kind: str, chests: np.ndarray) -> np.ndarray:
    """Images of a kind that no chest X-ray is, or chest X-rays spoilt in a way."""
    import skimage.data

    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 255, SIDE_PX)
    kinds: dict[str, Callable[[], np.ndarray]] = {
        "photos": lambda: squares(skimage.data.astronaut(), skimage.data.coffee(), skimage.data.chelsea()),
        "textures": lambda: squares(skimage.data.brick(), skimage.data.gravel(), skimage.data.coins()),
        "text": lambda: squares(skimage.data.page(), skimage.data.text()),
        "charts": lambda: charts(6),
        "noise": lambda: rng.integers(0, 256, (6, SIDE_PX, SIDE_PX), np.uint8),
        "blank": lambda: np.stack([np.full((SIDE_PX, SIDE_PX), grey, np.uint8) for grey in (0, 90, 255)]),
        "gradients": lambda: np.stack([np.add.outer(a * ramp, b * ramp) for a, b in ((0, 1), (1, 0), (0.5, 0.5))]),
        "turned by 90 degrees": lambda: np.rot90(chests, axes=(1, 2)),
        "upside down": lambda: chests[:, ::-1],
        "inverted": lambda: 255 - chests,
        "shuffled": lambda: np.roll(chests.reshape(-1, 4, 56, SIDE_PX)[:, [2, 0, 3, 1]], 60, 3).reshape(chests.shape),
    }
    return np.ascontiguousarray(kinds[kind]()).astype(np.uint8)


def test_other_images_of_the_same_kind_are_not_refused(familiarity: Familiarity, others: np.ndarray) -> None:
    assert refused(familiarity, others) <= 1 / len(others)
    assert np.median(familiarity.distances(others)) == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize("kind", ["photos", "textures", "text", "charts", "noise", "blank", "gradients"])
def test_what_is_no_chest_x_ray_is_refused(kind: str, familiarity: Familiarity, others: np.ndarray) -> None:
    assert refused(familiarity, strange_images(kind, others)) == 1


@pytest.mark.parametrize(
    ("kind", "least"), [("turned by 90 degrees", 0.95), ("upside down", 0.9), ("inverted", 1), ("shuffled", 1)]
)
def test_a_chest_x_ray_that_is_spoilt_is_refused(
    kind: str, least: float, familiarity: Familiarity, others: np.ndarray
) -> None:
    assert refused(familiarity, strange_images(kind, others)) >= least


def test_exposure_contrast_and_a_slight_turn_are_no_reason_to_refuse(
    familiarity: Familiarity, others: np.ndarray
) -> None:
    for changed in (
        255 * (others / 255) ** 0.7,
        255 * (others / 255) ** 1.4,
        60 + others * 0.5,
        ndimage.rotate(others, 6, axes=(2, 1), reshape=False, order=1),
        ndimage.shift(others, (0, 8, -8), order=1),
    ):
        assert refused(familiarity, changed.round().astype(np.uint8)) <= 0.02


def test_the_distance_of_an_image_does_not_depend_on_the_others(familiarity: Familiarity, others: np.ndarray) -> None:
    together = familiarity.distances(others)
    assert together.dtype == np.float64
    assert together.shape == (len(others),)
    np.testing.assert_array_equal(familiarity.distances(others[::-1])[::-1], together)
    np.testing.assert_array_equal(familiarity.distances(others[4:5]), together[4:5])
    assert familiarity.distances(others[:0]).shape == (0,)


def test_after_thirty_images_others_of_their_kind_are_not_refused(chests: np.ndarray) -> None:
    for start in (0, 30, 60, 90):
        few = fit(chests[start : start + 30])
        assert np.isfinite(few.bound)
        assert refused(few, np.delete(chests, np.s_[start : start + 30], axis=0)) <= 0.02


def test_after_too_few_images_nothing_is_refused(known: np.ndarray) -> None:
    for n in (1, 2, MIN_IMAGES - 1):
        few = fit(known[:n])
        assert few.bound == np.inf
        assert np.isfinite(few.distances(255 - known)).all()
    assert fit(known[:MIN_IMAGES]).bound < np.inf


def test_the_bound_is_wider_the_fewer_images_there_are() -> None:
    def bound(n: int) -> float:
        from scipy.stats import norm

        return choose_bound(np.exp(0.2 * norm.ppf((np.arange(n) + 0.5) / n)))

    assert bound(20) > bound(100) > bound(1_000) > bound(20_000)
    assert bound(20_000) == pytest.approx(MARGIN * np.exp(0.2 * 3.0902), rel=0.02)


def test_the_bound_is_never_below_what_all_but_one_in_a_thousand_show() -> None:
    distances = np.concatenate([np.ones(3_000), np.full(10, 5.0)])
    assert choose_bound(distances) >= MARGIN * 5.0


def test_images_that_are_all_the_same_are_familiar_and_others_are_not(known: np.ndarray) -> None:
    same = fit(np.repeat(known[:1], 30, axis=0))
    assert refused(same, known[:1]) == 0
    assert refused(same, 255 - known) == 1


def test_the_same_images_in_other_batches_give_the_same_file_and_another_seed_another(
    known: np.ndarray, familiarity: Familiarity, tmp_path: Path
) -> None:
    batched = fit_familiarity(np.array_split(known, 7), [7, len(known)])
    for name, each in (("a", familiarity), ("b", batched), ("c", fit(known, seed=8))):
        save_familiarity(each, tmp_path / name)
    a, b, c = ((tmp_path / name / FILE).read_bytes() for name in "abc")
    assert a == b != c


def test_without_an_image_nothing_is_learnt() -> None:
    with pytest.raises(ValueError, match="no image"):
        fit(np.empty((0, SIDE_PX, SIDE_PX), np.uint8))


@pytest.mark.parametrize("bound", [None, float("inf")])
def test_what_was_saved_is_what_is_loaded(
    bound: float | None, familiarity: Familiarity, others: np.ndarray, tmp_path: Path
) -> None:
    saved = familiarity if bound is None else replace(familiarity, bound=bound)
    save_familiarity(saved, tmp_path)
    loaded = load_familiarity(tmp_path)
    assert loaded.bound == saved.bound
    np.testing.assert_array_equal(loaded.distances(others), saved.distances(others))
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_a_missing_file_says_what_writes_it(tmp_path: Path) -> None:
    with pytest.raises(RunError) as raised:
        load_familiarity(tmp_path)
    assert str(raised.value) == f"{tmp_path / FILE} is missing: run the train flow on this run folder first"


class _Trap:
    """Something that would leave a trace, were it unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.trace,)


def test_a_broken_or_foreign_file_is_refused_by_name_and_nothing_in_it_is_run(
    familiarity: Familiarity, tmp_path: Path
) -> None:
    save_familiarity(familiarity, tmp_path / "good")
    good = (tmp_path / "good" / FILE).read_bytes()
    arrays = {each.name: np.asarray(getattr(familiarity, each.name)) for each in fields(Familiarity)}

    def pack(**changes: np.ndarray) -> bytes:
        stream = io.BytesIO()
        np.savez(stream, allow_pickle=True, **(arrays | changes))
        return stream.getvalue()

    lone, archive = io.BytesIO(), io.BytesIO()
    np.save(lone, arrays["mean"])
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr("mean.npy", "words")
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 0xFF
    broken = {
        "empty": b"",
        "text": b"these are words",
        "cut": good[: len(good) // 2],
        "flipped": bytes(flipped),
        "one array": lone.getvalue(),
        "another archive": archive.getvalue(),
        "pickle": pickle.dumps(_Trap(tmp_path / "trace")),
        "objects": pack(mean=np.array([_Trap(tmp_path / "trace")], object)),
        "no number": pack(mean=np.full_like(arrays["mean"], np.nan)),
        "words": pack(bound=np.array("far")),
        "other size": pack(mean=arrays["mean"][:-1]),
        "no axis": pack(axes=arrays["axes"][:, :0], spreads=arrays["spreads"][:0], turned=arrays["turned"][:0]),
        "no bound": pack(bound=np.array(np.nan)),
        "no spread": pack(spreads=np.zeros_like(arrays["spreads"])),
    }
    (tmp_path / "trace").unlink(missing_ok=True)
    for name, content in broken.items():
        path = tmp_path / name / FILE
        path.parent.mkdir()
        path.write_bytes(content)
        with pytest.raises(RunError) as raised:
            load_familiarity(path.parent)
        assert str(path) in str(raised.value), name
        assert "run the train flow on this run folder" in str(raised.value), name
    assert not (tmp_path / "trace").exists()


def test_on_real_x_rays_it_refuses_few_held_out_ones_and_nearly_all_that_are_spoilt(shared_data: Path) -> None:
    with zipfile.ZipFile(shared_data / "chest_xray_224.zip") as archive:
        names = sorted(n for n in archive.namelist() if "/train/" in n and "__MACOSX" not in n and n.endswith(".jpeg"))
        pixels = np.stack([decode(archive.read(name)) for name in names[::6]])
    held_out = np.arange(len(pixels)) // 20 % 3 == 0
    fitted = fit(pixels[~held_out])
    chests = pixels[held_out]
    assert len(chests) > 250
    assert refused(fitted, chests) <= 0.01
    for kind in ("photos", "textures", "text", "charts", "noise", "blank", "gradients"):
        assert refused(fitted, strange_images(kind, chests)) == 1, kind
    for kind in ("turned by 90 degrees", "upside down", "inverted", "shuffled"):
        assert refused(fitted, strange_images(kind, chests)) >= 0.98, kind
