"""Copies: pictures that are equal, by the bytes of their files or by their pixels, and those that are nearly so.

One rule holds for both kinds of equality; ``ingest`` applies it to bytes, ``pack`` to pixels. Chests look alike, so a
perceptual hash only proposes pairs that are nearly equal, and their correlation confirms them. Those that differ by no
more than saving them again does are equal: a large JPEG is decoded at a part of its size, its copy as PNG is not.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from tasks.devices.answers import safe_path
from tasks.pixels.packed import PackedImages
from tasks.records import Facts
from tasks.runs.manifest import key_pictures

SIDE_PX = 64
N_WAVES = 6
NEARLY_EQUAL = 0.99
"""Correlation at 64 px. In the public data set and in the drawn sample no two different pictures reach it."""
RESAVED = 1.0
"""Mean difference at 224 px, in grey levels, up to which pictures are equal. Originals that are saved again differ by 0
to 0.7: as PNG, or as JPEG of quality 40 or more."""
BATCH = 100
PAIRS = ["kind", "path", "split", "label", "other", "other_split", "other_label", "correlation"]


class NearPair(NamedTuple):
    """Two pictures by their ``image_id``, their correlation at 64 px and mean difference in grey levels at 224 px."""

    one: str
    other: str
    correlation: float
    difference: float


def exclude_copies(manifest: pd.DataFrame) -> pd.DataFrame:
    """Marks equal pictures, and excludes them from train and val, never from test.

    Of equal pictures one is kept: one in test if there is one, else the first by path. Equal pictures with opposite
    labels are contradictions: none of them is kept in train or val. Earlier marks are decided again.

    Args:
        manifest: Rows sorted by path, with ``path, sha256, label, source_split, excluded`` and, once packed,
            ``pixels_sha256``.

    Returns:
        The manifest with ``duplicate_of`` (path or missing) and more reasons in ``excluded``.
    """
    old = manifest["excluded"].fillna("").astype("string")
    reasons = old.where(~old.str.startswith(("duplicate", "conflict")), "").tolist()
    paths, labels = manifest["path"].tolist(), manifest["label"].tolist()
    in_test = (manifest["source_split"] == "test").fillna(False).tolist()
    original: list[str | None] = [None] * len(manifest)
    for rows in group_equal(manifest):
        if len({labels[at] for at in rows}) > 1:
            for at in (at for at in rows if not in_test[at]):
                other = next(paths[row] for row in rows if labels[row] != labels[at])
                reasons[at] = reasons[at] or f"conflict: the same picture as {other}, which has the other label"
            continue
        kept = next((at for at in rows if in_test[at]), rows[0])
        for at in (at for at in rows if at != kept):
            original[at] = paths[kept]
            if not in_test[at]:
                reasons[at] = reasons[at] or f"duplicate of {paths[kept]}"
    return manifest.assign(excluded=pd.array(reasons, dtype="string"), duplicate_of=pd.array(original, dtype="string"))


def group_equal(manifest: pd.DataFrame) -> Iterator[list[int]]:
    """The numbers of the rows that show the same picture, for each picture that decodes and is there twice."""
    groups: dict[str, list[int]] = {}
    decodable = ~manifest["excluded"].fillna("").str.startswith("undecodable")
    for at, (key, usable) in enumerate(zip(key_pictures(manifest), decodable, strict=True)):
        if usable:
            groups.setdefault(str(key), []).append(at)
    return (rows for rows in groups.values() if len(rows) > 1)


# -- pixels ------------------------------------------------------------------------------------------------------------


def compare_pictures(
    manifest: pd.DataFrame, images: PackedImages, places: Mapping[str, Sequence[int]]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The manifest with ``pixels_sha256``, ``group_id`` and copies excluded by pixels; and the pairs (``list_pairs``).

    ``pixels_sha256`` is the checksum of the packed pixels; of equal pictures, that of the first.

    Args:
        manifest: A row per image, sorted by path.
        images: The packed pixels.
        places: Shard and row of each packed image.
    """
    sums, hashes = describe_pictures(images, places)
    packed = manifest.loc[manifest["image_id"].isin(list(sums)), "image_id"]
    pictures = packed[~packed.map(sums).duplicated()].tolist()
    near = find_near(images, pictures, [hashes[sums[image]] for image in pictures])
    first: dict[str, str] = {}
    for pair in near:
        if pair.difference <= RESAVED:
            first.setdefault(sums[pair.other], first.get(sums[pair.one], sums[pair.one]))
    pixels = {image: first.get(checksum, checksum) for image, checksum in sums.items()}
    manifest = exclude_copies(manifest.assign(pixels_sha256=manifest["image_id"].map(pixels).astype("string")))
    near = [pair for pair in near if pair.difference > RESAVED]
    manifest = manifest.assign(group_id=name_groups(manifest, near))
    return manifest, list_pairs(manifest, near)


def describe_pictures(
    images: PackedImages, places: Mapping[str, Sequence[int]]
) -> tuple[dict[str, str], dict[str, NDArray[np.float32]]]:
    """The sha256 of the pixels of each image, and for each such checksum the perceptual hash (``hash_looks``)."""
    shown = {tuple(place): image for image, place in places.items()}
    order = sorted(shown)
    sums: dict[tuple[int, ...], str] = {}
    hashes: dict[str, NDArray[np.float32]] = {}
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        pixels = images.read([shown[place] for place in batch])
        for place, picture, short in zip(batch, pixels, hash_looks(shrink(pixels)), strict=True):
            sums[place] = hashlib.sha256(picture.tobytes()).hexdigest()
            hashes[sums[place]] = short
    return {image: sums[tuple(place)] for image, place in places.items()}, hashes


def shrink(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Pictures ``(n, side, side)`` at 64 px, ``(n, 64 * 64)``, with mean 0 and length 1; one of a single grey is 0.

    The product of two is their correlation.
    """
    small = [Image.fromarray(picture).resize((SIDE_PX, SIDE_PX), Image.Resampling.BOX) for picture in pixels]
    looks = np.stack([np.asarray(picture, np.float32).ravel() for picture in small])
    looks -= looks.mean(1, keepdims=True)
    return looks / np.maximum(np.linalg.norm(looks, axis=1, keepdims=True), 1e-3)


def hash_looks(looks: NDArray[np.float32]) -> NDArray[np.float32]:
    """A perceptual hash: the 6 x 6 lowest coefficients of the cosine transform, ``(n, 36)``, as in pHash.

    The transform keeps distances, and leaving coefficients out only shortens them: as ``|a - b|^2 = 2 - 2r`` for looks
    of length 1, no pair with the correlation r is farther apart than that here.
    """
    from scipy.fft import dctn

    waves = dctn(looks.reshape(-1, SIDE_PX, SIDE_PX), norm="ortho", axes=(1, 2))
    return np.asarray(waves[:, :N_WAVES, :N_WAVES].reshape(len(looks), -1), np.float32)


def find_near(images: PackedImages, pictures: Sequence[str], hashes: Sequence[NDArray[np.float32]]) -> list[NearPair]:
    """Pairs of pictures with different pixels whose correlation at 64 px is ``NEARLY_EQUAL`` or more."""
    from scipy.spatial import KDTree

    if len(pictures) < 2:
        return []
    radius = np.sqrt(2 - 2 * NEARLY_EQUAL) + 1e-4  # float32 rounds
    pairs = KDTree(np.stack(hashes)).query_pairs(radius, output_type="ndarray")
    pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
    found: list[NearPair] = []
    for start in range(0, len(pairs), BATCH):
        sides = [[pictures[at] for at in side] for side in pairs[start : start + BATCH].T]
        one, other = (images.read(side) for side in sides)
        correlations = (shrink(one) * shrink(other)).sum(1)
        differences = np.abs(one.astype(np.int16) - other).mean((1, 2))
        found += map(NearPair, *sides, correlations.tolist(), differences.tolist())
    return [pair for pair in found if pair.correlation >= NEARLY_EQUAL]


# -- groups and pairs --------------------------------------------------------------------------------------------------


def name_groups(manifest: pd.DataFrame, near: Sequence[NearPair]) -> "pd.Series[str]":
    """``group_id``: what is drawn as one for splits and intervals.

    It is the patient. Where that is unknown, it is the patient of an equal or nearly equal picture, else the first
    image among those.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    codes, keys = pd.factorize(key_pictures(manifest))
    code_of = dict(zip(manifest["image_id"], codes, strict=True))
    ends = np.array([(code_of[pair.one], code_of[pair.other]) for pair in near], int).reshape(-1, 2).T
    graph = coo_array((np.ones(ends.shape[1]), (ends[0], ends[1])), shape=(len(keys), len(keys)))
    together = manifest.groupby(connected_components(graph, directed=False)[1][codes])
    image = "image " + together["image_id"].transform("first")
    return manifest["patient_id"].fillna(together["patient_id"].transform("first")).fillna(image)


def list_pairs(manifest: pd.DataFrame, near: Sequence[NearPair]) -> pd.DataFrame:
    """A row per pair, columns ``PAIRS``; kind ``equal``, ``contradicting`` (equal, with two labels) or ``near``."""
    at = {image: row for row, image in enumerate(manifest["image_id"])}
    labels = manifest["label"].tolist()
    found = [
        ("contradicting" if len({labels[row] for row in rows}) > 1 else "equal", row, rows[0], 1.0)
        for rows in group_equal(manifest)
        for row in rows[1:]
    ]
    found += [("near", at[pair.one], at[pair.other], pair.correlation) for pair in near]
    table = pd.DataFrame(found, columns=["kind", "row", "other_row", "correlation"])
    for side, name in (("", "path"), ("other_", "other")):
        rows = manifest.iloc[table[f"{side}row"].astype(int)]
        table[name] = rows["path"].to_numpy()
        table[f"{side}split"], table[f"{side}label"] = rows["source_split"].to_numpy(), rows["label"].to_numpy()
    return table[PAIRS]


def write_pairs(pairs: pd.DataFrame) -> str:
    """The text of ``same_pictures.csv``; people open it, so no cell may be a formula."""
    paths = {name: pairs[name].map(safe_path) for name in ("path", "other")}
    return pairs.assign(**paths).to_csv(index=False, float_format="%.4f")


def count_copies(manifest: pd.DataFrame) -> Facts:
    """Counts of copies and contradictions; contradicting test images are named by ``image_id``, up to three."""
    in_test = (manifest["source_split"] == "test").fillna(False)
    labels = manifest["label"].tolist()
    wrong = [at for rows in group_equal(manifest) if len({labels[at] for at in rows}) > 1 for at in rows]
    wrong_in_test = manifest.iloc[sorted(at for at in wrong if in_test.iloc[at])]
    return {
        "n_duplicates_excluded": int(manifest["excluded"].fillna("").str.startswith("duplicate").sum()),
        "n_test_copies": int((manifest["duplicate_of"].notna() & in_test).sum()),
        "n_conflicts": len(wrong),
        "n_conflicts_test": len(wrong_in_test),
        "conflicts_test": wrong_in_test["image_id"].tolist()[:3],
    }


def count_pairs(manifest: pd.DataFrame, pairs: pd.DataFrame) -> Facts:
    """Counts for log and report: ``count_copies``, and of pictures in several files and nearly equal ones."""
    n_files = manifest[manifest["pixels_sha256"].notna()].groupby("pixels_sha256")["sha256"].transform("nunique")
    near = pairs[pairs["kind"] == "near"]
    across = (near["split"] == "test") != (near["other_split"] == "test")
    group_of = manifest.set_index("path")["group_id"]
    apart = near["path"].map(group_of) != near["other"].map(group_of)
    more = {"n_near": len(near), "n_near_test": int(across.sum()), "n_near_apart": int(apart.sum())}
    return count_copies(manifest) | {"n_other_files": int((n_files > 1).sum())} | more
