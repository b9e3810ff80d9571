"""Networks that travel with the project, or that a setting names in their place: their files; loads no network."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tasks.errors import RunError
from tasks.files import REPOSITORY, sha256_of_file

Kind = Literal["screener", "segmenter"]
SHIPPED: dict[Kind, Path] = {
    "screener": REPOSITORY / "data" / "screener",
    "segmenter": REPOSITORY / "data" / "lungs",
}
WRITTEN_BY: dict[Kind, str] = {"screener": "flows.train_screener", "segmenter": "flows.train_lungs"}


@dataclass(frozen=True)
class NetworkFiles:
    """A network on disk: its folder, the sha256 of its file, and a name for people."""

    folder: Path
    sha256: str
    name: str


def find_network(kind: Kind, setting: str | None) -> NetworkFiles:
    """The network that ``screening.<kind>`` names, else the shipped one; the checksum is computed from the file.

    Raises:
        RunError: If the folder has no ``model.keras``.
    """
    folder = SHIPPED[kind] if setting is None else Path(setting)
    model = folder / "model.keras"
    if not model.is_file():
        raise RunError(f"screening.{kind}: {model} is missing; name a folder that {WRITTEN_BY[kind]} wrote")
    return NetworkFiles(folder, sha256_of_file(model), f"the shipped {kind}" if setting is None else str(folder))
