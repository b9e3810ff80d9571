"""LIME: the library's numbers by faster means, a fair choice of images, and readable pictures."""

import numpy as np
import pandas as pd
import pytest
from lime.lime_image import LimeImageExplainer

from tasks.array_lime import cut_pieces
from tasks.explanations import choose_images, draw_explanation, explain_image
from tasks.settings import ExplanationSettings

SETTINGS = ExplanationSettings(n_samples=200, n_segments=20, batch_size=64)


def x_ray(side: int = 64) -> np.ndarray:
    rng = np.random.default_rng(0)
    ramp = np.linspace(0.2, 0.8, side, dtype=np.float32)
    return np.clip(ramp[:, None] * ramp[None, :] + rng.normal(0, 0.05, (side, side)), 0, 1).astype(np.float32)[
        ..., None
    ]


def lower_right(grey: np.ndarray) -> np.ndarray:
    """A network that reads the lower right quarter only."""
    side = grey.shape[1]
    return np.asarray(grey[:, side // 2 :, side // 2 :].mean((1, 2)) * 0.9, np.float64)


def test_weights_equal_those_of_the_stock_library() -> None:
    pixels = x_ray()
    ours = explain_image(pixels, lower_right, SETTINGS, seed=3)

    def rgb_network(images: np.ndarray) -> np.ndarray:
        probability = lower_right(images[..., 0].astype(np.float32))
        return np.stack([1 - probability, probability], axis=1)

    stock = LimeImageExplainer(random_state=3).explain_instance(
        np.repeat(pixels, 3, axis=2).astype(np.float64),
        rgb_network,
        labels=(1,),
        top_labels=None,
        num_samples=SETTINGS.n_samples,
        segmentation_fn=lambda _: cut_pieces(pixels[..., 0], SETTINGS.n_segments),
        random_seed=3,
    )
    weights = dict(stock.local_exp[1])
    np.testing.assert_allclose(ours["weights"], [weights[i] for i in range(len(weights))], atol=1e-5)


def test_weight_lies_where_the_network_looks() -> None:
    result = explain_image(x_ray(), lower_right, SETTINGS, seed=1)
    weights, segments = np.abs(result["weights"]), result["segments"]
    inside = np.zeros(segments.shape, bool)
    inside[32:, 32:] = True
    touching = [i for i in range(len(weights)) if inside[segments == i].any()]
    assert len(touching) < 0.5 * len(weights)
    assert weights[touching].sum() > 0.95 * weights.sum()


def test_a_constant_network_gives_no_weight_and_no_nan() -> None:
    result = explain_image(x_ray(), lambda grey: np.full(len(grey), 0.3), SETTINGS, seed=1)
    assert np.abs(result["weights"]).max() == pytest.approx(0, abs=1e-9)
    assert result["r2"] is None or np.isfinite(result["r2"])


def test_a_constant_image_is_explained_without_a_crash() -> None:
    result = explain_image(np.zeros((64, 64, 1), np.float32), lower_right, SETTINGS, seed=1)
    assert np.isfinite(result["weights"]).all()


def test_images_are_chosen_evenly_over_right_and_wrong_of_each_class() -> None:
    table = pd.DataFrame(
        {
            "image_id": [f"{i:02d}" for i in range(40)],
            "split": "test",
            "label": [0, 1] * 20,
            "decision": [0, 1] * 16 + [1, 0] * 4,
            "subtype": "unknown",
            "has_device": np.nan,
            "probability": 0.5,
        }
    )
    chosen = choose_images(table, 12, seed=1)
    assert chosen.groupby(["label", "right"]).size().tolist() == [3, 3, 3, 3]
    assert chosen["has_device"].isna().all()
    assert choose_images(table, 12, seed=1)["image_id"].tolist() == chosen["image_id"].tolist()
    assert len(choose_images(table, 100, seed=1)) == 40


def test_the_picture_tints_for_red_and_against_blue() -> None:
    segments = np.zeros((64, 64), int)
    segments[:, 32:] = 1
    picture = np.asarray(draw_explanation(np.full((64, 64, 1), 0.5, np.float32), segments, [1.0, -1.0])).astype(int)
    width = (picture.shape[1] - 8) // 2
    red_side, blue_side = picture[160, width + 8 + 80], picture[160, width + 8 + 240]
    assert red_side[0] > red_side[2]
    assert blue_side[2] > blue_side[0]
    assert np.ptp(picture[160, 80]) == 0, "the left half is the plain X-ray"
