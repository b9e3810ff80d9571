"""A run: the one noun that flows and stages hand on."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from tasks.pixels.masks import DeviceMasks
from tasks.pixels.packed import PackedImages
from tasks.records import Facts
from tasks.runs.manifest import read_manifest
from tasks.runs.places import Place
from tasks.runs.stages import read_stage, run_stage


class Run(Place):
    """A run: where it lies, what it holds, and how a stage of it is done.

    Example: ``Run(settings).stage("split", reads=["manifest.parquet"], given=…, make=make)``.
    """

    def manifest(self) -> pd.DataFrame:
        """``manifest.parquet``: a row per image, nullable dtypes, sorted by path; RunError if there is none."""
        return read_manifest(self.folder)

    def images(self) -> PackedImages:
        """The packed pixels; RunError if there are none, or the cache no longer has them."""
        return PackedImages(self.folder, self.cache)

    def masks(self) -> DeviceMasks:
        """The masks of devices; RunError if nothing was screened."""
        return DeviceMasks(self.folder, self.cache)

    def facts(self, stage: str) -> Facts:
        """What a finished stage found; RunError if it was not done."""
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
        """Does a stage, or takes it from the cache, and places its files in the run folder.

        Args:
            name: Name of the stage.
            given: What the result depends on beside the files that are read: settings, and what other folders hold.
            make: Writes the stage's files into the empty folder it is given and returns counts for log and report. The
                code of its module, and of what that imports, counts too.
            reads: Names of the files of the run that the result depends on.
            packages: Installed distributions whose version matters to the result.
            resumable: Whether ``make`` can resume what an interrupted attempt left in its folder.
            is_valid: Whether an entry of the cache still holds; one that does not is made again.

        Returns:
            The facts of the stage with ``reused`` (from the cache or not) and ``seconds`` (that the work took).

        Raises:
            RunError: If a file that is read is missing.
        """
        return run_stage(self, name, reads, given, make, packages, resumable=resumable, is_valid=is_valid)
