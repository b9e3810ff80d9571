"""Names, dates and numbers planted in all tags of DICOM files are in nothing that a whole run leaves behind."""

import io
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pandas as pd
import pytest
from dicom_files import SYNTAXES, make_dataset, make_dicom
from PIL import Image
from pydicom.datadict import dictionary_VR, keyword_dict
from recipe import FLAGS

from tasks.drawings.sample import write_sample
from tasks.files import REPOSITORY

GROUPS = ("--ingestion.groups", "site", "--ingestion.groups", "sex")
MORE = ("--quality.min-images", "1", "--screening.n-review", "20", *GROUPS)
WORD, NAME, NUMBER = "zqplantedword", "Zqplanted^Nameword", "480199737"
DAY, TIME, UID = "19570313", "031459.265", "1.2.77.88.99.44551"
VALUES = {"LO": WORD, "SH": WORD, "ST": WORD, "LT": WORD, "UT": WORD, "UC": WORD, "PN": NAME, "DA": DAY, "TM": TIME}
VALUES |= {"DT": DAY + TIME, "UI": UID, "AS": "057Y", "CS": WORD.upper(), "IS": "480199737", "AE": WORD}
NEEDED = ("SOPClassUID", "PatientID", "InstitutionName", "PatientSex", "BodyPartExamined", "NumberOfFrames")
SHAPING = (
    *("ViewPosition", "PhotometricInterpretation", "PresentationLUTShape", "VOILUTFunction", "TransferSyntaxUID"),
    *("PresentationIntentType", "SpecificCharacterSet", "BurnedInAnnotation"),
)
PICTURE = re.compile(rb"base64,[\w+/=]+")
"""Of a page: by chance four of its letters are those of an age."""
NOT_OF_IMAGES = (0x0000, 0x0002, 0x0004, 0x0006)


def planted_tags() -> dict[str, Any]:
    """A value for each tag of the dictionary that holds text and decides nothing about the pixels."""
    fit = make_dataset(np.zeros((2, 2), np.uint8))
    return {
        keyword: VALUES[dictionary_VR(tag)]
        for keyword, tag in keyword_dict.items()
        if keyword and keyword not in fit and keyword not in (*NEEDED, *SHAPING)
        if dictionary_VR(tag) in VALUES and tag >> 16 not in NOT_OF_IMAGES and not keyword.startswith("Overlay")
    }


def write_planted(folder: Path) -> int:
    """The drawn sample as DICOM files below ``folder``, with planted tags; returns how many tags."""
    tags = planted_tags()
    write_sample(
        folder.parent / "drawn", folder.parent / "truth", n_images=60, side_px=128, seed=7, device_effect="natural"
    )
    for i, path in enumerate(sorted((folder.parent / "drawn" / "chest_xray").glob("*/*/*.jpeg"))):
        try:
            pixels = np.asarray(Image.open(path).convert("L"))
            pixels = pixels[: len(pixels) // 2 * 2]  # GDCM does not encode an odd number of pixels without loss
        except OSError:  # the sample has a broken file
            continue
        target = folder / path.parent.parent.name / path.parent.name / f"{i:04d}"
        target.parent.mkdir(parents=True, exist_ok=True)
        more: dict[str, Any] = {"PatientID": f"{NUMBER}-{i}", "PatientSex": "FM"[i % 2]}
        more |= {"InstitutionName": f"House {i % 3}"}
        target.write_bytes(make_dicom(pixels, SYNTAXES[i % len(SYNTAXES)], **tags | more))
    return len(tags)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_no_planted_tag_is_in_a_run_its_cache_its_log_or_its_artifacts(
    guarded_server: dict[str, str], tmp_path: Path
) -> None:
    assert write_planted(tmp_path / "set") > 500
    assert all(
        mark.encode() in next((tmp_path / "set").rglob("0*")).read_bytes() for mark in (WORD, NAME, DAY, UID, NUMBER)
    )
    run, cache = tmp_path / "run", tmp_path / "cache"
    flags = ["--source", str(tmp_path / "set"), "--run-dir", str(run), "--storage.cache", str(cache)]
    command = [sys.executable, "-m", "flows.pipeline", *FLAGS, *MORE, *flags, "--storage.raw", str(tmp_path / "raw")]
    done = subprocess.run(command, cwd=REPOSITORY, env=guarded_server, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout + done.stderr
    with httpx.Client(auth=("user", "of-the-tests"), timeout=60) as client:
        api = guarded_server["PREFECT_API_URL"]
        token = client.get(f"{api}/csrf-token", params={"client": "test"}).json()["token"]
        headers = {"Prefect-Csrf-Token": token, "Prefect-Csrf-Client": "test"}
        for what in ("artifacts", "logs", "flow_runs", "task_runs"):
            said += client.post(f"{api}/{what}/filter", json={"limit": 200}, headers=headers).text
    left = {"log and artifacts": said.encode()}
    for path in (p for place in (run, cache, tmp_path / "raw") for p in place.rglob("*") if p.is_file()):
        left[str(path)] = path.read_bytes()
        if path.suffix == ".parquet":
            left[str(path)] = pd.read_parquet(path).to_csv().encode()
        elif zipfile.is_zipfile(io.BytesIO(left[str(path)])):
            with zipfile.ZipFile(path) as archive:
                left[str(path)] = b"".join(archive.read(name) for name in archive.namelist())
    assert len(left) > 50
    left = {place: PICTURE.sub(b"", content) for place, content in left.items()}
    for mark in (WORD, WORD.upper(), NAME, "Nameword", DAY, TIME, UID, NUMBER, "057Y"):
        assert [place for place, content in left.items() if mark.encode() in content] == [], mark
    groups = json.loads((run / "metrics.json").read_text())["by_group"]["test"]
    assert set(groups) == {"site", "sex"} and set(groups["site"]) == {"House 0", "House 1", "House 2"}
    page = (run / "report" / "index.html").read_text()
    assert "Test, site: House 1" in page
    manifest = pd.read_parquet(run / "manifest.parquet")
    assert manifest["patient_id"].str.fullmatch("P-[0-9a-f]{16}").all() and manifest["patient_id"].nunique() > 10
