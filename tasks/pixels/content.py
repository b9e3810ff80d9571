"""What a file is: its first bytes decide, not its name.

A name only promises: a file called ``x.jpeg`` that is none is named as such, one called ``notes.txt`` is not opened.
"""

import re
from pathlib import PurePosixPath

HEAD_BYTES = 1024
MAX_PIXELS = 64_000_000  # 8,000 x 8,000; guards memory, 8 bytes a pixel at most. A large detector has 20 megapixels
MAX_FILE_BYTES = 200_000_000  # guards memory: Pillow needs twice as much for data before the pixels
TAKEN = ("JPEG", "PNG", "TIFF", "BMP", "WebP", "DICOM")
SOP_CLASS = rb".{128}DICM.{,40}\x02\0\x02\0UI..1\.2\.840\.10008\."
NO_PICTURES = {
    "DICOMDIR": SOP_CLASS + rb"1\.3\.10",
    "DICOM presentation state": SOP_CLASS + rb"5\.1\.4\.1\.1\.11\.",
    "HTML page": rb"(\xef\xbb\xbf)?\s*<(![Dd][Oo][Cc][Tt][Yy][Pp][Ee] )?([Hh][Tt][Mm][Ll]|[Hh][Ee][Aa][Dd])",
}
PICTURES = {
    "DICOM": rb".{128}DICM",
    "DICOM without its first 132 bytes": rb"[\x02\x08]\0[\x00-\x20]\0(UL|UI|CS|OB|SH)",
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "TIFF": rb"II[*+]\0|MM\0[*+]",
    "BMP": rb"BM.{4}\0{4}",  # two letters alone are words too often
    "WebP": rb"RIFF.{4}WEBP",
    "GIF": rb"GIF8",
    "HEIC or AVIF": rb".{4}ftyp(hei|hev|mif1|msf1|avi)",
    "JPEG 2000": rb"\0\0\0\x0cjP|\xff\x4f\xff\x51",
    "PDF": rb"%PDF-",
    "Git LFS pointer": rb"version https://git-lfs",
}
"""Kinds that are told apart by how they begin; a Git LFS pointer stands for a picture."""
PROMISING = re.compile(
    r"\.(jpe?g|jpe|jfif|png|tiff?|bmp|webp|dcm|dicom|gif|hei[cf]|avif|jp2|j2k|svg|psd|raw|dng|nii|mh[ad])"
)
"""Endings that promise a picture: such a file has a row, whatever it holds."""
UNPROMISING = re.compile(
    r"\.(txt|md|log|[ct]sv|xlsx?|ods|docx?|pptx?|jsonl?|ya?ml|toml|xml|html?|ini|cfg|db|sqlite|py|ipynb|js|sh|exe|mat|h5"
    r"|keras|pth?|pkl|np[yz]|parquet|zip|tar|t?gz|bz2|xz|7z|rar|lnk|url|sha256|md5|mp[34]|avi|mov)"
)
"""Endings of files that are no pictures: clutter by name alone, so that nothing is fetched or opened to know."""
BARE_PICTURE = re.compile(r"(?!(SHA|MD5)).*\d", re.IGNORECASE)
"""Names without an ending as devices give them: IM0001, 1.2.840.113619; words such as README have no digit."""


class UndecodableError(ValueError):
    """Bytes that cannot be decoded; the message says why."""


def name_content(head: bytes) -> str:
    """What a file is by its first ``HEAD_BYTES`` bytes: a key of ``PICTURES`` or ``NO_PICTURES``, or ``""``."""
    starts = (NO_PICTURES | PICTURES).items()
    return next((kind for kind, start in starts if re.match(start, head, re.DOTALL)), "")


def is_candidate(name: str) -> bool:
    """Whether a file may be a picture, as far as its name tells."""
    return not UNPROMISING.fullmatch(PurePosixPath(name).suffix.lower())


def suggests_picture(name: str) -> bool:
    """Whether a file is called like a picture, or like a radiograph as devices export it: no ending, or a number."""
    suffix = PurePosixPath(name).suffix
    bare = not suffix or suffix[1:].isdigit()
    return promises_picture(name) or bool(bare and BARE_PICTURE.match(PurePosixPath(name).name))


def promises_picture(name: str) -> bool:
    """Whether a file is called like a picture; it then has a row, whatever it holds."""
    return PROMISING.fullmatch(PurePosixPath(name).suffix.lower()) is not None


def is_picture(name: str, head: bytes) -> bool:
    """Whether a file has a row, taken or refused: it is a picture by its content, or is called one."""
    kind = name_content(head)
    return kind in PICTURES or (promises_picture(name) and not kind.startswith("DICOM"))


def refuse_size(width_px: int, height_px: int, max_side_px: int) -> None:
    """Refuses a picture that is too large to decode.

    Raises:
        UndecodableError: If it has more than ``MAX_PIXELS`` or a longer side.
    """
    if width_px * height_px > MAX_PIXELS:
        raise UndecodableError(f"has {width_px * height_px / 1e6:,.0f} megapixels, more than {MAX_PIXELS / 1e6:g}")
    if max(width_px, height_px) > max_side_px:
        raise UndecodableError(f"is {width_px} x {height_px} px, longer than {max_side_px} px")


def refuse_bytes(n_bytes: int) -> None:
    """Refuses a file of more than ``MAX_FILE_BYTES``.

    Raises:
        UndecodableError: If it has more.
    """
    if n_bytes > MAX_FILE_BYTES:
        raise UndecodableError(f"has more than {MAX_FILE_BYTES / 1e6:g} MB")


def describe_refusal(head: bytes) -> str:
    """Why a file whose first bytes are no picture that is taken is refused: what it is, and what helps."""
    kind = name_content(head)
    wanted = f"not a {', '.join(TAKEN[:-1])} or {TAKEN[-1]}"
    if not head:
        return "is empty"
    if kind == "Git LFS pointer":
        return "is a Git LFS pointer and not the picture itself; fetch that with git lfs pull"
    if kind == "HTML page":
        return "is an HTML page, as a server sends it in place of a file; download the file again"
    return f"is a {kind}, {wanted}" if kind else f"is {wanted} (unknown format)"
