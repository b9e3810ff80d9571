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
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.files import REPOSITORY
from tasks.pixels.content import UndecodableError
from tasks.pixels.dicom_reader import BURNED_IN, main

LONGEST_S = 60.0  # for one file; the largest radiographs take about a second
CLASSES = ("CR", "DX")

Reader = subprocess.Popen[bytes]
_idle: list[Reader] = []


def read_dicom_header(
    data: bytes, max_side_px: int, classes: tuple[str, ...] = CLASSES, groups: tuple[str, ...] = ()
) -> dict[str, Any]:
    """``width_px``, ``height_px``, ``patient``, ``groups`` and ``notes`` of a file; see ``dicom_reader.read_header``.

    Raises:
        UndecodableError: If it is no radiograph that is taken, or is broken; the message quotes none of its tags.
    """
    return _ask(data, max_side_px=max_side_px, classes=classes, groups=groups)[0]


def read_dicom_grey(data: bytes, max_side_px: int, classes: tuple[str, ...] = CLASSES) -> NDArray[np.uint8]:
    """The picture as a viewer shows it, uint8 ``(height, width)``, 0 black to 255 white.

    Raises:
        UndecodableError: As ``read_dicom_header``, or if it takes more memory or time than allowed.
    """
    facts, content = _ask(data, max_side_px=max_side_px, classes=classes)
    return np.frombuffer(content, np.uint8).reshape(facts["shape"])


def describe_dicom(notes: Sequence[str]) -> list[str]:
    """Lines for the log about DICOM files, of each of which ``notes`` has what is to be known."""
    lines = [f"{len(notes):,} DICOM files; presentation states beside them, if any, are ignored"] if notes else []
    counts = Counter(note for of_file in notes for note in of_file.split("; ") if note)
    return lines + [f"{'warning: ' if note == BURNED_IN else ''}{n:,} of them: {note}" for note, n in counts.items()]


def _ask(data: bytes, **asked: Any) -> tuple[dict[str, Any], bytes]:
    reader = _take_reader()
    try:
        assert reader.stdin and reader.stdout
        reader.stdin.write(json.dumps({**asked, "longest_s": LONGEST_S, "n_bytes": len(data)}).encode() + b"\n")
        reader.stdin.write(data)
        reader.stdin.flush()
        facts = json.loads(reader.stdout.readline())
        content = reader.stdout.read(facts["n_bytes"])
        if len(content) < facts.pop("n_bytes"):
            raise EOFError
    except (OSError, ValueError, EOFError):
        _end_reader(reader)
        raise UndecodableError("does not decode as DICOM (its decoder crashed or took too long)") from None
    except BaseException:
        _end_reader(reader)  # its answer was not read
        raise
    _idle.append(reader)
    if "refused" in facts:
        raise UndecodableError(facts["refused"])
    return facts, content


def _take_reader() -> Reader:
    try:
        return _idle.pop()
    except IndexError:
        return subprocess.Popen(
            [sys.executable, "-m", main.__module__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=REPOSITORY,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
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
