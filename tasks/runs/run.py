"""A run: the one object that flows and stages pass on."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from tasks.errors import RunError
from tasks.files import sha256_of_file
from tasks.pixels.masks import Masks
from tasks.pixels.packed import PackedImages
from tasks.records import Facts, StageParts
from tasks.runs.keys import code_version, package_versions
from tasks.runs.manifest import read_manifest
from tasks.runs.places import Place
from tasks.runs.stages import read_stage, run_stage


class Run(Place):
    """A run: its place, its files, and the way to do a stage.

    Example: ``Run(settings).stage("split", reads=["manifest.parquet"], given=…, make=make)``.
    """

    def manifest(self) -> pd.DataFrame:
        """``manifest.parquet``: a row per image, nullable dtypes, sorted by path; RunError if it is missing."""
        return read_manifest(self.folder)

    def images(self) -> PackedImages:
        """The packed pixels; RunError if they are missing from the run or the cache."""
        return PackedImages(self.folder, self.cache)

    def masks(self) -> Masks:
        """The masks of devices; RunError if the run was not screened."""
        return Masks(self.folder, self.cache)

    def lungs(self) -> Masks:
        """The masks of lungs; RunError if the run was not screened."""
        return Masks(self.folder, self.cache, "lungs")

    def facts(self, stage: str) -> Facts:
        """The facts of a finished stage; RunError if it is not finished."""
        return read_stage(self.folder, stage).facts

    def stage(
        self,
        name: str,
        *,
        given: Mapping[str, object],
        make: Callable[[Path], Facts],
        reads: Sequence[str] = (),
        packages: Sequence[str] = (),
        resumable: bool = False,
        is_valid: Callable[[Path], bool] = lambda entry: True,
    ) -> Facts:
        """Does a stage, or reuses it from the cache, and places its files in the run folder.

        Args:
            name: Name of the stage.
            given: What the result depends on besides the files that are read: settings, and content of other folders.
            make: Writes the stage's files into the empty folder it is given and returns counts for log and report. The
                code of its module, and of what that imports, counts too.
            reads: Names of the files of the run that the result depends on.
            packages: Installed distributions whose version matters to the result.
            resumable: Whether ``make`` can resume what an interrupted attempt left in its folder.
            is_valid: Whether a cache entry is still valid; an invalid one is made again.

        Returns:
            The facts of the stage with ``reused`` (from the cache or not) and ``seconds`` (how long the work took).

        Raises:
            RunError: If a file that is read is missing.
        """
        parts = StageParts(
            reads={file: _checksum_of(self.folder / file) for file in reads},
            given=dict(given),
            code=code_version(make.__module__),
            packages=package_versions(packages),
        )
        return run_stage(self, name, parts, make, resumable=resumable, is_valid=is_valid)


def _checksum_of(path: Path) -> str:
    if not path.is_file():
        raise RunError(f"{path} is missing: run the stage that writes it first")
    return sha256_of_file(path)
