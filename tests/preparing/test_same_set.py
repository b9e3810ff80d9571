"""One drawn set, whatever its files are: the same manifest but for names and checksums, and the same decisions."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from dicom_files import draw, make_dicom
from numpy.typing import NDArray
from PIL import Image
from stage_steps import ingest_all, pack_all

from tasks.runs.run import Run
from tasks.settings import Settings

Pixels = NDArray[np.uint8]
SAME = ["width_px", "height_px", "label", "subtype", "source_split", "excluded", "duplicate_of"]


def encode(pixels: NDArray[np.uint8] | NDArray[np.uint16], form: str, **options: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, form, **options)
    return stream.getvalue()


def dicom(syntax: str) -> Callable[[Pixels, str], bytes]:
    bits = 8 if syntax == "jpeg" else 12
    return lambda pixels, patient: make_dicom(
        pixels if bits == 8 else np.rint(pixels / 255 * 4095).astype(np.uint16), syntax, bits, PatientID=patient
    )


FORMS: dict[str, Callable[[Pixels, str], bytes]] = {
    "png": lambda pixels, _: encode(pixels, "PNG"),
    "png_16": lambda pixels, _: encode(pixels.astype(np.uint16) * 257, "PNG"),
    "tiff": lambda pixels, _: encode(pixels, "TIFF"),
    "jpeg": lambda pixels, _: encode(pixels, "JPEG", quality=95),
    "raw": dicom("raw"),
    "rle": dicom("rle"),
    "baseline": dicom("jpeg"),
    "lossless": dicom("lossless"),
    "jpeg_ls": dicom("jpeg_ls"),
    "jpeg_2000": dicom("jpeg_2000"),
}
DRAWN = {
    f"{split}/{folder}/person{i}_{finding}_{i}": (i, finding)
    for split, start in (("train", 0), ("test", 50))
    for folder, finding, more in (("NORMAL", "normal", 0), ("PNEUMONIA", "virus", 100), ("PNEUMONIA", "bacteria", 200))
    for i in range(start + more, start + more + 10)
}


@pytest.fixture(scope="module")
def taken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[pd.DataFrame, Pixels]]:
    """For each form the manifest without endings, and the packed pixels in its order."""
    folder = tmp_path_factory.mktemp("forms")
    found = {}
    for form, write in FORMS.items():
        for name, (seed, finding) in DRAWN.items():
            path = folder / form / f"{name}.{form}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(write(draw(seed, finding), name))
        places = {"cache": str(folder / "cache"), "raw": str(folder / "raw")}
        settings = Settings(source=str(folder / form), run_dir=str(folder / f"run_{form}"), storage=places)
        pack_all(settings, ingest_all(settings)["folder"])
        manifest = Run(settings).manifest()
        pixels = Run(settings).images().read(list(manifest["image_id"]))
        found[form] = (manifest.assign(path=manifest["path"].str.rpartition(".")[0]), pixels)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_the_same_set_has_the_same_manifest(taken: dict[str, tuple[pd.DataFrame, Pixels]], form: str) -> None:
    (wanted, squares), (manifest, pixels) = taken["png"], taken[form]
    assert len(manifest) == len(DRAWN)
    pd.testing.assert_frame_equal(manifest[["path", *SAME]], wanted[["path", *SAME]])
    assert manifest["patient_id"].nunique() == wanted["patient_id"].nunique()
    difference = np.abs(pixels.astype(int) - squares)
    print(f"{form}: mean difference {difference.mean():.3f}, largest {difference.max()} grey levels")
    assert difference.mean(axis=(1, 2)).max() <= 1


@pytest.mark.slow
def test_the_model_decides_the_same_on_99_of_100_images(
    taken: dict[str, tuple[pd.DataFrame, Pixels]], finished_run: Path
) -> None:
    from tasks.networks.classifier import predict
    from tasks.networks.files import load_network

    model = load_network(finished_run)
    said = {form: predict(model, pixels) for form, (_, pixels) in taken.items()}
    # Through the middle: a network of two epochs may call all of them pneumonia at the threshold of its run.
    decisions = {form: probabilities >= np.median(said["png"]) for form, probabilities in said.items()}
    equal = {form: float((decided == decisions["png"]).mean()) for form, decided in decisions.items()}
    print(equal, f"pneumonia: {decisions['png'].mean():.2f}")
    assert 0 < decisions["png"].mean() < 1 and min(equal.values()) >= 0.99
