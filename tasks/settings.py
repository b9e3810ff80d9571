"""All settings: type, unit, bounds, default and one sentence each. No I/O happens here.

``Settings`` is the parameter of every flow (the web page makes a form of it) and, through pydantic-settings, every
field is a flag of the command line: ``--training.epochs 3``.
"""

import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_serializer, field_validator, model_validator

from tasks.addresses import Folder, Place, RunFolder, hide_keys
from tasks.records import MODEL, TWIN

Split = Literal["val", "test"]
PATTERN_NAMES = ("public", "mendeley", "nih", "none")
AuditPart = Literal["baselines", "insertion", "removal", "blanked", "attribution", "groups"]


class Section(BaseModel):
    """A frozen group of settings that refuses unknown names and unusable values."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="after")
    @classmethod
    def _refuse_no_text(cls, value: Any) -> Any:
        """Refuses text that neither a file name nor JSON can hold."""
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str) and ("\x00" in text or re.search("[\ud800-\udfff]", text)):
                raise ValueError("should be text in UTF-8 without NUL bytes")
        return value


class StorageSettings(Section):
    """Where work that can be reused is kept."""

    cache: Folder = Field("data/cache", description="Folder of finished work, shared by all runs and keyed by content.")
    raw: Folder = Field("data/raw", description="Folder on this machine for unpacked archives and the drawn sample.")


class ScalingSettings(Section):
    """Where shards of images are packed, screened and explained; the results are the same everywhere."""

    runner: str = Field(
        "threads",
        pattern=r"^(threads|dask|tcp://[^\s/]+:[0-9]{1,5})$",
        description="'threads' of this process, 'dask' for processes on this machine, or tcp://host:port, the "
        "scheduler of a Dask cluster; its workers share this machine's folders, or the run is kept in a bucket.",
    )
    n_workers: int | None = Field(
        None, ge=1, le=1_024, description="Threads, or processes of 'dask'; default: one per processor core."
    )

    @property
    def reaches_out(self) -> bool:
        """Whether other machines may work on shards."""
        return self.runner.startswith("tcp://")


class IngestionSettings(Section):
    """What is accepted from a source."""

    sha256: str | None = Field(
        None,
        pattern=r"^[0-9a-f]{64}$",
        description="Expected sha256 of the archive, 64 hex digits; checked when given.",
    )
    skip_unchanged: bool = Field(
        False, description="End early, saying 'nothing new', when source, review, settings and code are unchanged."
    )
    allowed_hosts: tuple[str, ...] = Field(
        ("www.dropbox.com", "dropbox.com", "*.dropboxusercontent.com"),
        min_length=1,
        description="Hosts that a https source and its redirects may name; '*.' stands for any subdomain.",
    )
    ca_file: Place | None = Field(
        None,
        description="PEM file of the certificate authority to trust for https sources; Python 3.13 wants the "
        "certificates to follow RFC 5280, with key usage and key identifiers.",
    )
    timeout_s: float = Field(
        60.0, gt=0, le=86_400, description="Longest silence of a server before the attempt counts as failed."
    )
    tries: int = Field(8, ge=1, le=100, description="Attempts at the source, and at each request, before giving up.")
    backoff_s: float = Field(
        1.0,
        ge=0,
        le=3_600,
        description="First pause between attempts, in seconds; it doubles each time, with jitter, up to 60 s.",
    )
    max_wait_s: float = Field(600.0, ge=0, le=86_400, description="Longest pause at a server's request, in seconds.")
    n_connections: int = Field(8, ge=1, le=64, description="Objects fetched from a bucket at the same time.")
    aws_block: str | None = Field(
        None, description="Name of a prefect-aws AwsCredentials block; default: the standard chain of credentials."
    )
    dropbox_block: str | None = Field(
        None, description="Name of a Prefect Secret block with the token for dropbox: sources; default: DROPBOX_TOKEN."
    )
    max_unpacked_gb: float = Field(
        20.0, gt=0, le=1e6, description="Largest unpacked size of an archive, in GB (10^9 bytes)."
    )
    max_members: int = Field(200_000, ge=1, le=10**9, description="Largest number of members of an archive.")
    max_ratio: float = Field(
        100.0, ge=1, le=1e9, description="Largest ratio of unpacked to packed size of an archive member."
    )
    max_side_px: int = Field(
        20_000, ge=64, le=10**6, description="Longest side of an image that is still decoded, in pixels."
    )
    ignore: tuple[str, ...] = Field(
        (),
        description="Files and folders of the source to leave out: patterns like 'hospital_b' or '*/masks/*.png'; one "
        "without '/' fits at any depth.",
    )
    patients: str | None = Field(
        None,
        min_length=1,
        max_length=300,
        description="How file names tell the patient: public, mendeley, nih, or none; or a regular "
        "expression for the path of an image, with a group for the patient. Default: one of the first two if 95 % of "
        "the names fit it, and only where neither index.csv nor DICOM tells patients.",
    )
    dicom_classes: tuple[Annotated[str, Field(pattern=r"^(CR|DX|SC|[0-9.]{8,64})$")], ...] = Field(
        ("CR", "DX"),
        min_length=1,
        description="SOP classes of DICOM files that are taken: CR, DX, SC (secondary capture), or UIDs.",
    )
    groups: tuple[Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]{0,31}$")], ...] = Field(
        (),
        description="What results are given by: columns of index.csv; in DICOM site, scanner, view, age_band, sex.",
    )

    @field_validator("patients")
    @classmethod
    def _refuse_broken(cls, text: str | None) -> str | None:
        with suppress(re.error, RecursionError, OverflowError):
            if text is None or text in PATTERN_NAMES or re.compile(text).groups:
                return text
        names = ", ".join(PATTERN_NAMES)
        raise ValueError(rf"should be one of {names}, or a regular expression with a group, such as ^.*/(\d+)_")


class SampleSettings(Section):
    """The embedded sample of drawn chest X-rays (``--source sample``)."""

    n_images: int = Field(600, ge=40, le=20_000, description="Number of drawn images over all splits.")
    side_px: int = Field(256, ge=128, le=1024, description="Height of a drawn image, in pixels.")
    device_effect: Literal["natural", "strong", "over_lungs", "outside_lungs"] = Field(
        "natural",
        description="'strong' plants a device shortcut in the training images, 'over_lungs' and 'outside_lungs' one "
        "in that place alone; for testing the audit.",
    )


class QualitySettings(Section):
    """Bounds of the data checks."""

    max_undecodable: float = Field(
        0.01, ge=0, le=1, description="Largest accepted share of files that are refused or do not decode."
    )
    max_odd: float = Field(
        0.05, ge=0, le=1, description="Largest accepted share of images that are flat, saturated or inverted."
    )
    max_unmatched: float = Field(
        0.05,
        ge=0,
        le=1,
        description="Largest accepted share of the paths in a table (index.csv, review, answers) that name no file of "
        "the source; one that names none of its images is always refused.",
    )
    min_images: int = Field(
        1,
        ge=1,
        le=10**9,
        description="Smallest accepted number of usable images of a class in a split after splitting.",
    )
    min_train_images: int = Field(
        4, ge=1, le=10**9, description="Smallest accepted number of training images of a class."
    )
    max_association: float = Field(
        0.3, ge=0, le=1, description="Largest accepted Cramér's V of class and a group of ingestion.groups in train."
    )
    min_side_px: int = Field(64, ge=1, le=10**6, description="Shortest accepted side of an image, in pixels.")
    max_side_px: int = Field(8_000, ge=64, le=10**6, description="Longest accepted side of an image, in pixels.")


class SplittingSettings(Section):
    """How validation is redrawn from train + val."""

    val_fraction: float = Field(0.1, gt=0, lt=0.5, description="Share of patients that go to validation.")
    salt: str = Field("x_ray_classification", description="Salt of the patient hash; another salt, another draw.")


class PackingSettings(Section):
    """How files become square uint8 arrays of 224 px."""

    padding: bool = Field(
        False,
        description="Pad to a square instead of stretching; that paints the aspect ratio into the image, a shortcut.",
    )


class ScreeningSettings(Section):
    """Which images count as showing a medical device, and which a person is asked about."""

    review: Place | None = Field(
        None,
        description="CSV of readings (path,device,…). Default: device_review.csv at the root of the source, else the "
        "shipped table of the public data set when at least 95 % of its paths are in the source.",
    )
    answers: Place | None = Field(
        None,
        description="Folder of people's answers about doubtful images, for all runs, one CSV per submission; a CSV "
        "of the same name beside it is read too. Default: device_answers beside the run folder.",
    )
    screener: Place | None = Field(
        None,
        description="Folder of another screener: model.keras, model.sha256 and readings.csv, which lists what it "
        "learnt from; without that list the report does not measure it. Default: the shipped one.",
    )
    segmenter: Place | None = Field(
        None,
        description="Folder of another segmenter of lungs: model.keras and model.sha256. Default: the shipped one.",
    )
    threshold: float = Field(
        0.3,
        ge=0,
        le=1,
        description="device_score from which an image nobody read counts as showing a device; at the default, "
        "sensitivity + specificity is highest on the readings the shipped screener was tuned on and on drawn chests.",
    )
    exclude_from: float = Field(
        0.25,
        ge=0,
        le=1,
        description="device_score from which an image nobody read leaves training, the lower edge of the doubtful "
        "band: a clean image lost costs less than a device kept. At the default, at most 15 % of the clean pneumonia "
        "images the shipped screener was tuned on are lost; each report says how many were.",
    )
    doubtful_to: float = Field(
        0.8, ge=0, le=1, description="Upper edge of the doubtful band, whose images a person is asked about."
    )
    n_review: int = Field(
        200, ge=0, le=2_000, description="Most images on the sheet for a person, those nearest to the threshold first."
    )
    wait_for_review: bool = Field(
        False,
        description="Suspend a deployed run until a person has answered about the doubtful images, then resume it.",
    )

    @property
    def leaves_from(self) -> float:
        """The score from which on an image nobody read leaves training: never above the threshold."""
        return min(self.exclude_from, self.threshold)


class TrainingSettings(Section):
    """The network and its training."""

    epochs: int = Field(24, ge=1, le=1_000, description="Passes over the training images, for each member.")
    n_models: int = Field(
        3,
        ge=1,
        le=50,
        description="Members: networks that differ in their seed alone; the model averages their logits. With the "
        "default, the public data set takes about 18 minutes on 2 cores.",
    )
    batch_size: int = Field(32, ge=1, le=4_096, description="Images in one optimisation step.")
    learning_rate: float = Field(
        2e-3, gt=0, le=1, description="Peak learning rate of the cosine schedule (AdamW); about 1e-4 suits a backbone."
    )
    side_px: int = Field(128, ge=32, le=224, description="Side that the network resizes images to, in pixels.")
    width: int = Field(
        32, ge=4, le=256, description="Channels of the first convolution from scratch; later ones are multiples."
    )
    field: Literal["whole", "lungs", "varied"] = Field(
        "varied",
        description="What the network sees: the whole picture, the lungs alone, or the whole picture after a training "
        "that varies what is outside of the lungs.",
    )
    backbone: str | None = Field(
        None, description="A Keras Applications network to start from (MobileNetV3Small, …); default: from scratch."
    )
    weights: Place | None = Field(
        None,
        description="Weights of the backbone: 'imagenet' (fetched, needs network access) or a .weights.h5 file of the "
        "same network; by default random ones, with which a backbone learns poorly.",
    )

    @model_validator(mode="after")
    def _refuse_weights_of_nothing(self) -> "TrainingSettings":
        if self.weights is not None and self.backbone is None:
            raise ValueError("weights are those of a backbone; name it with training.backbone, or leave weights out")
        return self


class EvaluationSettings(Section):
    """What is measured."""

    splits: tuple[Split, ...] = Field(
        ("val", "test"), min_length=1, description="Splits to evaluate; 'val' alone leaves test unread."
    )
    n_bootstrap: int = Field(1_000, ge=20, le=100_000, description="Bootstrap draws of patients for each interval.")
    min_sensitivity: float = Field(
        0.95,
        gt=0,
        lt=1,
        description="Sensitivity that the second, high-sensitivity threshold keeps on validation, as it is and under "
        "each shift of it.",
    )


class ExplanationSettings(Section):
    """Which images LIME explains, and in what detail."""

    n_images: int = Field(12, ge=0, le=1_000, description="Images to explain, spread over right and wrong answers.")
    n_samples: int = Field(512, ge=50, le=20_000, description="Perturbed copies of an image per explanation.")
    n_segments: int = Field(64, ge=8, le=400, description="Approximate number of superpixels (SLIC) per image.")
    n_repeated: int = Field(
        4,
        ge=0,
        le=1_000,
        description="Images among them that are explained with several seeds, to see how stable maps are.",
    )
    n_seeds: int = Field(3, ge=2, le=50, description="Seeds for each of these.")
    batch_size: int = Field(256, ge=1, le=4_096, description="Perturbed copies in one call of the network.")


class AuditingSettings(Section):
    """Whether the network reads lungs or devices, and what counts as a shortcut."""

    compare_unfiltered: bool = Field(
        False,
        description="Also train a twin on as many images of each class that were not screened, and show what screening "
        "changed; training takes twice as long.",
    )
    fail_on: tuple[AuditPart, ...] = Field(
        (), description="Parts of the audit whose failure ends a run with an error, after its report is written."
    )
    n_images: int = Field(
        100, ge=1, le=2_000, description="Most images of each class that devices are put on, and taken off."
    )
    min_images: int = Field(20, ge=2, le=10**9, description="Fewest images that a rule of the verdict is judged on.")
    max_shift: float = Field(
        0.1,
        gt=0,
        le=1_000,
        description="Largest accepted shift of the logit when a device comes or goes, as a share of the gap between "
        "the classes.",
    )
    max_flips: float = Field(
        0.05, gt=0, le=1, description="Largest accepted share of images whose decision a device alone flips."
    )
    max_outside_auc: float = Field(
        0.75, ge=0.5, le=1, description="Largest accepted AUC where only the outside of the lung window is left."
    )
    min_lungs_gain: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Smallest accepted gain in AUC where nothing but the lungs is left over where they are covered; a "
        "network that reads lungs knows more from them than from all the rest.",
    )
    max_lungs_removed_auc: float = Field(
        0.66,
        ge=0.5,
        le=1,
        description="Largest accepted AUC where the lungs are covered; 0.5 is chance, and the sick child's chest "
        "around them leaves a little more.",
    )
    max_hole_gain: float = Field(
        0.02,
        ge=0,
        le=1,
        description="Largest accepted gain in AUC where an image's own lungs are covered over covering another "
        "child's: what a network reads from the shape of the hole.",
    )
    max_excess_lift: float = Field(
        0.5,
        gt=0,
        le=1_000,
        description="Largest accepted lift of LIME weight on devices, above the lift of the same places without one.",
    )
    max_group_loss: float = Field(
        0.1,
        gt=0,
        le=1,
        description="Largest accepted loss of AUC between normal images with a device and pneumonia images without.",
    )
    min_gain: float = Field(
        0.02, ge=0, le=1, description="Smallest accepted gain in AUC over the best baseline that sees no lung."
    )


class PublishingSettings(Section):
    """Which finished run is the published one."""

    enabled: bool = Field(
        False,
        description="Publish the run once it is sealed, if its audit passed and it is no worse than what is published; "
        "published.json, beside the runs, then names it.",
    )
    max_drop: float = Field(
        0.01,
        ge=0,
        le=1,
        description="Largest accepted drop of AUC below the published model's, on validation and on validation images "
        "without a device.",
    )
    unknown_patients: bool = Field(
        False,
        description="Publish also where patients are unknown, so that no check could tell whether one child is in "
        "training and in validation or test.",
    )


class Settings(Section):
    """All settings of a run."""

    source: Place = Field(
        "sample",
        min_length=1,
        description="'sample', a folder, .zip or .tar.gz file, s3://bucket/prefix, a Dropbox link or dropbox:/folder.",
    )
    run_dir: RunFolder | None = Field(
        None,
        min_length=1,
        description="The run folder, used exactly as given: here, or s3://bucket/prefix/run, where machines share it; "
        "an address that ends in / names the folder of runs. Default: in data/runs, named after UTC time and source.",
    )
    train_on: str | None = Field(None, description="Deployment that trains, such as train/gpu; default: this process.")
    seed: int = Field(7, ge=0, le=2**31 - 1, description="Seed of every random choice.")
    export: Literal["onnx"] | None = Field(
        None, description="'onnx' also writes model.onnx, with thresholds and meaning of its input in its metadata."
    )
    storage: StorageSettings = Field(StorageSettings(), description=StorageSettings.__doc__)
    scaling: ScalingSettings = Field(ScalingSettings(), description=ScalingSettings.__doc__)
    ingestion: IngestionSettings = Field(IngestionSettings(), description=IngestionSettings.__doc__)
    sample: SampleSettings = Field(SampleSettings(), description=SampleSettings.__doc__)
    quality: QualitySettings = Field(QualitySettings(), description=QualitySettings.__doc__)
    splitting: SplittingSettings = Field(SplittingSettings(), description=SplittingSettings.__doc__)
    packing: PackingSettings = Field(PackingSettings(), description=PackingSettings.__doc__)
    screening: ScreeningSettings = Field(ScreeningSettings(), description=ScreeningSettings.__doc__)
    training: TrainingSettings = Field(TrainingSettings(), description=TrainingSettings.__doc__)
    evaluation: EvaluationSettings = Field(EvaluationSettings(), description=EvaluationSettings.__doc__)
    explanation: ExplanationSettings = Field(ExplanationSettings(), description=ExplanationSettings.__doc__)
    auditing: AuditingSettings = Field(AuditingSettings(), description=AuditingSettings.__doc__)
    publishing: PublishingSettings = Field(PublishingSettings(), description=PublishingSettings.__doc__)

    @property
    def networks(self) -> tuple[str, ...]:
        """``model``, and ``unfiltered`` if the twin is asked for; also the names of their files."""
        return (MODEL, TWIN) if self.auditing.compare_unfiltered else (MODEL,)

    @property
    def public_source(self) -> str:
        """The source without its keys; see ``hide_keys``."""
        return hide_keys(self.source)

    @field_serializer("source", when_used="json")
    def _write_source(self, source: str) -> str:
        # Prefect writes a run's parameters into its database; the code that fetches the source reads the object.
        return hide_keys(source)

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """For ``repr`` and ``str``: shows the source without its keys."""
        for name, value in super().__repr_args__():
            yield name, self.public_source if name == "source" else value
