"""Network files: ``<name>.keras`` and its checksum ``<name>.sha256``; nothing loads before the checksum matches."""

import zipfile
from pathlib import Path
from typing import Any

from tasks.errors import RunError
from tasks.files import BROKEN, sha256_of_file

AGAIN = "train again"
MAX_RATIO, SMALL = 10, 20_000_000
"""Most bytes that a network's file may unpack to: a multiple of its size, plus a constant."""


def save_network(network: Any, folder: Path, name: str = "model") -> str:
    """Writes ``<name>.keras`` and its checksum ``<name>.sha256`` into a folder; returns the checksum."""
    path = folder / f"{name}.keras"
    network.save(path)
    checksum = sha256_of_file(path)
    (folder / f"{name}.sha256").write_text(f"{checksum}  {path.name}\n")
    return checksum


def read_checksum(folder: Path, name: str = "model") -> str:
    """The sha256 of ``<name>.keras`` of a run from ``<name>.sha256``; the network itself is not read.

    Raises:
        RunError: If one of the two files is missing.
    """
    path, checksum_path = folder / f"{name}.keras", folder / f"{name}.sha256"
    for needed in (path, checksum_path):
        if not needed.is_file():
            raise RunError(f"{needed} is missing: run the train flow on this run folder first")
    return (checksum_path.read_bytes().split() or [b""])[0].decode(errors="replace")


def check_network(folder: Path, name: str = "model") -> str:
    """Checks ``<name>.keras`` of a run against ``<name>.sha256``, without loading it; returns the sha256.

    Raises:
        RunError: If a file is missing or the checksum differs.
    """
    checksum = read_checksum(folder, name)
    _refuse_change(folder / f"{name}.keras", checksum, f"{name}.sha256")
    return checksum


def load_network(folder: Path, name: str = "model") -> Any:
    """Loads ``<name>.keras`` of a run, a ``keras.Model``, after checking its checksum.

    Raises:
        RunError: If a file is missing, the checksum differs, or the file does not load.
    """
    return load_checked(folder / f"{name}.keras", read_checksum(folder, name), f"{name}.sha256")


def load_checked(
    path: Path, sha256: str, noted_in: str = "its checksum", *, compiled: bool = False, way_out: str = AGAIN
) -> Any:
    """Loads a ``keras.Model`` from a ``.keras`` file after checking its checksum; the only place that loads one.

    Args:
        path: The file.
        sha256: Its expected checksum.
        noted_in: Where that is recorded, for the error.
        compiled: With optimiser and loss, to resume training.
        way_out: For the error.

    Raises:
        RunError: If it is not a ``.keras`` file, the checksum differs, or it does not load in Keras' safe mode.
    """
    from tasks.networks.keras_backend import keras

    # Keras picks the format by the name, and would load an .h5 file without its safe mode.
    if path.suffix != ".keras":
        raise RunError(f"{path} is not a .keras file: {way_out}")
    _refuse_change(path, sha256, noted_in)
    _refuse_bomb(path, way_out)
    try:
        return keras.saving.load_model(path, compile=compiled, safe_mode=True)
    except Exception as error:  # Keras raises many kinds for a foreign network, some without a message
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RunError(f"{path} does not load ({reason[:120]}): {way_out}") from None


def _refuse_change(path: Path, sha256: str, noted_in: str) -> None:
    try:
        found = sha256_of_file(path)
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror}): train again") from None
    if found != sha256:
        raise RunError(f"{path} does not match {noted_in}: it was changed after training; train again")


def _refuse_bomb(path: Path, way_out: str) -> None:
    """Refuses a file that would unpack to much more than its size; weights hardly compress.

    Raises:
        RunError: If it would.
    """
    try:
        with zipfile.ZipFile(path) as members:
            n_bytes = sum(member.file_size for member in members.infolist())
    except BROKEN:
        raise RunError(f"{path} does not load (it is not a .keras file): {way_out}") from None
    if n_bytes > MAX_RATIO * path.stat().st_size + SMALL:
        raise RunError(f"{path} does not load (it unpacks to {n_bytes / 1e6:,.0f} MB): {way_out}")
