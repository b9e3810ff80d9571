"""Whatever a DICOM or TIFF holds: grey pixels or a named refusal, in bounded time and memory; no tag is quoted."""

import contextlib
import io
import time
from functools import cache
from typing import Any

import numpy as np
import pydicom
import pytest
from dicom_files import SYNTAXES, draw, make_dataset, make_dicom, write
from fault_table import FaultTable
from hostile import DAMAGES, bounded_memory, damage, hostile  # noqa: F401
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.sequence import Sequence

from tasks.pixels.content import UndecodableError
from tasks.pixels.decoding import decode, read_header
from tasks.pixels.greys import SIDE_PX

MARK = "planted-name"
SEEDS = st.integers(0, 2**32 - 1)


@cache
def sound(syntax: str) -> bytes:
    return make_dicom(draw(height_px=48), syntax, PatientName=MARK, StudyDescription=MARK, InstitutionName=MARK)


def is_read_or_refused(faults: FaultTable, data: bytes) -> None:
    faults.n_cases += 1
    start = time.monotonic()
    for read in (lambda: read_header(data, 5_000), lambda: decode(data, max_side_px=5_000)):
        try:
            found: Any = read()
        except UndecodableError as error:
            assert str(error).isprintable() and len(str(error)) < 200 and MARK not in str(error), str(error)
        else:
            assert isinstance(found, dict) or (found.shape == (SIDE_PX, SIDE_PX) and found.dtype == np.uint8)
            assert MARK not in str(found)
    assert time.monotonic() - start < 130


@given(syntax=st.sampled_from(SYNTAXES), kind=st.sampled_from(DAMAGES), seed=SEEDS)
@hostile
def test_a_damaged_dicom_is_read_or_refused(faults: FaultTable, syntax: str, kind: str, seed: int) -> None:
    is_read_or_refused(faults, damage(sound(syntax), kind, seed))


@given(
    syntax=st.sampled_from(SYNTAXES[3:]), kind=st.sampled_from(DAMAGES), seed=SEEDS, n_bytes=st.sampled_from([90, 9**9])
)
@hostile
def test_a_dicom_with_a_damaged_stream_is_read_or_refused(
    faults: FaultTable, syntax: str, kind: str, seed: int, n_bytes: int
) -> None:
    dataset = pydicom.dcmread(io.BytesIO(sound(syntax)))
    frame = next(generate_frames(dataset.PixelData, number_of_frames=1))
    dataset.PixelData = encapsulate([damage(frame[:n_bytes], kind, seed) + frame[n_bytes:] or b"\0"])
    is_read_or_refused(faults, write(dataset))


ODD: dict[str, list[Any]] = {
    "Rows": [0, 1, 47, 65_535],
    "Columns": [0, 1, 61, 65_535],
    "BitsAllocated": [0, 1, 8, 12, 16, 32, 64],
    "BitsStored": [0, 1, 7, 16, 33],
    "HighBit": [0, 3, 31],
    "PixelRepresentation": [0, 1, 2],
    "SamplesPerPixel": [0, 1, 3],
    "NumberOfFrames": [0, 1, -1, 10**6],
    "PlanarConfiguration": [0, 5],
    "WindowCenter": ["1e308", "-1", "0", ["1", "2"], ""],
    "WindowWidth": ["1e308", "-1", "0", "1", ["1"], ""],
    "RescaleSlope": ["0", "-1e300", "1e-300"],
    "RescaleIntercept": ["1e308", "-9"],
    "PixelPaddingValue": [0, 255, 65_535],
    "PatientAge": ["999Y", "", "abc", "-1Y"],
    "PatientID": ["", "\\", "a" * 64, "4\\5"],
    "SOPClassUID": ["", "1.2", MARK],
    "BodyPartExamined": [["CHEST", "KNEE"], MARK.upper()],
    "PhotometricInterpretation": ["", "MONOCHROME1", "RGB", MARK],
    "VOILUTFunction": ["", "LINEAR_EXACT", "SIGMOID", MARK],
    "PresentationLUTShape": ["", "INVERSE", MARK],
}


@given(
    tags=st.dictionaries(st.sampled_from(sorted(ODD)), SEEDS, min_size=1, max_size=5),
    lut=st.lists(st.integers(0, 65_535), max_size=4),
)
@hostile
@pytest.mark.filterwarnings("ignore")
def test_a_dicom_with_odd_tags_is_read_or_refused(faults: FaultTable, tags: dict[str, int], lut: list[int]) -> None:
    dataset = make_dataset(draw(height_px=48), PatientName=MARK)
    for keyword, at in tags.items():
        setattr(dataset, keyword, ODD[keyword][at % len(ODD[keyword])])
    if lut:
        item = Dataset()
        item.LUTDescriptor, item.LUTData = (lut * 3)[:3], bytes(lut[0] % 600)
        item["LUTDescriptor"].VR, item["LUTData"].VR = "US", "OW"
        dataset.VOILUTSequence = Sequence([item])
    try:
        data = write(dataset)
    except Exception:  # what pydicom does not write, no file holds in this way
        return
    is_read_or_refused(faults, data)


@given(
    compression=st.sampled_from(["raw", "tiff_lzw", "tiff_deflate", "packbits", "group4", "jpeg"]),
    mode=st.sampled_from(["L", "I;16", "RGB", "1"]),
    kind=st.sampled_from(DAMAGES),
    seed=SEEDS,
)
@hostile
def test_a_damaged_tiff_is_read_or_refused(
    faults: FaultTable, compression: str, mode: str, kind: str, seed: int
) -> None:
    drawn, stream = draw(height_px=48), io.BytesIO()
    picture = Image.fromarray(drawn.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(drawn).convert(mode)
    try:
        picture.save(stream, "TIFF", compression=compression, description=MARK)
    except (OSError, ValueError, RuntimeError):  # a compression that does not go with the mode
        stream = io.BytesIO()
        picture.save(stream, "TIFF", description=MARK)
    data = damage(stream.getvalue(), kind, seed)
    is_read_or_refused(faults, data)
    with contextlib.suppress(UndecodableError):
        assert read_header(data, 5_000)["bits"] in (None, *range(17))
