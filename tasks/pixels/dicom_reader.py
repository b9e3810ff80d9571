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
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.pixels.content import UndecodableError, refuse_size

MEMORY_BYTES = 3_000_000_000  # of addresses; the largest picture, 64 megapixels of 16 bits, needs about a third

CLASSES = {
    "CR": "1.2.840.10008.5.1.4.1.1.1",
    "DX": "1.2.840.10008.5.1.4.1.1.1.1",
    "SC": "1.2.840.10008.5.1.4.1.1.7",
}
"""Short names of SOP classes: computed radiography, digital X-ray for presentation, secondary capture."""
OTHER_PARTS = frozenset(
    """ABDOMEN ANKLE ARM BACK BREAST CLAVICLE COCCYX CSPINE ELBOW EXTREMITY FACE FEMUR FIBULA FINGER FOOT FOREARM HAND
    HEAD HIP HUMERUS JAW KNEE LEG LSPINE NECK NOSE ORBIT PATELLA PELVIS RADIUS SCAPULA SHOULDER SINUS SKULL SPINE SSPINE
    TIBIA TOE TSPINE ULNA WHOLEBODY WRIST""".split()  # noqa: SIM905
)
"""Terms of BodyPartExamined (DICOM PS3.16 annex L) that are no chest; other words are free text."""
LATERAL = re.compile(r"(?i)^(LL|RL|LLAT|RLAT)$|\b(LAT|LATERAL)\b")
BURNED_IN = "BurnedInAnnotation is YES"
GROUP_TAGS = {"site": "InstitutionName", "scanner": "ManufacturerModelName", "view": "ViewPosition"}
GROUP_TAGS |= {"age_band": "PatientAge", "sex": "PatientSex"}
"""Names that ``ingestion.groups`` may give -> the tag that has their value."""
AGE_BANDS = ((1, "0"), (5, "1-4"), (18, "5-17"), (1_000, "18 or more"))
"""Ends of bands in years, and their names."""


def read_header(dataset: Any, groups: list[str]) -> dict[str, Any]:
    """Size, patient (as PatientID has it), values of the groups asked for, and what is to be counted (``notes``,
    joined by ``"; "``)."""
    windows = (dataset[tag].VM if tag in dataset else 0 for tag in ("WindowCenter", "WindowWidth"))
    n_windows = len(dataset.get("VOILUTSequence") or ()) or min(windows)
    notes = {
        "no window: the full range is taken": n_windows == 0,
        "several windows: the first is taken": n_windows > 1,
        "BodyPartExamined is not CHEST": read_text(dataset, "BodyPartExamined").upper() != "CHEST",
        BURNED_IN: read_text(dataset, "BurnedInAnnotation").upper() == "YES",
    }
    return {
        "width_px": dataset.Columns,
        "height_px": dataset.Rows,
        "patient": read_text(dataset, "PatientID"),
        "groups": {name: read_group(dataset, name) for name in groups if name in GROUP_TAGS},
        "notes": "; ".join(note for note, applies in notes.items() if applies),
    }


def read_group(dataset: Any, name: str) -> str:
    """The value of a group, short; ``""`` where unknown. Ages are in bands."""
    text = read_text(dataset, GROUP_TAGS[name])
    if name == "age_band":
        age = re.fullmatch(r"(\d{1,3})([DWMY])", text)
        years = int(age[1]) / {"D": 365.25, "W": 52.2, "M": 12, "Y": 1}[age[2]] if age else 1_000
        return next((band for end, band in AGE_BANDS if years < end), "")
    return (text.upper() if name in ("view", "sex") else text)[:64]


def read_text(dataset: Any, keyword: str) -> str:
    """A tag's value as text without spaces around it; ``""`` where there is none."""
    return str(dataset.get(keyword) or "").strip()


def refuse_other_pictures(dataset: Any, classes: list[str], max_side_px: int) -> None:
    """Refuses all but one grey frontal projection radiograph of a chest, made for presentation.

    Raises:
        UndecodableError: With what it is, in words of the standard, never in those of the file.
    """
    from pydicom.uid import UID

    sop, intent = UID(read_text(dataset, "SOPClassUID")), read_text(dataset, "PresentationIntentType").upper()
    if intent == "FOR PROCESSING" or sop.name.endswith("For Processing"):
        raise UndecodableError("is a DICOM 'for processing', without its final greys; export it 'for presentation'")
    if sop not in [CLASSES.get(name, name) for name in classes]:
        kind = sop.name if sop.name != sop else "object of an unknown SOP class"
        raise UndecodableError(f"is a DICOM {kind}, none of {', '.join(classes)} (ingestion.dicom_classes)")
    if "PixelData" not in dataset:
        raise UndecodableError("is a DICOM without pixels")
    if int(dataset.get("NumberOfFrames") or 1) != 1:
        raise UndecodableError("has several frames; export them as files of their own")
    if dataset.SamplesPerPixel != 1 or dataset.PhotometricInterpretation not in ("MONOCHROME1", "MONOCHROME2"):
        raise UndecodableError("is a DICOM in colour, not MONOCHROME1 or MONOCHROME2")
    if dataset.BitsAllocated not in (8, 16) or not 2 <= dataset.BitsStored <= dataset.BitsAllocated:
        raise UndecodableError(f"has {dataset.BitsStored} bits in {dataset.BitsAllocated}, not 8 to 16")
    if int(dataset.get("HighBit", dataset.BitsStored - 1)) != dataset.BitsStored - 1:
        raise UndecodableError("has a HighBit other than BitsStored - 1, which old devices wrote; export it anew")
    for keyword, codes in (("BodyPartExamined", "AnatomicRegionSequence"), ("ViewPosition", "ViewCodeSequence")):
        # A DX must have the codes, and may lack the words.
        for text in (
            read_text(dataset, keyword),
            *(read_text(item, "CodeMeaning") for item in dataset.get(codes) or ()),
        ):
            if (part := re.sub("[^A-Z]", "", text.upper())) in OTHER_PARTS and keyword == "BodyPartExamined":
                raise UndecodableError(f"shows {part} by its {keyword} or {codes}, not a chest")
            if LATERAL.search(text) and keyword == "ViewPosition":
                raise UndecodableError(f"is a lateral view by its {keyword} or {codes}, not a frontal one")
    refuse_size(dataset.Columns, dataset.Rows, max_side_px)


def read_grey(dataset: Any) -> NDArray[np.uint8]:
    """The picture, uint8 ``(height, width)``, 0 black to 255 white; padding is black.

    Raises:
        UndecodableError: If all of it has one value, as a decoder leaves it that failed and says nothing.
    """
    from pydicom.pixels.utils import pixel_array

    stored = pixel_array(dataset, decoding_plugin=pick_decoder(dataset.file_meta.TransferSyntaxUID))
    n_values = 1 << dataset.BitsStored
    first = -n_values // 2 if dataset.PixelRepresentation else 0
    if stored.shape != (dataset.Rows, dataset.Columns) or stored.min() < first or stored.max() >= first + n_values:
        raise UndecodableError("does not decode (its pixels do not fit its header)")
    # Each stored value has one grey: a table of at most 65,536 replaces computing with millions of pixels.
    values = np.arange(first, first + n_values)
    table = np.floor(255 * np.clip(tone(dataset, values), 0, 1) + 0.5).astype(np.uint8)
    if dataset.get("PixelPaddingValue") is not None:
        ends = [int(dataset.PixelPaddingValue), int(dataset.get("PixelPaddingRangeLimit", dataset.PixelPaddingValue))]
        table[(values >= min(ends)) & (values <= max(ends))] = 0
    grey = table[stored.astype(np.int32) - first]
    if grey.min() == grey.max():
        raise UndecodableError("decodes to a single value everywhere")
    return grey


def pick_decoder(syntax: str) -> str:
    """Which decoder of pydicom: Pillow, the most robust, where it can; GDCM for JPEG Lossless and JPEG-LS."""
    from pydicom import uid

    if syntax in (uid.JPEGBaseline8Bit, *uid.JPEG2000TransferSyntaxes):
        return "pillow"
    return "gdcm" if syntax in (*uid.JPEGTransferSyntaxes, *uid.JPEGLSTransferSyntaxes) else ""


def tone(dataset: Any, values: NDArray[Any]) -> NDArray[np.float64]:
    """The grey of each stored value, 0.0 black to 1.0 white: modality table or rescale, table or window, inversion.

    DICOM PS3.3 C.11.1, C.11.2 and PS3.4 N.2.
    """
    if dataset.get("ModalityLUTSequence"):
        values, low, high = look_up(values, dataset.ModalityLUTSequence[0])
    else:
        values = values * float(dataset.get("RescaleSlope") or 1) + float(dataset.get("RescaleIntercept") or 0)
        low, high = values.min(), values.max()
    if dataset.get("VOILUTSequence"):
        values, low, high = look_up(values, dataset.VOILUTSequence[0])
    elif dataset.get("WindowCenter") is not None and dataset.get("WindowWidth") is not None:
        values, low, high = window(values, dataset), 0.0, 1.0
    grey = (values - low) / (high - low)
    # Both say the same of one picture: a DX in MONOCHROME1 has INVERSE too, and is inverted once.
    inverted = dataset.PhotometricInterpretation == "MONOCHROME1"
    inverted |= read_text(dataset, "PresentationLUTShape").upper() == "INVERSE"
    return 1.0 - grey if inverted else grey


def window(values: NDArray[Any], dataset: Any) -> NDArray[np.float64]:
    """Values through the first window of a file, to 0.0 to 1.0.

    Raises:
        UndecodableError: If its width or function is not of the standard.
    """
    from pydicom.dataset import Dataset
    from pydicom.pixels.processing import apply_windowing

    alone = Dataset()  # pydicom scales to the range of the stored values; here that is 0 to 65,535
    alone.PhotometricInterpretation, alone.BitsStored, alone.PixelRepresentation = "MONOCHROME2", 16, 0
    alone.WindowCenter, alone.WindowWidth = dataset.WindowCenter, dataset.WindowWidth
    alone.VOILUTFunction = read_text(dataset, "VOILUTFunction") or "LINEAR"
    try:
        return apply_windowing(values, alone) / 65_535
    except ValueError:
        raise UndecodableError("has a window that the standard does not know (WindowWidth, VOILUTFunction)") from None


def look_up(values: NDArray[Any], item: Any) -> tuple[NDArray[np.float64], float, float]:
    """Values through a table of the standard (LUTDescriptor, LUTData), and the ends of what it can give.

    Own code, because pydicom 3.0.2 wraps the places in a table of 8-bit entries with more than 256 of them.
    """
    n_entries, start, n_bits = (int(part) for part in item.LUTDescriptor)
    n_entries = n_entries or 1 << 16
    start -= 1 << 16 if start > 32_767 and values.min() < 0 else 0  # signed, read as unsigned
    data = item.LUTData
    if isinstance(data, bytes):
        data = np.frombuffer(data, np.uint8 if len(data) in (n_entries, n_entries + 1) else np.dtype("<u2"))
    entries = np.atleast_1d(np.asarray(data, np.float64))[:n_entries]
    if not 8 <= n_bits <= 16 or len(entries) < n_entries:
        raise UndecodableError("has a lookup table shorter than it declares")
    places = np.clip(np.rint(values).astype(np.int64) - start, 0, n_entries - 1)
    return entries[places], 0.0, float((1 << n_bits) - 1)


def answer(data: bytes, asked: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    """What is sent back for a file: its header (if ``groups`` are asked for) or grey, or ``{"refused": why}``."""
    import pydicom

    try:
        dataset = pydicom.dcmread(io.BytesIO(data))
        refuse_other_pictures(dataset, asked["classes"], asked["max_side_px"])
        if asked["groups"] is not None:
            return read_header(dataset, asked["groups"]), b""
        grey = read_grey(dataset)
        return {"shape": grey.shape}, grey.tobytes()
    except UndecodableError as error:
        return {"refused": str(error)}, b""
    except Exception as error:  # pydicom and its decoders raise many kinds; their texts quote tags
        return {"refused": f"does not decode as DICOM ({type(error).__name__})"}, b""


def main() -> None:
    """Answers requests on standard input on what was standard output, until there are no more.

    Both are a line of JSON with ``n_bytes``, then so many bytes.
    """
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    quiet = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # libraries in C print there
        os.dup2(quiet, stream)
    warnings.simplefilter("ignore")
    with contextlib.suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    while line := requests.readline():
        asked = json.loads(line)
        data = requests.read(asked["n_bytes"])
        signal.setitimer(signal.ITIMER_REAL, asked["longest_s"])  # ends this process, whatever it is doing
        facts, content = answer(data, asked)
        signal.setitimer(signal.ITIMER_REAL, 0)
        answers.write(json.dumps(facts | {"n_bytes": len(content)}).encode() + b"\n" + content)
        answers.flush()


if __name__ == "__main__":
    main()
