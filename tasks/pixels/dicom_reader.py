"""Reads DICOM radiographs in a process of its own, which ``tasks.pixels.dicom`` starts and feeds.

Decoders of JPEG Lossless and JPEG-LS crash or hang on some damaged files (python-gdcm 3.2.6, imagecodecs and pyjpegls,
tried with damaged streams). Here such a crash costs one file. Memory and time are bounded, and no tag leaves the
process save the patient and those asked for: texts of errors are ours, since pydicom's quote values.
"""

import contextlib
import io
import json
import os
import re
import resource
import signal
import sys
import warnings
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

MEMORY_BYTES = 3_000_000_000  # of addresses; the largest picture, 64 megapixels of 16 bits, needs about a third

CLASSES = {
    "CR": "1.2.840.10008.5.1.4.1.1.1",
    "DX": "1.2.840.10008.5.1.4.1.1.1.1",
    "SC": "1.2.840.10008.5.1.4.1.1.7",
}
"""Short names of SOP classes: computed radiography, digital X-ray for presentation, secondary capture."""
CHEST_PARTS = ("CHEST", "THORAX", "LUNG", "RIB", "CHESTABDOMEN", "CHESTABDPELVIS", "STERNUM", "HEART", "BRONCHUS")
OTHER_PARTS = frozenset(
    """ABDOMEN ABDOMENPELVIS ANKLE ARM BACK BREAST CALCANEUS CALF CERVIX CLAVICLE COCCYX CSPINE ELBOW EXTREMITY EYE FACE
    FEMUR FIBULA FINGER FOOT FOREARM HAND HEAD HEADNECK HIP HUMERUS ILIUM JAW KNEE LEG LOWERLEG LSPINE MANDIBLE MAXILLA
    NECK NOSE ORBIT PATELLA PELVIS RADIUS SCAPULA SHOULDER SINUS SKULL SPINE SSPINE THIGH THUMB TIBIA TOE TSPINE ULNA
    UPPERARM WHOLEBODY WRIST ZYGOMA""".split()  # noqa: SIM905
)
"""Terms of BodyPartExamined (DICOM PS3.16 annex L) that are no chest; other words are free text."""
LATERAL = ("LL", "RL", "LATERAL", "LAT", "LLAT", "RLAT")
BURNED_IN = "BurnedInAnnotation is YES"
GROUP_TAGS = {
    "site": "InstitutionName",
    "scanner": "ManufacturerModelName",
    "view": "ViewPosition",
    "age_band": "PatientAge",
    "sex": "PatientSex",
}
"""Names that ``ingestion.groups`` may give -> the tag that has their value."""
NOBODY = re.compile(r"|[0\W_]+|anon(ymous|ymi[sz]ed)?|unknown|none|n/?a|nan|null|removed|deleted", re.IGNORECASE)
"""What stands in PatientID where the patient is not known."""
AGE_BANDS = ((1, "0"), (5, "1-4"), (10, "5-9"), (18, "10-17"))
LONGEST_VALUE = 64


class UnreadableError(Exception):
    """A file that is not read; the message says why, in our words only."""


def read_header(dataset: Any, groups: list[str]) -> dict[str, Any]:
    """Size, patient (``""`` where unknown), values of the groups asked for, and what is to be counted (``notes``)."""
    from pydicom.multival import MultiValue

    turned = upright_turn(dataset)
    height, width = (dataset.Columns, dataset.Rows) if turned[0] else (dataset.Rows, dataset.Columns)
    part = read_text(dataset, "BodyPartExamined").upper()
    windows, tables = dataset.get("WindowCenter"), dataset.get("VOILUTSequence") or ()
    notes = {
        "no window: the full range is taken": windows is None and not tables,
        "several windows: the first is taken": len(tables) > 1 or (not tables and isinstance(windows, MultiValue)),
        "no body part that is known": part not in CHEST_PARTS,
        "turned upright, as PatientOrientation has it": any(turned),
        BURNED_IN: read_text(dataset, "BurnedInAnnotation").upper() == "YES",
    }
    number = read_text(dataset, "PatientID")
    patient = "" if NOBODY.fullmatch(number) else f"{read_text(dataset, 'IssuerOfPatientID')} {number}".strip()
    return {
        "width_px": width,
        "height_px": height,
        "patient": patient,
        "groups": {name: read_group(dataset, name) for name in groups if name in GROUP_TAGS},
        "notes": [note for note, applies in notes.items() if applies],
    }


def read_group(dataset: Any, name: str) -> str:
    """The value of a group, short; ``""`` where unknown. Ages are in years, in bands."""
    text = read_text(dataset, GROUP_TAGS[name])
    if name == "age_band":
        age = re.fullmatch(r"(\d{1,3})([DWMY])", text)
        years = int(age[1]) / {"D": 365.25, "W": 52.2, "M": 12, "Y": 1}[age[2]] if age else None
        return "" if years is None else next((band for end, band in AGE_BANDS if years < end), "18 or more")
    if name in ("view", "sex"):
        text = text.upper() if re.fullmatch("[A-Za-z]{1,16}", text) else ""
    return text[:LONGEST_VALUE]


def read_text(dataset: Any, keyword: str) -> str:
    """A tag's value as text without spaces around it; ``""`` where there is none."""
    return str(dataset.get(keyword) or "").strip()


def refuse_other_pictures(dataset: Any, classes: list[str], max_side_px: int, max_pixels: int) -> None:
    """Refuses all but one grey frontal projection radiograph of a chest, made for presentation.

    Raises:
        UnreadableError: With what it is, in words of the standard, never in those of the file.
    """
    from pydicom.uid import UID

    sop, intent = UID(read_text(dataset, "SOPClassUID")), read_text(dataset, "PresentationIntentType").upper()
    if intent == "FOR PROCESSING" or sop.name.endswith("For Processing"):
        raise UnreadableError("is a DICOM 'for processing', without its final greys; export it 'for presentation'")
    if sop not in [CLASSES.get(name, name) for name in classes]:
        kind = sop.name if sop.name != sop else "object of an unknown SOP class"
        raise UnreadableError(f"is a DICOM {kind}, none of {', '.join(classes)} (ingestion.dicom_classes)")
    if "PixelData" not in dataset:
        raise UnreadableError("is a DICOM without pixels")
    if int(dataset.get("NumberOfFrames") or 1) != 1:
        raise UnreadableError("has several frames; export them as files of their own")
    if dataset.SamplesPerPixel != 1 or dataset.PhotometricInterpretation not in ("MONOCHROME1", "MONOCHROME2"):
        raise UnreadableError("is a DICOM in colour, not MONOCHROME1 or MONOCHROME2")
    if dataset.BitsAllocated not in (8, 16) or not 2 <= dataset.BitsStored <= dataset.BitsAllocated:
        raise UnreadableError(f"has {dataset.BitsStored} bits in {dataset.BitsAllocated}, not 8 to 16")
    part = re.sub("[^A-Z]", "", read_text(dataset, "BodyPartExamined").upper())
    if part in OTHER_PARTS:
        raise UnreadableError(f"shows {part} by its BodyPartExamined, not a chest")
    rows = orientation_of(dataset)[0]
    if read_text(dataset, "ViewPosition").upper() in LATERAL or rows in ("A", "P"):
        raise UnreadableError("is a lateral view by its ViewPosition or PatientOrientation, not a frontal one")
    if dataset.Rows * dataset.Columns > max_pixels:
        raise UnreadableError(
            f"has {dataset.Rows * dataset.Columns / 1e6:,.0f} megapixels, more than {max_pixels / 1e6:g}"
        )
    if not 1 <= min(dataset.Rows, dataset.Columns) <= max(dataset.Rows, dataset.Columns) <= max_side_px:
        raise UnreadableError(f"is {dataset.Columns} x {dataset.Rows} px, longer than {max_side_px} px")


def orientation_of(dataset: Any) -> tuple[str, str]:
    """Where rows and columns lead: first letters of PatientOrientation, ``("L", "F")`` upright; ``""`` if not given."""
    ways = [str(way)[:1].upper() for way in dataset.get("PatientOrientation") or ()]
    return (ways[0], ways[1]) if len(ways) == 2 else ("", "")


def upright_turn(dataset: Any) -> tuple[bool, bool, bool]:
    """Whether rows and columns change places, then left and right, then top and bottom, to be upright.

    Upright, the patient's left is at the viewer's right and the feet below (DICOM PS3.3 C.7.6.1.1.1).
    """
    rows, columns = orientation_of(dataset)
    if rows in ("F", "H") and columns in ("L", "R"):
        return (True, columns == "R", rows == "H")
    return (False, rows == "R", columns == "H") if rows in ("L", "R") and columns in ("F", "H") else (False,) * 3


def read_grey(dataset: Any) -> NDArray[np.uint8]:
    """The picture upright, uint8 ``(height, width)``, 0 black to 255 white; padding is black.

    Raises:
        UnreadableError: If all of it has one value, as a decoder leaves it that failed and says nothing.
    """
    from pydicom.pixels.utils import pixel_array

    stored = pixel_array(dataset, decoding_plugin=pick_decoder(dataset.file_meta.TransferSyntaxUID))
    first, last = range_of(dataset)
    if stored.shape != (dataset.Rows, dataset.Columns) or stored.min() < first or stored.max() > last:
        raise UnreadableError("does not decode (its pixels do not fit its header)")
    # Each stored value has one grey: a table of at most 65,536 replaces computing with millions of pixels.
    values = np.arange(first, last + 1)
    padding = padding_of(dataset, values)
    table = np.where(padding, 0, np.floor(255 * tone(dataset, values) + 0.5)).astype(np.uint8)
    grey = table[stored.astype(np.int32) - first]
    if grey.min() == grey.max():
        raise UnreadableError("decodes to a single value everywhere")
    transposed, mirrored, flipped = upright_turn(dataset)
    grey = grey.T if transposed else grey
    return np.ascontiguousarray(grey[:: -1 if flipped else 1, :: -1 if mirrored else 1])


def pick_decoder(syntax: str) -> str:
    """Which decoder of pydicom: Pillow, the most robust, where it can; GDCM for JPEG Lossless and JPEG-LS."""
    from pydicom import uid

    if syntax in (uid.JPEGBaseline8Bit, *uid.JPEG2000TransferSyntaxes):
        return "pillow"
    return "gdcm" if syntax in (*uid.JPEGTransferSyntaxes, *uid.JPEGLSTransferSyntaxes) else ""


def range_of(dataset: Any) -> tuple[int, int]:
    """The smallest and largest value that its bits can store."""
    bits = dataset.BitsStored
    return (-(1 << bits - 1), (1 << bits - 1) - 1) if dataset.PixelRepresentation else (0, (1 << bits) - 1)


def padding_of(dataset: Any, values: NDArray[Any]) -> NDArray[np.bool_]:
    """Which stored values stand for no picture (PixelPaddingValue, PixelPaddingRangeLimit)."""
    if dataset.get("PixelPaddingValue") is None:
        return np.zeros(values.shape, bool)
    ends = [int(dataset.PixelPaddingValue), int(dataset.get("PixelPaddingRangeLimit", dataset.PixelPaddingValue))]
    return (values >= min(ends)) & (values <= max(ends))


def tone(dataset: Any, values: NDArray[Any]) -> NDArray[np.float64]:
    """The grey of each stored value, 0.0 black to 1.0 white: modality table or rescale, table or window, inversion.

    DICOM PS3.3 C.11.1, C.11.2 and PS3.4 N.2. Own code, because pydicom 3.0.2 wraps the indices of a table of 8-bit
    entries with more than 256 of them, and scales windows to a range that the caller cannot see.
    """
    if dataset.get("ModalityLUTSequence"):
        values, ends = look_up(values, dataset.ModalityLUTSequence[0])
    else:
        slope, intercept = float(dataset.get("RescaleSlope") or 1), float(dataset.get("RescaleIntercept") or 0)
        values = values * slope + intercept
        ends = (float(values.min()), float(values.max()))
    if dataset.get("VOILUTSequence"):
        values, ends = look_up(values, dataset.VOILUTSequence[0])
        grey = (values - ends[0]) / (ends[1] - ends[0])
    elif dataset.get("WindowCenter") is not None and dataset.get("WindowWidth") is not None:
        function = read_text(dataset, "VOILUTFunction").upper() or "LINEAR"
        grey = window(values, first_of(dataset.WindowCenter), first_of(dataset.WindowWidth), function)
    else:
        grey = (values - ends[0]) / (ends[1] - ends[0])
    # Both say the same of one picture: a DX in MONOCHROME1 has INVERSE too, and is inverted once.
    inverted = dataset.PhotometricInterpretation == "MONOCHROME1"
    inverted |= read_text(dataset, "PresentationLUTShape").upper() == "INVERSE"
    grey = np.clip(grey, 0.0, 1.0)
    return 1.0 - grey if inverted else grey


def window(values: NDArray[Any], centre: float, width: float, function: str) -> NDArray[np.float64]:
    """A window of DICOM PS3.3 C.11.2.1.2 and C.11.2.1.3, to 0.0 to 1.0 (values beyond them are clipped later).

    Raises:
        UnreadableError: If the function or the width is not of the standard.
    """
    if not (np.isfinite(centre) and np.isfinite(width)) or width <= 0 or (function == "LINEAR" and width < 1):
        raise UnreadableError("has a window without width")
    if function == "LINEAR":  # a width of 1 is a step at centre - 0.5
        return (values - (centre - 0.5)) / max(width - 1, 1e-6) + 0.5
    if function == "LINEAR_EXACT":
        return (values - centre) / width + 0.5
    if function == "SIGMOID":
        return np.asarray(1 / (1 + np.exp(np.clip(-4 * (values - centre) / width, -700, 700))))
    raise UnreadableError("has a VOILUTFunction that the standard does not know")


def look_up(values: NDArray[Any], item: Any) -> tuple[NDArray[np.float64], tuple[float, float]]:
    """Values through a table of the standard (LUTDescriptor, LUTData), and the ends of what it can give."""
    n_entries, start, n_bits = (int(part) for part in item.LUTDescriptor)
    n_entries = n_entries or 1 << 16
    start -= 1 << 16 if start > 32_767 and values.min() < 0 else 0  # signed, read as unsigned
    data = item.LUTData
    if isinstance(data, bytes):
        data = np.frombuffer(data, np.uint8 if len(data) in (n_entries, n_entries + 1) else np.dtype("<u2"))
    entries = np.atleast_1d(np.asarray(data, np.float64))[:n_entries]
    if not 8 <= n_bits <= 16 or len(entries) < n_entries:
        raise UnreadableError("has a lookup table shorter than it declares")
    places = np.clip(np.rint(values).astype(np.int64) - start, 0, n_entries - 1)
    return entries[places], (0.0, float((1 << n_bits) - 1))


def first_of(value: Any) -> float:
    """The first of one or several values."""
    return float(value[0] if hasattr(value, "__getitem__") and not isinstance(value, str) else value)


def answer(data: bytes, asked: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    """What is sent back for a file: its header or grey, or ``{"refused": why}``."""
    import pydicom

    try:
        dataset = pydicom.dcmread(io.BytesIO(data))
        refuse_other_pictures(dataset, asked["classes"], asked["max_side_px"], asked["max_pixels"])
        if asked["header"]:
            return read_header(dataset, asked["groups"]), b""
        grey = read_grey(dataset)
        return {"height_px": grey.shape[0], "width_px": grey.shape[1]}, grey.tobytes()
    except UnreadableError as error:
        return {"refused": str(error)}, b""
    except Exception as error:  # pydicom and its decoders raise many kinds; their texts quote tags
        return {"refused": f"does not decode as DICOM ({type(error).__name__})"}, b""


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answers requests until there are no more: a line of JSON with ``n_bytes``, then so many bytes; both ways."""
    while line := requests.readline():
        asked = json.loads(line)
        data = requests.read(asked["n_bytes"])
        signal.setitimer(signal.ITIMER_REAL, asked["longest_s"])  # ends this process, whatever it is doing
        facts, content = answer(data, asked)
        signal.setitimer(signal.ITIMER_REAL, 0)
        answers.write(json.dumps(facts | {"n_bytes": len(content)}).encode() + b"\n" + content)
        answers.flush()


def main() -> None:
    """Runs as the process apart: requests on standard input, answers on what was standard output."""
    answers = os.fdopen(os.dup(1), "wb")
    quiet = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # libraries in C print there
        os.dup2(quiet, stream)
    warnings.simplefilter("ignore")
    with contextlib.suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
