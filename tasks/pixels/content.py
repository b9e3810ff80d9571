"""What a file is: its first bytes decide, not its name.

A name only promises: a file called ``x.jpeg`` that is none is named as such, one called ``notes.txt`` is not opened.
"""

import re
from pathlib import PurePosixPath

HEAD_BYTES = 1024
TAKEN = ("JPEG", "PNG", "TIFF", "BMP", "WebP", "DICOM")
BESIDE_PICTURES = {"1.2.840.10008.1.3.10": "DICOMDIR", "1.2.840.10008.5.1.4.1.1.11.": "DICOM presentation state"}
"""DICOM files that lie beside pictures and are none: the start of their SOP class -> what they are."""
PROMISING = re.compile(
    r"\.(jpe?g|jpe|jfif|jif|png|tiff?|bmp|dib|webp|dcm|dicom|dic|ima|gif|heic|heif|avif|jp2|j2k|jpx|jxl|jls|svg|psd|tga|ico"
    r"|p[gpnb]m|raw|img|dng|cr[23]|nef|arw|orf|rw2|raf|nii|nrrd|mh[ad])"
)
"""Endings that promise a picture: such a file has a row, whatever it holds."""
UNPROMISING = re.compile(
    r"\.(txt|md|rst|log|[ct]sv|xlsx?|ods|docx?|pptx?|jsonl?|ya?ml|toml|xml|html?|css|ini|cfg|conf|db|sqlite|py|pyc|ipynb|js"
    r"|sh|bat|exe|dll|so|r|m|mat|h5|hdf5|keras|pth?|pkl|np[yz]|parquet|zip|tar|t?gz|bz2|xz|7z|rar|lnk|url|bib|tex|sha256|md5"
    r"|mp[34]|wav|avi|mov|tmp|part|partial|crdownload|lock|bak|ds_store)"
)
"""Endings of files that are no pictures: clutter by name alone, so that nothing is fetched or opened to know."""
BARE_WORDS = ("README", "LICENSE", "LICENCE", "NOTICE", "AUTHORS", "CHANGELOG", "MAKEFILE", "DICOMDIR")
"""Names of files without an ending that are no pictures."""

STARTS = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"BM", "BMP"),
    (b"GIF8", "GIF"),
    (b"8BPS", "Photoshop picture"),
    (b"\x00\x00\x00\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\x00\x00\x00\x0cJXL ", "JPEG XL"),
    (b"\xff\x0a", "JPEG XL"),
    (b"%PDF-", "PDF"),
    (b"NRRD0", "NRRD volume"),
    (b"IIU\x00", "camera RAW file"),
    (b"IIRO", "camera RAW file"),
    (b"IIRS", "camera RAW file"),
    (b"FUJIFILMCCD-RAW", "camera RAW file"),
    (b"\x00\x00\x01\x00", "icon"),
    (b"version https://git-lfs", "Git LFS pointer"),
)
TIFF_STARTS = (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")
MEDIA_BRANDS = {
    **dict.fromkeys((b"heic", b"heix", b"heim", b"hevc", b"mif1", b"msf1"), "HEIC"),
    **dict.fromkeys((b"avif", b"avis"), "AVIF"),
    b"crx ": "camera RAW file",
}
PICTURES = frozenset((*TAKEN, "SVG", *MEDIA_BRANDS.values(), *(kind for _, kind in STARTS)))
"""All kinds of pictures that are told apart; a Git LFS pointer stands for one."""


def name_content(head: bytes) -> str:
    """What a file is by its first ``HEAD_BYTES`` bytes: one of ``PICTURES`` or ``BESIDE_PICTURES``, ``HTML page``, or
    ``""`` if unknown."""
    if head[128:132] == b"DICM":
        return next((kind for start, kind in BESIDE_PICTURES.items() if start.encode() in head), "DICOM")
    if head.startswith(TIFF_STARTS):
        return "camera RAW file" if head[8:10] == b"CR" else "TIFF"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WebP"
    if head[4:8] == b"ftyp":
        return MEDIA_BRANDS.get(head[8:12], "")
    for start, kind in STARTS:
        if head.startswith(start) and (kind != "BMP" or head[6:10] == bytes(4)):  # two letters are words too often
            return kind
    text = head[:HEAD_BYTES].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head")):
        return "HTML page"
    return "SVG" if text.startswith(b"<") and b"<svg" in text else ""


def is_candidate(name: str) -> bool:
    """Whether a file may be a picture, as far as its name tells."""
    return not UNPROMISING.fullmatch(PurePosixPath(name).suffix.lower())


def suggests_picture(name: str) -> bool:
    """Whether a file is called like a picture, or like a radiograph as devices export it: no ending, or a number."""
    suffix = PurePosixPath(name).suffix
    bare = not suffix or suffix[1:].isdigit()
    return promises_picture(name) or (bare and PurePosixPath(name).name.upper() not in BARE_WORDS)


def promises_picture(name: str) -> bool:
    """Whether a file is called like a picture; it then has a row, whatever it holds."""
    return PROMISING.fullmatch(PurePosixPath(name).suffix.lower()) is not None


def is_picture(name: str, head: bytes) -> bool:
    """Whether a file has a row, taken or refused: it is a picture by its content, or is called one."""
    kind = name_content(head)
    return kind not in BESIDE_PICTURES.values() and (promises_picture(name) or kind in PICTURES)


def describe_refusal(head: bytes) -> str:
    """Why a file whose first bytes are no picture that is taken is refused: what it is, and what helps."""
    kind = name_content(head)
    wanted = f"{', '.join(TAKEN[:-1])} or {TAKEN[-1]}"
    if not head:
        return "is empty"
    if kind == "Git LFS pointer":
        return "is a Git LFS pointer and not the picture itself; fetch that with git lfs pull"
    if kind == "HTML page":
        return "is an HTML page, as a server sends it in place of a file; download the file again"
    article = "an" if kind[:1] in ("A", "i") else "a"
    return f"is {article} {kind}, not a {wanted}" if kind else f"is not a {wanted} (unknown format)"
