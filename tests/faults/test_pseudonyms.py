"""What a run shows of patients: image ids and pseudonyms, never names of the source, nor what its files carry."""

import hashlib
import io
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pandas as pd
import pytest
from PIL import Image, PngImagePlugin
from recipe import FLAGS

from tasks.devices.answers import FORMULA
from tasks.files import REPOSITORY
from tasks.pixels.decoding import decode
from tasks.preparing.quality import name_patients
from tasks.preparing.screening import describe_excluded
from tasks.runs.manifest import MANIFEST_DTYPES

MARK = "planted-patient-word-43"
MORE = ("--quality.min-images", "1", "--screening.n-review", "20")


def manifest_of(patients: list[str]) -> pd.DataFrame:
    sums = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(len(patients))]
    return pd.DataFrame({"patient_id": patients, "sha256": sums}).astype(
        {name: MANIFEST_DTYPES[name] for name in ("patient_id", "sha256")}
    )


def test_a_patient_has_one_pseudonym_that_nobody_can_try_out_without_the_data() -> None:
    names = name_patients(manifest_of(["person1", "person1", "person2", "person3"]))
    assert names[0] == names[1] and names.nunique() == 3
    assert all(re.fullmatch("P-[0-9a-f]{8}", name) for name in names)
    assert list(names) == list(name_patients(manifest_of(["person1", "person1", "person2", "person3"])))
    other = manifest_of(["person1", "person1", "person2", "person3"]).assign(sha256=list("abcd"))
    assert not set(name_patients(other)) & set(names), "other data, other names"


def test_no_cell_of_the_list_of_excluded_images_is_run_by_a_spreadsheet_and_paths_survive_it() -> None:
    paths = ["=cmd|' /C calc'!A0.png", "+1.png", "-2.png", "@x.png", "a\nb.png", "train/NORMAL/a.png"]
    reasons = ["undecodable: =1+1", "duplicate of =x.png", *["conflict: the same picture as -x.png"] * 4]
    text = describe_excluded(pd.DataFrame({"path": paths, "excluded": reasons}))
    read = pd.read_csv(io.StringIO(text), dtype=str, keep_default_na=False)
    assert not [cell for row in read.itertuples(index=False) for cell in row if str(cell).startswith(FORMULA)]
    assert [path.removeprefix("./") for path in read["path"]] == paths


def planted_picture(kind: str, seed: int) -> bytes:
    """A picture whose metadata name a patient, in every place that its format has."""
    pixels = np.random.default_rng(seed).integers(0, 255, (96, 96), dtype=np.uint8)
    image, stream, exif = Image.fromarray(pixels), io.BytesIO(), Image.Exif()
    exif[0x010E] = exif[0x013B] = MARK
    if kind == "PNG":
        info = PngImagePlugin.PngInfo()
        info.add_text("Patient", MARK)
        info.add_itxt("Comment", MARK)
        image.save(stream, "PNG", pnginfo=info, exif=exif)
    else:
        image.save(stream, "JPEG", exif=exif, comment=MARK.encode())
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_decoding_keeps_pixels_and_nothing_else(kind: str) -> None:
    content = planted_picture(kind, 0)
    assert MARK.encode() in content
    assert MARK.encode() not in decode(content).tobytes()


@pytest.fixture(scope="module")
def marked_run(guarded_server: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A whole run on the sample with a mark in names, patients and metadata; and what the server and the log say."""
    from tasks.drawings.sample import write_sample

    folder = tmp_path_factory.mktemp("marked")
    write_sample(folder / "drawn", folder / "truth", n_images=60, side_px=128, seed=7, device_effect="natural")
    with zipfile.ZipFile(folder / "set.zip", "w") as archive:
        for path in sorted((folder / "drawn").rglob("*.jpeg")):
            name = path.relative_to(folder / "drawn").as_posix()
            if name.startswith("chest_xray/chest_xray/") or "__MACOSX" in name or path.name.startswith("."):
                continue
            stream, exif = io.BytesIO(), Image.Exif()
            exif[0x010E] = MARK
            try:
                Image.open(path).save(stream, "JPEG", exif=exif, comment=MARK.encode(), quality=95)
            except OSError:
                continue
            archive.writestr(name, stream.getvalue())
    run = folder / "run"
    flags = ["--source", str(folder / "set.zip"), "--run-dir", str(run), "--storage.cache", str(folder / "cache")]
    done = subprocess.run(
        [sys.executable, "-m", "flows.pipeline", *FLAGS, *MORE, *flags, "--storage.raw", str(folder / "raw")],
        cwd=REPOSITORY,
        env=guarded_server,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with httpx.Client(auth=("user", "of-the-tests"), timeout=60) as client:
        api = guarded_server["PREFECT_API_URL"]
        token = client.get(f"{api}/csrf-token", params={"client": "test"}).json()["token"]
        headers = {"Prefect-Csrf-Token": token, "Prefect-Csrf-Client": "test"}
        shown = [
            client.post(f"{api}/{what}/filter", json={"limit": 200}, headers=headers).text
            for what in ("artifacts", "logs", "flow_runs", "task_runs")
        ]
    yield run, done.stdout + done.stderr + "".join(shown)


SHOWN = ("report/index.html", "model_card.md", "metrics.json", "audit.json", "run.json")


@pytest.mark.long
def test_neither_report_nor_card_nor_checks_nor_artifacts_nor_logs_name_a_patient_or_a_file(
    marked_run: tuple[Path, str],
) -> None:
    run, said = marked_run
    manifest = pd.read_parquet(run / "manifest.parquet")
    assert manifest["path"].str.contains("person").any()
    names = {*manifest["path"], *(Path(path).name for path in manifest["path"])}
    names |= {patient for patient in manifest["patient_id"] if len(patient) > 5}
    places = [run / name for name in SHOWN] + [p for p in (run / "checks").rglob("*") if p.is_file()]
    places += list((run / "explanations").rglob("*.json"))
    for path in places:
        text = path.read_text(errors="replace")
        assert not [name for name in names if name in text], path
    assert not [name for name in names if name in said]


@pytest.mark.long
def test_metadata_of_the_images_are_in_nothing_that_a_run_writes(marked_run: tuple[Path, str]) -> None:
    run, said = marked_run
    files = [p for place in (run, run.parent / "cache") for p in place.rglob("*") if p.is_file()]
    assert len(files) > 50
    assert [p for p in files if MARK.encode() in p.read_bytes()] == []
    assert MARK not in said
    for path in files:
        if path.suffix == ".png":
            with Image.open(path) as picture:
                assert not picture.getexif() and not getattr(picture, "text", {})


@pytest.mark.long
def test_the_team_finds_a_file_again_by_its_image_id(marked_run: tuple[Path, str]) -> None:
    run, _ = marked_run
    manifest = pd.read_parquet(run / "manifest.parquet").set_index("image_id")
    shown = re.findall(r"Image ([0-9a-f]{16})", (run / "report" / "index.html").read_text())
    assert shown and set(shown) <= set(manifest.index)
    said = json.loads((run / "run.json").read_text())
    assert "path" not in said
