"""Full-size drawings: as large as an original, and no two files alike."""

from pathlib import Path

import numpy as np
from benchmarks.full_size import HEIGHT_PX, WIDTH_PX, read_as_keras_does, write_full_size
from PIL import Image

from tasks.files import sha256_of_file


def test_files_are_full_size_grey_jpegs_and_copies_differ_in_their_bytes_alone(tmp_path: Path) -> None:
    files = write_full_size(tmp_path, n_drawn=2, n_files=4)
    assert list(files["path"]) == [
        f"train/{name}.jpeg" for name in ("NORMAL/0", "NORMAL/2", "PNEUMONIA/1", "PNEUMONIA/3")
    ]
    assert files["sha256"].is_unique
    pictures = []
    for path, sha256 in zip(files["path"], files["sha256"], strict=True):
        assert sha256_of_file(tmp_path / path) == sha256
        with Image.open(tmp_path / path) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "L", (WIDTH_PX, HEIGHT_PX))
            pictures.append(np.asarray(image))
    assert np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])
    assert 60_000 < files["n_bytes"].mean() < 150_000
    batch, labels = next(read_as_keras_does(tmp_path / "train", 4))
    assert batch.shape == (4, 224, 224, 1)
    assert 0.5 < batch.max() <= 1
    assert sorted(labels) == sorted(files["label"])
