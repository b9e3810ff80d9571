"""Regular expressions that people write: refused early where they are broken, and matched where they can be ended."""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Annotated

from pydantic import AfterValidator, Field

from tasks.errors import SettingsError

TIMEOUT_S = 10
MATCHER = """
import json, re, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
expression, texts = json.load(sys.stdin)
found = [re.search(expression, text) for text in texts]
json.dump([match and match["patient" if "patient" in match.re.groupindex else 1] for match in found], sys.stdout)
"""
PATTERN_NAMES = ("public", "mendeley", "chexpert", "mimic", "nih", "none")


def _refuse_broken(text: str) -> str:
    if text in PATTERN_NAMES:
        return text
    problem = f"should be one of {', '.join(PATTERN_NAMES)}, or a regular expression with a group for the patient"
    try:
        if re.compile(text).groups:
            return text
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{problem}; as an expression it is broken: {error}") from None
    raise ValueError(rf"{problem}, such as ^.*/(\d+)_")


PatientPattern = Annotated[str, Field(min_length=1, max_length=300), AfterValidator(_refuse_broken)]
"""A pattern by its name, or a regular expression whose group ``patient``, else the first one, is the patient."""


def match_apart(expression: str, texts: Sequence[str], setting: str) -> list[str | None]:
    """What the group of a person's expression finds in each text; ``None`` where it does not fit.

    It runs in a process of its own: nothing else can end an expression that tries for ever.

    Raises:
        SettingsError: If ``TIMEOUT_S`` seconds or 2 GB were too little.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", MATCHER],
            input=json.dumps([expression, list(texts)]),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=True,
        )
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError):
        raise SettingsError(
            f"{setting}: the regular expression takes more than {TIMEOUT_S} s or 2 GB on {len(texts):,} paths; write "
            "it without repeats inside of repeats"
        ) from None
    return list(json.loads(done.stdout))
