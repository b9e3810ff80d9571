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

from tasks.files import REPOSITORY
from tasks.pixels.content import UndecodableError
from tasks.pixels.dicom_reader import BURNED_IN, main

LONGEST_S = 60.0  # for one file; the largest radiographs take about a second
CLASSES = ("CR", "DX")

Reader = subprocess.Popen[bytes]
_idle: list[Reader] = []


def describe_dicom(notes: Sequence[str]) -> list[str]:
    """Lines for the log about DICOM files, of each of which ``notes`` has what is to be known."""
    lines = [f"{len(notes):,} DICOM files; presentation states beside them, if any, are ignored"] if notes else []
    counts = Counter(note for of_file in notes for note in of_file.split("; ") if note)
    return lines + [f"{'warning: ' if note == BURNED_IN else ''}{n:,} of them: {note}" for note, n in counts.items()]


def read_dicom(
    data: bytes, max_side_px: int, classes: tuple[str, ...], groups: tuple[str, ...] | None = None
) -> dict[str, Any]:
    """The header of a file, with the values of ``groups`` (``dicom_reader.read_header``); without these its ``grey``,
    the picture as a viewer shows it, uint8 ``(height, width)``, 0 black to 255 white.

    Raises:
        UndecodableError: If it is no radiograph that is taken, is broken, or takes more memory or time than allowed;
            the message quotes none of its tags.
    """
    asked = {"max_side_px": max_side_px, "classes": classes, "groups": groups}
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
    return facts if groups is not None else {"grey": np.frombuffer(content, np.uint8).reshape(facts["shape"])}


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
