"""DICOM radiographs: asks a process apart (``tasks.pixels.dicom_reader``) for headers and greys, and bounds it.

Processes are started when a file needs one, and used again; one that hangs or crashes is replaced.
"""

import atexit
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.files import REPOSITORY
from tasks.pixels.dicom_reader import BURNED_IN, serve

LONGEST_S = 60.0  # for one file; the largest radiographs take about a second
CLASSES = ("CR", "DX")

Reader = subprocess.Popen[bytes]
_idle: list[Reader] = []


class RefusedDicomError(ValueError):
    """A DICOM file that is not taken; the message says why, and quotes none of its tags."""


@dataclass(frozen=True)
class DicomRules:
    """Which DICOM files are taken.

    Attributes:
        max_side_px: Longest side.
        max_pixels: Most pixels.
        classes: SOP classes: CR, DX, SC or a UID.
    """

    max_side_px: int
    max_pixels: int
    classes: tuple[str, ...] = CLASSES


def read_dicom_header(data: bytes, rules: DicomRules, groups: tuple[str, ...] = ()) -> dict[str, Any]:
    """``width_px``, ``height_px``, ``patient``, ``groups`` and ``notes`` of a file; see ``dicom_reader.read_header``.

    Raises:
        RefusedDicomError: If it is no radiograph that is taken, or is broken.
    """
    return _ask(data, rules, header=True, groups=list(groups))[0]


def read_dicom_grey(data: bytes, rules: DicomRules) -> NDArray[np.uint8]:
    """The picture as a viewer shows it, uint8 ``(height, width)``, 0 black to 255 white, upright.

    Raises:
        RefusedDicomError: If it is no radiograph that is taken, is broken, or takes more memory or time than allowed.
    """
    facts, content = _ask(data, rules, header=False)
    return np.frombuffer(content, np.uint8).reshape(facts["height_px"], facts["width_px"])


def describe_dicom(notes: Sequence[Sequence[str]]) -> list[str]:
    """Lines for the log about DICOM files, of each of which ``notes`` has what is to be known."""
    lines = [f"{len(notes):,} DICOM files; presentation states beside them, if any, are ignored"] if notes else []
    counts = Counter(note for of_file in notes for note in of_file)
    return lines + [f"{'warning: ' if note == BURNED_IN else ''}{n:,} of them: {note}" for note, n in counts.items()]


def _ask(data: bytes, rules: DicomRules, **asked: Any) -> tuple[dict[str, Any], bytes]:
    asked |= {"max_side_px": rules.max_side_px, "max_pixels": rules.max_pixels, "classes": rules.classes}
    asked |= {"longest_s": LONGEST_S, "n_bytes": len(data)}
    reader = _take_reader()
    try:
        assert reader.stdin and reader.stdout
        reader.stdin.write(json.dumps(asked).encode() + b"\n")
        reader.stdin.write(data)
        reader.stdin.flush()
        facts = json.loads(reader.stdout.readline())
        n_bytes = facts.pop("n_bytes")
        content = reader.stdout.read(n_bytes)
        if len(content) < n_bytes:
            raise EOFError
    except (OSError, ValueError, EOFError):
        _end_reader(reader)
        raise RefusedDicomError("does not decode as DICOM (its decoder crashed or took too long)") from None
    except BaseException:
        _end_reader(reader)  # its answer was not read
        raise
    _idle.append(reader)
    if "refused" in facts:
        raise RefusedDicomError(facts["refused"])
    return facts, content


def _take_reader() -> Reader:
    try:
        return _idle.pop()
    except IndexError:
        paths = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
        return subprocess.Popen(
            [sys.executable, "-P", "-m", serve.__module__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": paths, "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C is for the run, which then closes its readers' input
        )


def _end_reader(reader: Reader) -> None:
    reader.kill()
    reader.communicate()


@atexit.register
def _end_readers() -> None:
    while _idle:
        _end_reader(_idle.pop())


os.register_at_fork(after_in_child=_idle.clear)  # two processes must not share a reader
