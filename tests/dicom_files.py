"""DICOM radiographs for tests: drawn pictures written in each transfer syntax that is read, with any tags."""

import io
import tempfile
from pathlib import Path
from typing import Any

import gdcm
import numpy as np
import pydicom
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    ComputedRadiographyImageStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGBaseline8Bit,
    RLELossless,
)

from tasks.drawings.chests import draw_chest, finish_film, imagine_child

GDCM_SYNTAXES = {
    "lossless": gdcm.TransferSyntax.JPEGLosslessProcess14_1,
    "jpeg_ls": gdcm.TransferSyntax.JPEGLSLossless,
    "jpeg_2000": gdcm.TransferSyntax.JPEG2000Lossless,
}
SYNTAXES = ("raw", "implicit", "rle", "jpeg", *GDCM_SYNTAXES)


def draw(seed: int = 0, finding: Any = "normal", height_px: int = 128) -> NDArray[np.uint8]:
    """A drawn X-ray, uint8."""
    rng = np.random.default_rng(seed)
    picture = finish_film(draw_chest(imagine_child(rng), finding, 0.5, (height_px, height_px * 5 // 4), rng), rng)
    return np.clip(picture * 255 + 0.5, 0, 255).astype(np.uint8)


def make_dataset(pixels: NDArray[Any], bits: int = 8, **tags: Any) -> Dataset:
    """A computed radiograph with these stored values; ``tags`` are set by keyword, ``None`` removes one."""
    found = Dataset()
    found.file_meta = FileMetaDataset()
    found.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    found.SOPClassUID, found.SOPInstanceUID = ComputedRadiographyImageStorage, "1.2.826.0.1.3680043.8.498.1"
    found.Modality, found.PatientID, found.BodyPartExamined = "CR", "4711", "CHEST"
    found.Rows, found.Columns, found.SamplesPerPixel = *pixels.shape[:2], 1
    found.PhotometricInterpretation, found.PixelRepresentation = "MONOCHROME2", int(pixels.dtype.kind == "i")
    found.BitsAllocated, found.BitsStored, found.HighBit = 8 if bits <= 8 else 16, bits, bits - 1
    content = pixels.astype(f"<{pixels.dtype.kind}{found.BitsAllocated // 8}").tobytes()
    found.PixelData = content + bytes(len(content) % 2)
    for keyword, value in tags.items():
        if value is None:
            delattr(found, keyword)
        else:
            setattr(found, keyword, value)
    found.file_meta.MediaStorageSOPClassUID = found.SOPClassUID
    found.file_meta.MediaStorageSOPInstanceUID = found.SOPInstanceUID
    return found


def write(found: Dataset) -> bytes:
    stream = io.BytesIO()
    found.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def make_dicom(pixels: NDArray[Any], syntax: str = "raw", bits: int = 8, **tags: Any) -> bytes:
    """The bytes of a DICOM file in one of ``SYNTAXES``; ``jpeg`` has 8 bits and loses a little."""
    found = make_dataset(pixels, bits, **tags)
    if syntax == "implicit":
        found.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    elif syntax == "rle":
        found.compress(RLELossless)
    elif syntax == "jpeg":
        stream = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(stream, "JPEG", quality=95)
        found.PixelData = encapsulate([stream.getvalue()])
        found.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    elif syntax in GDCM_SYNTAXES:
        coded = pydicom.dcmread(io.BytesIO(_recode(write(make_dataset(pixels, bits)), syntax)))
        found.PixelData, found.file_meta.TransferSyntaxUID = coded.PixelData, coded.file_meta.TransferSyntaxUID
    if syntax not in ("raw", "implicit"):
        found["PixelData"].VR, found["PixelData"].is_undefined_length = "OB", True
    return write(found)


def _recode(data: bytes, syntax: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        before, after = Path(folder, "before"), Path(folder, "after")
        before.write_bytes(data)
        reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
        reader.SetFileName(str(before))
        assert reader.Read()
        change.SetTransferSyntax(gdcm.TransferSyntax(GDCM_SYNTAXES[syntax]))
        change.SetInput(reader.GetImage())
        assert change.Change()
        writer.SetFileName(str(after))
        writer.SetFile(reader.GetFile())
        writer.SetImage(change.GetOutput())
        assert writer.Write()
        return after.read_bytes()
