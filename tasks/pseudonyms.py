"""Pseudonyms: what reports, artifacts and data checks call a patient, instead of what the source calls them."""

import hashlib
import hmac

import pandas as pd

from tasks.storage import digest


def name_patients(manifest: pd.DataFrame) -> "pd.Series[str]":
    """A pseudonym for the patient of each row: ``P-3f9a2c1b``.

    A keyed hash of the patient; its key is made of the checksums of all files. So the same data give the same names,
    there is no secret to keep, and a name can be traced back only by whoever has the data anyway: numbers like
    ``person12`` are few, and with a salt that stands in a report, or none, each could be tried. Data that grow give
    other names.

    Args:
        manifest: Columns ``patient_id, sha256``.
    """
    key = digest(["patients", sorted(manifest["sha256"])]).encode()
    return manifest["patient_id"].map(
        lambda patient: f"P-{hmac.new(key, str(patient).encode(), hashlib.sha256).hexdigest()[:8]}"
    )
