"""The network: its contract, its layers, and loading only what was saved."""

import zipfile
from pathlib import Path

import numpy as np
import pytest

from tasks.errors import RunError
from tasks.files import sha256_of_file
from tasks.networks.classifier import Calibrate, answer, build_member, join_members, predict, set_calibration
from tasks.networks.files import load_checked, load_network, save_network
from tasks.networks.keras_backend import keras
from tasks.networks.normalisation import LocalContrast, Standardise
from tasks.settings import TrainingSettings

TINY = TrainingSettings(side_px=32, width=4)


@pytest.fixture(scope="module")
def network() -> keras.Model:
    return join_members([build_member(TINY, seed, f"member_{seed}") for seed in (1, 2)])


def x_rays(n: int = 4, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 224, 224), dtype=np.uint8)


def test_the_answer_is_one_probability_an_image(network: keras.Model) -> None:
    answers = predict(network, x_rays(5), batch_size=2)
    assert answers.shape == (5,)
    assert ((answers > 0) & (answers < 1)).all()


def test_the_answer_does_not_depend_on_the_batch(network: keras.Model) -> None:
    together, alone = predict(network, x_rays(3), batch_size=3), predict(network, x_rays(3), batch_size=1)
    np.testing.assert_allclose(together, alone, atol=1e-6)


def test_the_model_s_logit_is_the_mean_of_its_members_logits(network: keras.Model) -> None:
    said = answer(network, x_rays(6))
    assert said.members.shape == (6, 2)
    members = np.log(said.members / (1 - said.members))
    np.testing.assert_allclose(np.log(said.probability / (1 - said.probability)), members.mean(1), atol=1e-4)
    assert np.abs(members[:, 0] - members[:, 1]).min() > 1e-4, "two seeds, two networks"


def test_a_single_member_is_the_model() -> None:
    said = answer(join_members([build_member(TINY, 1)]), x_rays(3))
    np.testing.assert_allclose(said.members[:, 0], said.probability, atol=1e-7)


def test_no_images_get_no_answers(network: keras.Model) -> None:
    said = answer(network, x_rays(0))
    assert said.probability.shape == (0,)
    assert said.members.shape == (0, 2)


def test_calibration_is_kept_in_the_saved_model(tmp_path: Path) -> None:
    model = join_members([build_member(TINY, 1)])
    before = answer(model, x_rays())
    set_calibration(model, "probability", 2.0, -0.5)
    set_calibration(model, "bacteria", 0.5, 1.0)
    save_network(model, tmp_path)
    after = answer(load_network(tmp_path), x_rays())
    for name, slope, offset in (("probability", 2.0, -0.5), ("bacteria", 0.5, 1.0), ("members", 2.0, -0.5)):
        one, two = (np.log(p / (1 - p)) for p in (getattr(before, name), getattr(after, name)))
        np.testing.assert_allclose(two, slope * one + offset, atol=1e-4)


def test_however_far_a_logit_lies_its_probability_is_neither_0_nor_1() -> None:
    logits = np.array([[-1e6, 0.0], [1e6, 0.0], [40.0, 0.0]], np.float32)
    said = keras.ops.convert_to_numpy(Calibrate(0)(logits))[:, 0]
    assert said.dtype == np.float32
    assert (said > 0).all()
    assert (said < 1).all()


def test_the_same_seed_builds_the_same_network() -> None:
    one, two = build_member(TINY, seed=3), build_member(TINY, seed=3)
    for a, b in zip(one.get_weights(), two.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def logit(p: np.ndarray) -> np.ndarray:
    return np.log(p / (1 - p))


def test_overall_brightness_and_contrast_change_nothing(network: keras.Model) -> None:
    grey = x_rays(2).astype(np.float32)[..., None] / 255
    dim = 0.1 + 0.8 * grey
    bright, dull = (network.predict_on_batch(x)["probability"] for x in (grey, dim))
    change, spread = np.abs(logit(bright) - logit(dull)).max(), np.ptp(logit(bright))
    assert change < spread / 4


def test_local_contrast_takes_out_what_changes_slowly_over_the_image() -> None:
    fine = np.random.default_rng(0).random((2, 64, 64, 1), np.float32) * 0.2
    slope = np.linspace(0.0, 0.6, 64, dtype=np.float32)[None, :, None, None]
    plain, tilted = (keras.ops.convert_to_numpy(LocalContrast()(x)) for x in (fine + 0.3, fine + slope))
    middle = np.s_[:, 16:48, 16:48]
    assert np.corrcoef(plain[middle].ravel(), tilted[middle].ravel())[0, 1] > 0.95
    assert np.abs(tilted[:, 16:32].mean() - tilted[:, 32:48].mean()) < 0.1, "0.3 before"


def test_images_are_normalised_in_single_precision_whatever_a_gpu_computes_in() -> None:
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        half = build_member(TINY, 1)
    finally:
        keras.config.set_dtype_policy(before)
    kinds = {type(layer): layer.compute_dtype for layer in half.layers}
    assert kinds[LocalContrast] == kinds[Standardise] == "float32"
    assert kinds[keras.layers.Conv2D] == "bfloat16"


def test_a_constant_image_gets_a_finite_answer(network: keras.Model) -> None:
    assert np.isfinite(predict(network, np.zeros((1, 224, 224), np.uint8))).all()
    assert np.isfinite(predict(network, np.full((1, 224, 224), 255, np.uint8))).all()


def test_standardised_images_have_mean_0_and_deviation_1() -> None:
    out = keras.ops.convert_to_numpy(Standardise()(np.random.default_rng(0).random((3, 16, 16, 1), np.float32)))
    np.testing.assert_allclose(out.mean((1, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(out.std((1, 2, 3)), 1, atol=1e-2)


def test_a_saved_network_loads_safely_and_answers_alike(network: keras.Model, tmp_path: Path) -> None:
    save_network(network, tmp_path)
    np.testing.assert_allclose(predict(load_network(tmp_path), x_rays()), predict(network, x_rays()), atol=1e-6)


def test_a_changed_model_file_is_refused_by_name(network: keras.Model, tmp_path: Path) -> None:
    save_network(network, tmp_path)
    with (tmp_path / "model.keras").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(RunError, match=r"model\.keras does not match model\.sha256"):
        load_network(tmp_path)


def test_a_file_with_another_checksum_than_was_noted_is_not_opened(network: keras.Model, tmp_path: Path) -> None:
    save_network(network, tmp_path)
    with pytest.raises(RunError, match=r"model\.keras does not match its checksum"):
        load_checked(tmp_path / "model.keras", "0" * 64)


@pytest.mark.parametrize("said", ["", "\n", "no such layer\nand more"])
def test_a_model_that_does_not_load_is_refused_by_name_whatever_keras_raises(
    said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError(said)

    with zipfile.ZipFile(tmp_path / "model.keras", "w") as archive:
        archive.writestr("config.json", "{}")
    (tmp_path / "model.sha256").write_text(sha256_of_file(tmp_path / "model.keras"))
    monkeypatch.setattr(keras.saving, "load_model", fail)
    with pytest.raises(RunError) as raised:
        load_network(tmp_path)
    reason = said.strip().split("\n")[0] or "AssertionError"
    assert str(raised.value) == f"{tmp_path / 'model.keras'} does not load ({reason}): train again"


def test_a_missing_model_says_which_flow_makes_it(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="run the train flow"):
        load_network(tmp_path)
