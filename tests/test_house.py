"""Habits of the house: who may import whom, and what the documents must mention."""

import ast
import re
import sys

import pytest

from tasks.settings import Section, Settings
from tasks.stages import imported_modules
from tasks.storage import REPOSITORY

# From the ground up; a module imports from lower rows only, never from its own: a stage knows no stage.
ROWS = [
    {"tasks.addresses"},
    {"tasks.settings", "tasks.records", "tasks.artifacts"},
    {"tasks.room", "tasks.s3_client"},
    {"tasks.storage", "tasks.retries"},
    {"tasks.run_copies"},
    {"tasks.stages"},
    {
        "tasks.device_drawing",
        "tasks.distractor_drawing",
        "tasks.tables",
        "tasks.file_sums",
        "tasks.pseudonyms",
        "tasks.provenance",
        "tasks.keras_backend",
        "tasks.measures",
        "tasks.masks",
        "tasks.screener_files",
        "tasks.shifts",
        "tasks.thresholds",
        "tasks.audit_verdict",
        "tasks.device_transplant",
        "tasks.audit_baselines",
    },
    {
        "tasks.figures",
        "tasks.report_data",
        "tasks.images",
        "tasks.array_lime",
        "tasks.answers",
        "tasks.readings",
        "tasks.screener_quality",
        "tasks.backbones",
        "tasks.augmentation",
        "tasks.normalisation",
        "tasks.initial_weights",
        "tasks.network_files",
        "tasks.explanation_pictures",
        "tasks.suspects",
        "tasks.publishing_rules",
        "data.anatomy",
    },
    {
        "tasks.lime_quality",
        "tasks.audit_probes",
        "tasks.layout",
        "tasks.familiarity",
        "tasks.archives",
        "tasks.networks",
        "tasks.epochs",
        "tasks.contact_sheet",
        "data.sample",
        "tasks.web_links",
    },
    {
        "tasks.dropbox_folder",
        "tasks.buckets",
        "tasks.loose_images",
        "tasks.screener",
        "tasks.lessons",
        "tasks.members",
        "tasks.report_devices",
        "tasks.report_results",
        "tasks.report_audit",
        "tasks.report_published",
        "tasks.report_gallery",
    },
    {"tasks.sources", "tasks.screener_loss", "tasks.loose_tables"},
    {
        "tasks.ingestion",
        "tasks.quality",
        "tasks.splitting",
        "tasks.packing",
        "tasks.screening",
        "tasks.screener_training",
        "tasks.training",
        "tasks.calibration",
        "tasks.evaluation",
        "tasks.explanations",
        "tasks.auditing",
        "tasks.reports",
        "tasks.model_card",
        "tasks.sealing",
        "tasks.publishing",
        "tasks.device_table",
        "tasks.scoring",
    },
    {
        "flows.command_line",
        "flows.run_folders",
        "flows.remote_training",
        "flows.labels",
        "flows.shards",
        "flows.gpu_slot",
    },
    {"flows.prepare", "flows.train", "flows.explain", "flows.review"},
    {"flows.pipeline", "flows.screen", "flows.score", "flows.publish", "flows.train_screener"},
]
MODULES = sorted(
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
    for folder in ("flows", "tasks", "data")
    for path in (REPOSITORY / folder).glob("*.py")
    if path.stem != "__init__"
)


def direct_imports(module: str) -> set[str]:
    text = REPOSITORY.joinpath(*module.split(".")).with_suffix(".py").read_text()
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & set(MODULES)


def row_of(module: str) -> int:
    return next(i for i, row in enumerate(ROWS) if module in row)


def test_every_module_has_its_row() -> None:
    assert sorted(set().union(*ROWS)) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_arrows_point_down_only(module: str) -> None:
    assert direct_imports(module) <= set().union(*ROWS[: row_of(module)])


def test_no_module_is_named_like_one_of_the_standard_library() -> None:
    assert not {module.split(".")[-1] for module in MODULES} & set(sys.stdlib_module_names)


NETWORK = "images initial_weights keras_backend network_files networks normalisation backbones records thresholds"
PROBES = f"{NETWORK} measures masks device_drawing device_transplant suspects"
KEYS = {
    "ingestion": "images layout records tables",
    "quality": "pseudonyms records",
    "splitting": "records",
    "packing": "images records",
    "screening": "images initial_weights keras_backend masks measures network_files normalisation readings records "
    "screener screener_files screener_quality tables",
    "training": f"{NETWORK} augmentation epochs members suspects",
    "calibration": f"{NETWORK} familiarity shifts suspects",
    "evaluation": f"{NETWORK} measures shifts",
    "explanations": f"{PROBES} array_lime audit_probes explanation_pictures lime_quality",
    "auditing": f"{PROBES} audit_baselines audit_probes audit_verdict",
    "screener_training": "augmentation device_drawing distractor_drawing epochs images initial_weights keras_backend "
    "lessons measures network_files normalisation readings records screener screener_files screener_loss "
    "screener_quality tables data.anatomy data.sample",
}
"""Beside a stage's own module, what is in its key: what shapes its result. More makes a comment cost a training."""


@pytest.mark.parametrize("stage", KEYS)
def test_the_key_of_a_stage_holds_the_code_that_shapes_its_result_and_no_other(stage: str) -> None:
    names = {name.removeprefix("tasks.") for name in imported_modules(f"tasks.{stage}")}
    assert names == {stage, *KEYS[stage].split()}


def make_verbs() -> list[str]:
    return re.findall(r"^([a-z-]+):.*##", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)


def test_the_readme_names_every_make_verb_and_no_other() -> None:
    readme = (REPOSITORY / "README.md").read_text()
    assert set(re.findall(r"(?:^|`|run: )make ([a-z][a-z-]*)", readme, re.MULTILINE)) == set(make_verbs())


def setting_names(model: type[Section] = Settings, prefix: str = "") -> list[str]:
    names = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        nested = isinstance(kind, type) and issubclass(kind, Section)
        names += setting_names(kind, f"{name}.") if nested else [prefix + name]  # type: ignore[arg-type]
    return names


def test_the_settings_page_names_every_setting_and_no_other() -> None:
    page = (REPOSITORY / "docs" / "settings.md").read_text()
    assert re.findall(r"^\| `([a-z0-9_.]+)` \|", page, re.MULTILINE) == setting_names()


def test_no_picture_of_the_real_data_set_is_in_the_repository() -> None:
    skipped = {".venv", ".git", "raw", "cache", "runs"}
    files = [p for p in REPOSITORY.rglob("*.jp*g") if not skipped & set(p.relative_to(REPOSITORY).parts)]
    assert files == []


def test_importing_the_pipeline_loads_neither_tensorflow_nor_great_expectations() -> None:
    import subprocess

    code = "import sys, flows.pipeline; print([m for m in ('tensorflow', 'keras', 'great_expectations', 'matplotlib', "
    code += "'lime') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
