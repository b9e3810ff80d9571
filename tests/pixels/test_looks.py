"""Pixels that cannot be those of a chest X-ray as it should be exported are told apart, and real ones are not."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tasks.drawings.chests import draw_chest, finish_film, imagine_child
from tasks.pixels.decoding import decode
from tasks.pixels.looks import MEAN_CHEST, judge_looks


@pytest.fixture(scope="module")
def chests() -> NDArray[np.uint8]:
    """Drawn X-rays, uint8 ``(12, 224, 224)``."""
    rng, drawn = np.random.default_rng(0), []
    for turn in range(12):
        film = draw_chest(imagine_child(rng), "bacteria" if turn % 2 else "normal", 0.5, (224, 224), rng)
        drawn.append((finish_film(film, rng) * 255).astype(np.uint8))
    return np.stack(drawn)


def test_chests_are_usual(chests: NDArray[np.uint8]) -> None:
    assert judge_looks(chests) == [""] * len(chests)
    assert judge_looks(chests[:0]) == []


def test_inverted_chests_are_found(chests: NDArray[np.uint8]) -> None:
    assert judge_looks(255 - chests) == ["inverted"] * len(chests)


def test_pictures_of_one_shade_and_those_with_unused_bits_are_flat(chests: NDArray[np.uint8]) -> None:
    assert judge_looks(np.stack([chests[0] * 0, chests[0] * 0 + 255, chests[0] // 16])) == ["flat"] * 3
    transparent, stream = np.zeros((224, 224, 4), np.uint8), io.BytesIO()
    transparent[..., :3] = chests[0][..., None]
    Image.fromarray(transparent).save(stream, "PNG")
    assert judge_looks(decode(stream.getvalue())[None]) == ["flat"]


def test_a_picture_whose_parts_are_all_alike_is_no_inverted_chest() -> None:
    assert judge_looks(np.tile(np.repeat(np.array([50, 150], np.uint8), 4), (1, 224, 28))) == [""]


def test_too_narrow_a_window_is_saturated_and_black_margins_are_not(chests: NDArray[np.uint8]) -> None:
    assert judge_looks(np.where(chests > 120, 255, 0).astype(np.uint8)) == ["saturated"] * len(chests)
    padded = np.zeros((1, 224, 224), np.uint8)
    padded[0, :, 70:154] = chests[0][:, 70:154]
    assert "saturated" not in judge_looks(padded)


def test_the_mean_chest_is_that_of_drawn_ones(chests: NDArray[np.uint8]) -> None:
    cells = chests.reshape(-1, 7, 32, 7, 32).mean((0, 2, 4))
    assert np.corrcoef(cells.ravel(), MEAN_CHEST.ravel())[0, 1] > 0.95


def test_no_real_x_ray_is_unusual_and_each_is_found_when_it_is_inverted(shared_data: Path) -> None:
    with zipfile.ZipFile(shared_data / "chest_xray_224.zip") as archive:
        names = [name for name in archive.namelist() if name.endswith(".jpeg") and "__MACOSX" not in name]
        pixels = np.stack([decode(archive.read(name)) for name in names[::29]])
    assert len(pixels) > 200
    assert set(judge_looks(pixels)) == {""}
    assert set(judge_looks(255 - pixels)) == {"inverted"}
