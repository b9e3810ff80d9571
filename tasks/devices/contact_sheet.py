"""The sheet of doubtful images: one page that works offline, on which a person marks those with a device.

It shows the X-ray, the outline of the device that the screener found, the score and the split. It shows neither the
class nor the path, which names the class: people who know that a child is ill see more devices, and their answers would
depend on the class. The page holds the path unseen, for the table of answers.
"""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tasks.devices.answers import safe_path
from tasks.files import write_whole
from tasks.pixels.greys import SIDE_PX
from tasks.pixels.masks import Masks
from tasks.pixels.outlines import draw_outline, encode_jpeg
from tasks.pixels.packed import PackedImages
from tasks.runs.artifacts import show_markdown
from tasks.runs.run import Run
from tasks.settings import ScreeningSettings

TEMPLATE = Path(__file__).with_name("contact_sheet.html.j2")
SHEET = "review/index.html"
LISTING = "review/doubtful.csv"
NEVER_USED = ("duplicate", "undecodable", "conflict")
"""Starts of reasons in ``excluded`` for which an image is not used, with or without a device."""


@dataclass(frozen=True, eq=False)
class SheetRow:
    """An image on the sheet: ``pixels`` and ``mask`` uint8 ``(224, 224)``, in the mask 255 surely a device."""

    image_id: str
    path: str
    sha256: str
    score: float
    split: str
    pixels: NDArray[np.uint8]
    mask: NDArray[np.uint8]


def doubtful_rows(manifest: pd.DataFrame, settings: ScreeningSettings) -> pd.DataFrame:
    """The images that a person is asked about, those nearest to the threshold first, at most ``n_review``.

    Args:
        manifest: Columns ``image_id, path, sha256, split, device_score, device_reviewed, excluded``.
        settings: The doubtful band, from ``leaves_from`` to ``doubtful_to``, and the threshold.

    Returns:
        Rows of the manifest: nobody has read them, they have pixels, and each content occurs once.
    """
    return find_doubtful(manifest, settings).head(settings.n_review)


def find_doubtful(manifest: pd.DataFrame, settings: ScreeningSettings) -> pd.DataFrame:
    """Like ``doubtful_rows``, without the limit."""
    scores = manifest["device_score"].astype("Float64")
    in_band = scores.between(settings.leaves_from, settings.doubtful_to).fillna(False)
    unread = ~manifest["device_reviewed"].fillna(False).astype(bool)
    used = ~manifest["excluded"].fillna("").str.startswith(NEVER_USED)
    rows = manifest[in_band & unread & used].sort_values("path").drop_duplicates("sha256")
    distance = (rows["device_score"].astype(float) - settings.threshold).abs()
    return rows.loc[distance.sort_values(kind="stable").index]


def count_doubtful(run: Run) -> int:
    """Number of images on the sheet of a prepared run that wait for an answer."""
    return len(doubtful_rows(run.manifest(), run.settings.screening))


def write_sheet(out: Path, rows: pd.DataFrame, images: PackedImages, masks: Masks, source_name: str) -> None:
    """Writes ``review/index.html`` and ``review/doubtful.csv`` (``path,sha256,device_score,split``) below ``out``.

    Args:
        out: A run folder, or the folder of the stage.
        rows: From ``doubtful_rows``; if there are none the page says so.
        images: The pixels of these images.
        masks: The masks of these images.
        source_name: The name of the data on the page.
    """
    ids = list(rows["image_id"])
    pixels, drawn = images.read(ids), masks.read(ids)
    cells = zip(ids, rows["path"], rows["sha256"], rows["device_score"], rows["split"], strict=True)
    shown = [
        SheetRow(image, path, sha256, float(score), split, pixels[i], drawn[i])
        for i, (image, path, sha256, score, split) in enumerate(cells)
    ]
    write_whole(out / SHEET, render_sheet(shown, source_name))
    listing = rows[["path", "sha256", "device_score", "split"]].assign(path=rows["path"].map(safe_path))
    write_whole(out / LISTING, listing.to_csv(index=False, float_format="%.6g"))


def render_sheet(rows: Sequence[SheetRow], source_name: str) -> str:
    """The page as self-contained HTML; every value is escaped, and only the page's own script may run."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["csp_hash"] = lambda s: base64.b64encode(hashlib.sha256(str(s).encode()).digest()).decode()
    cases = []
    for row in rows:
        outline, sure = draw_outline(row.mask)
        cases.append(
            {
                "image_id": row.image_id,
                "path": safe_path(row.path),
                "sha256": row.sha256,
                "score": f"{row.score:.2f}",
                "split": {"train": "training", "val": "validation"}.get(row.split, row.split),
                "picture": encode_jpeg(row.pixels),
                "outline": outline,
                "sure": sure,
            }
        )
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return page.render(cases=cases, source_name=source_name, side_px=SIDE_PX)


def show_sheet(run: Run, n: int) -> None:
    """Shows in Prefect's web page the address of the sheet and the number of images on it."""
    images = "1 doubtful image waits" if n == 1 else f"{n:,} doubtful images wait"
    lines = [
        f"**{images if n else 'No doubtful image waits'} for a person.**",
        "",
        f"Sheet: `{run.address(SHEET)}`",
        "",
        "Open it in a browser, save the answers, and give them back:",
        "",
        f"```\n.venv/bin/python -m flows.review --run-dir {run.settings.run_dir} --answers answers.csv\n```",
    ]
    show_markdown("review sheet", "\n".join(lines[: None if n else 3]) + "\n", "Doubtful images for a person")
