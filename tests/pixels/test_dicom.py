"""A DICOM radiograph becomes the grey that a viewer shows, or is refused by name; nothing of its tags gets out."""

import resource
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import data_store
import numpy as np
import pydicom
import pytest
from dicom_files import SYNTAXES, draw, make_dataset, make_dicom, write
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.pixels.processing import apply_modality_lut, apply_voi_lut
from pydicom.sequence import Sequence
from pydicom.uid import JPEG2000Lossless

from tasks.pixels import dicom, dicom_reader
from tasks.pixels.content import UndecodableError, is_picture, name_content
from tasks.pixels.decoding import decode, read_header
from tasks.pixels.dicom import read_dicom

RAMP = np.arange(4096, dtype=np.uint16).reshape(64, 64)
FIXTURES = Path(data_store.__file__).parent / "data"


def grey(data: bytes, *classes: str) -> NDArray[np.uint8]:
    found: NDArray[np.uint8] = read_dicom(data, 20_000, classes or dicom.CLASSES)["grey"]
    return found


def notes(**tags: Any) -> str:
    return str(read_header(make_dicom(RAMP, bits=12, **tags), 20_000)["notes"])


def table(start: int, entries: NDArray[Any], bits: int, **more: Any) -> Sequence:
    item = Dataset()
    item.LUTDescriptor, item.LUTData = [len(entries) % 65_536, start, bits], entries.astype("<u2").tobytes()
    item["LUTDescriptor"].VR, item["LUTData"].VR = "US", "OW"
    return Sequence([item])


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_a_drawn_x_ray_is_the_same_from_each_transfer_syntax(syntax: str) -> None:
    drawn = draw()
    found = grey(make_dicom(drawn, syntax))
    assert np.abs(found.astype(int) - drawn).mean() <= (1 if syntax == "jpeg" else 0)


@pytest.mark.parametrize("syntax", [syntax for syntax in SYNTAXES if syntax != "jpeg"])
@pytest.mark.parametrize("bits", [10, 12, 16])
def test_more_bits_than_eight_end_in_the_same_greys(syntax: str, bits: int) -> None:
    drawn = draw()
    deep = np.rint(drawn / 255 * (2**bits - 1)).astype(np.uint16)
    assert np.abs(grey(make_dicom(deep, syntax, bits)).astype(int) - drawn).max() <= 1


def test_signed_values_count_from_their_smallest() -> None:
    drawn = draw()
    signed = (np.rint(drawn / 255 * 4095) - 2048).astype(np.int16)
    assert np.abs(grey(make_dicom(signed, bits=12)).astype(int) - drawn).max() <= 1


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize("slope", [1, 2, -1])
def test_windows_and_rescaling_are_those_of_pydicom_where_it_is_right(function: str, slope: float) -> None:
    tags: dict[str, Any] = {"WindowCenter": 1500 * slope + 10, "WindowWidth": 800, "VOILUTFunction": function}
    tags |= {"RescaleSlope": slope, "RescaleIntercept": 10}
    found = make_dataset(RAMP, 12, **tags)
    values = apply_voi_lut(apply_modality_lut(RAMP, found), found)
    ends = sorted((10, 4095 * slope + 10))
    wanted = (values - ends[0]) / (ends[1] - ends[0]) if slope > 0 else (values - ends[1]) / (ends[0] - ends[1])
    assert np.abs(grey(write(found)) - 255 * wanted).max() <= 0.51


def test_a_window_maps_its_lower_edge_to_black_and_its_upper_edge_to_white() -> None:
    found = grey(make_dicom(RAMP, bits=12, WindowCenter=2000, WindowWidth=1000)).ravel()
    assert (found[1500], found[2499]) == (0, 255) and abs(int(found[2000]) - 128) <= 1


def test_a_window_goes_before_the_full_range_and_a_table_before_the_window() -> None:
    steps = np.where(np.arange(4096) < 1000, 0, 4095)
    tags: dict[str, Any] = {"WindowCenter": 3000, "WindowWidth": 10}
    found = grey(make_dicom(RAMP, bits=12, VOILUTSequence=table(0, steps, 12), **tags)).ravel()
    assert (found[999], found[1000]) == (0, 255)
    assert grey(make_dicom(RAMP, bits=12)).ravel()[[0, 2048, 4095]].tolist() == [0, 128, 255]


def test_a_table_of_eight_bit_entries_with_more_than_256_of_them_does_not_wrap() -> None:
    entries = np.arange(4096) // 16
    found = grey(make_dicom(RAMP, bits=12, VOILUTSequence=table(0, entries, 8)))
    assert np.array_equal(found.ravel(), entries)


def test_a_modality_table_comes_before_the_window() -> None:
    reversed_values = np.arange(4096)[::-1]
    tags: dict[str, Any] = {
        "ModalityLUTSequence": table(0, reversed_values, 12),
        "WindowCenter": 2000,
        "WindowWidth": 1000,
    }
    found = grey(make_dicom(RAMP, bits=12, **tags)).ravel()
    assert (found[4095 - 1400], found[4095 - 2600]) == (0, 255)


@pytest.mark.parametrize(
    ("photometric", "shape", "inverted"),
    [
        ("MONOCHROME2", None, False),
        ("MONOCHROME2", "IDENTITY", False),
        ("MONOCHROME2", "INVERSE", True),
        ("MONOCHROME1", None, True),
        ("MONOCHROME1", "INVERSE", True),
    ],
)
def test_monochrome1_and_inverse_each_invert_once_after_the_window(
    photometric: str, shape: str | None, inverted: bool
) -> None:
    tags: dict[str, Any] = {"PhotometricInterpretation": photometric, "WindowCenter": 1000, "WindowWidth": 100}
    tags |= {"PresentationLUTShape": shape} if shape else {}
    found = grey(make_dicom(RAMP, bits=12, **tags)).ravel()
    assert (found[900], found[1100]) == ((255, 0) if inverted else (0, 255))


def test_padding_is_black_also_where_black_and_white_change_places() -> None:
    stored = np.where(np.arange(64)[:, None] < 8, 0, RAMP).astype(np.uint16)
    tags: dict[str, Any] = {"PixelPaddingValue": 0, "PhotometricInterpretation": "MONOCHROME1"}
    assert (grey(make_dicom(stored, bits=12, **tags))[:8] == 0).all()
    assert (grey(make_dicom(stored, bits=12, **tags | {"PixelPaddingRangeLimit": 1000})).ravel()[520:1000] == 0).all()


def test_what_is_to_be_known_of_a_file_is_noted() -> None:
    assert notes(WindowCenter=100, WindowWidth=10) == ""
    assert notes() == notes(WindowCenter=100) == "no window: the full range is taken"
    assert notes(WindowCenter=[1, 2], WindowWidth=[3, 4]) == "several windows: the first is taken"
    windowed: dict[str, Any] = {"WindowCenter": 100, "WindowWidth": 10}
    for part in (None, "", "BRUSTKORB", "THORAX"):
        assert notes(BodyPartExamined=part, **windowed) == "BodyPartExamined is not CHEST"
    assert notes(BurnedInAnnotation="YES", **windowed) == "BurnedInAnnotation is YES"


def code(meaning: str) -> Sequence:
    item = Dataset()
    item.CodeMeaning = meaning
    return Sequence([item])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "ct": ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.2"}, "CT Image Storage"),
    "secondary": ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}, "ingestion.dicom_classes"),
    "private": ({"SOPClassUID": "1.2.3.4.5"}, "unknown SOP class"),
    "for processing": ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.1.1.1"}, "for presentation"),
    "intent": ({"PresentationIntentType": "FOR PROCESSING"}, "for presentation"),
    "frames": ({"NumberOfFrames": 2}, "several frames"),
    "colour": ({"PhotometricInterpretation": "PALETTE COLOR"}, "colour"),
    "knee": ({"BodyPartExamined": "KNEE"}, "KNEE"),
    "lateral": ({"ViewPosition": "LL"}, "lateral"),
    "lateral by name": ({"ViewPosition": "LATERAL"}, "lateral"),
    "lateral by its code": ({"ViewPosition": "", "ViewCodeSequence": code("left lateral")}, "lateral"),
    "knee by its code": ({"BodyPartExamined": "", "AnatomicRegionSequence": code("Knee")}, "KNEE"),
    "shifted bits": ({"BitsStored": 10, "HighBit": 11}, "HighBit"),
    "no pixels": ({"PixelData": None}, "without pixels"),
    "no width": ({"WindowCenter": 5, "WindowWidth": 0}, "window"),
    "function": ({"WindowCenter": 5, "WindowWidth": 9, "VOILUTFunction": "CUBIC"}, "VOILUTFunction"),
    "short table": ({"VOILUTSequence": table(0, np.arange(9), 12)}, "lookup table"),
    "too long": ({"Rows": 21_000}, "21000 px"),
    "too large": ({"Rows": 9_000, "Columns": 9_000}, "81 megapixels"),
}
REFUSED["short table"][0]["VOILUTSequence"][0].LUTDescriptor = [4096, 0, 12]


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_frontal_chest_radiograph_is_refused_by_name(kind: str) -> None:
    tags, said = REFUSED[kind]
    with pytest.raises(UndecodableError, match=said):
        decode(make_dicom(RAMP, bits=12, **tags))


def test_another_class_is_taken_where_the_setting_names_it() -> None:
    data = make_dicom(RAMP, bits=12, SOPClassUID="1.2.840.10008.5.1.4.1.1.7")
    for name in ("SC", "1.2.840.10008.5.1.4.1.1.7"):
        assert grey(data, name).shape == RAMP.shape


def test_thorax_and_free_text_are_chests() -> None:
    for part in ("THORAX", "THORAX PA", ""):
        assert decode(make_dicom(RAMP, bits=12, BodyPartExamined=part)).any()


def test_a_picture_of_one_value_is_a_decoder_that_failed() -> None:
    for data in (make_dicom(0 * RAMP, bits=12), make_dicom(RAMP, bits=12, WindowCenter=60_000, WindowWidth=2)):
        with pytest.raises(UndecodableError, match="single value"):
            grey(data)


@pytest.mark.parametrize("name", ["RG1_UNCR", "RG1_UNCI", "RG1_J2KR", "RG1_J2KI"])
def test_a_real_radiograph_is_shown_as_a_viewer_does(name: str) -> None:
    data = (FIXTURES / f"{name}.dcm").read_bytes()
    stored = pydicom.dcmread(FIXTURES / "RG1_UNCR.dcm").pixel_array
    wanted = 255 * (1 - np.clip((stored - 14_999.5) / 29_999 + 0.5, 0, 1))
    assert np.abs(grey(data) - wanted).mean() <= 1


def test_real_files_of_other_kinds_are_refused() -> None:
    said = dict.fromkeys(("RG3_UNCR", "693_UNCR", "MR2_UNCR", "US1_UNCR", "JPEG-LL", "SC_rgb", "emri_small"), "")
    for name in said:
        with pytest.raises(UndecodableError) as refusal:
            decode((FIXTURES / f"{name}.dcm").read_bytes())
        said[name] = str(refusal.value)
    assert "EXTREMITY" in said["RG3_UNCR"] and "CT Image Storage" in said["693_UNCR"], said
    assert all("does not decode" not in why for why in said.values()), said


def test_content_tells_a_dicom_and_what_lies_beside_pictures_is_none() -> None:
    data = make_dicom(RAMP, bits=12)
    assert name_content(data[:1024]) == "DICOM" and is_picture("1.2.3.4", data[:1024])
    for uid in ("1.2.840.10008.1.3.10", "1.2.840.10008.5.1.4.1.1.11.1"):
        assert not is_picture("DICOMDIR.dcm", make_dicom(RAMP, bits=12, SOPClassUID=uid)[:1024])
    referring = Dataset()
    referring.ReferencedSOPClassUID = uid
    assert is_picture("1", make_dicom(RAMP, bits=12, ReferencedInstanceSequence=[referring])[:1024])


@pytest.fixture
def readers() -> Iterator[list[dicom.Reader]]:
    dicom._end_readers()
    yield dicom._idle
    dicom._end_readers()


def test_one_process_reads_many_files_and_a_crash_costs_one(readers: list[dicom.Reader]) -> None:
    data = make_dicom(RAMP, bits=12)
    grey(data)
    (first,) = readers
    grey(data)
    assert readers == [first]
    first.kill()
    first.wait()
    with pytest.raises(UndecodableError, match="crashed"):
        grey(data)
    assert grey(data).shape == RAMP.shape and readers != [first]


def test_a_reader_that_hangs_is_ended(readers: list[dicom.Reader], monkeypatch: pytest.MonkeyPatch) -> None:
    # A box that says it has no length: pydicom 3.0.2 looks for the next one at the same place for ever.
    endless = make_dataset(RAMP, 12, PixelData=encapsulate([b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(100)]))
    endless.file_meta.TransferSyntaxUID = JPEG2000Lossless
    endless["PixelData"].VR, endless["PixelData"].is_undefined_length = "OB", True
    monkeypatch.setattr(dicom, "LONGEST_S", 2.0)
    start = time.monotonic()
    with pytest.raises(UndecodableError, match="took too long"):
        grey(write(endless))
    assert 2 <= time.monotonic() - start < 30 and not readers


def test_threads_do_not_mix_their_answers() -> None:
    pictures = [draw(seed, height_px=96) for seed in range(3)]
    found: dict[int, Any] = {}

    def read(i: int) -> None:
        found[i] = [grey(make_dicom(pictures[i])) for _ in range(4)]

    threads = [threading.Thread(target=read, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(pictures[i], one) for i, all_ in found.items() for one in all_)


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux tells the limits of another process")
def test_the_memory_of_a_reader_is_bounded(readers: list[dicom.Reader]) -> None:
    grey(make_dicom(RAMP, bits=12))
    assert resource.prlimit(readers[0].pid, resource.RLIMIT_AS) == (dicom_reader.MEMORY_BYTES,) * 2


def test_only_the_patient_and_the_groups_asked_for_leave_the_reader() -> None:
    tags: dict[str, Any] = {
        "PatientName": "Planted^Name",
        "PatientSex": "F",
        "PatientAge": "018M",
        "InstitutionName": "Somewhere",
    }
    data = make_dicom(RAMP, bits=12, **tags)
    header = read_header(data, 20_000, groups=("sex", "age_band"))
    assert header["groups"] == {"sex": "F", "age_band": "1-4"} and header["patient"] == "4711"
    assert "Planted" not in str(header) and "Somewhere" not in str(header)


def test_the_words_of_an_error_quote_no_tag() -> None:
    found = make_dataset(RAMP, 12)
    found.add_new("WindowCenter", "DS", "")
    data = write(found).replace(b"MONOCHROME2", b"SECRETWORD1")
    asked: dict[str, Any] = {"classes": ["CR"], "max_side_px": 9_999}
    header: dict[str, Any] = {"groups": []}
    answers = [dicom_reader.answer(data, asked | more) for more in (header, {"groups": None})]
    assert all("refused" in facts and "SECRET" not in str(facts) for facts, _ in answers)
