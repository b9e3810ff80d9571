"""Network files: ``model.keras`` with its checksum, ``model.sha256``; nothing loads before the checksum matched."""

from pathlib import Path

from tasks.keras_backend import keras
from tasks.records import RunError
from tasks.storage import sha256_of_file


def save_network(model: keras.Model, folder: Path) -> str:
    """Writes ``model.keras`` and its checksum ``model.sha256`` into a folder; returns the checksum."""
    path = folder / "model.keras"
    model.save(path)
    checksum = sha256_of_file(path)
    (folder / "model.sha256").write_text(f"{checksum}  model.keras\n")
    return checksum


def load_network(folder: Path) -> keras.Model:
    """Loads ``model.keras`` of a run, after its checksum matched ``model.sha256``.

    Raises:
        RunError: If a file is missing, the checksum differs, or the file is no Keras model.
    """
    path, checksum_path = folder / "model.keras", folder / "model.sha256"
    for needed in (path, checksum_path):
        if not needed.exists():
            raise RunError(f"{needed} is missing: run the train flow on this run folder first")
    if checksum_path.read_text().split()[:1] != [sha256_of_file(path)]:
        raise RunError(f"{path} does not match model.sha256: it was changed after training; train again")
    try:
        return keras.saving.load_model(path, compile=False, safe_mode=True)
    except (ValueError, OSError) as error:
        raise RunError(f"{path} does not load ({str(error).splitlines()[0][:120]}): train again") from None
