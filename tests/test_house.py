"""Habits of the house: who may import whom, and what the documents must mention."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.files import REPOSITORY
from tasks.runs.keys import imported_modules
from tasks.settings import Section, Settings

ROOMS = (
    *("tasks", "tasks.pixels", "tasks.drawings", "tasks.runs", "tasks.sources", "tasks.networks", "tasks.devices"),
    *(
        "tasks.preparing",
        "tasks.training",
        "tasks.explaining",
        "tasks.publishing",
        "tasks.reporting",
        "tasks.foreign",
        "tasks.scoring",
    ),
    *("flows.engine", "flows", "infra"),
)
"""From the ground up: a room imports from rooms before it only."""
FILES = {
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts): path
    for folder in ("flows", "tasks", "infra")
    for path in sorted((REPOSITORY / folder).rglob("*.py"))
    if path.stem != "__init__"
}
TREES = {module: ast.parse(path.read_text()) for module, path in FILES.items()}


def room_of(module: str) -> str:
    return module.rpartition(".")[0]


def direct_imports(module: str) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & set(FILES)


IMPORTS = {module: direct_imports(module) for module in FILES}


def test_every_module_lies_in_a_room() -> None:
    assert {room_of(module) for module in FILES} == set(ROOMS)


@pytest.mark.parametrize("module", FILES)
def test_arrows_point_down_only(module: str) -> None:
    above = ROOMS[ROOMS.index(room_of(module)) + 1 :]
    assert not [name for name in IMPORTS[module] if room_of(name) in above]


def test_a_picture_of_the_rooms_has_few_arrows() -> None:
    arrows = {(room_of(module), room_of(name)) for module in FILES for name in IMPORTS[module]}
    arrows = {(one, other) for one, other in arrows if one != other}
    print(f"{len(ROOMS)} rooms, {len(arrows)} arrows")
    assert len(ROOMS) <= 22 and len(arrows) <= 100


def test_no_modules_import_each_other_in_a_circle() -> None:
    left = dict(IMPORTS)
    while free := [module for module, names in left.items() if not names & set(left)]:
        for module in free:
            del left[module]
    assert not left


@pytest.mark.parametrize("module", FILES)
def test_a_file_is_neither_too_long_nor_too_short_to_be_one(module: str) -> None:
    n_lines = len(FILES[module].read_text().splitlines())
    assert (n_lines <= 400 or module in LONG) and (n_lines >= 25 or module in SHORT)


LONG = {"tasks.settings": "one table, that of --help and of docs/settings.md"}
SHORT = {
    "tasks.records": "the words that all rooms share",
    "tasks.pixels.greys": "networks are trained without the code that reads files",
    "tasks.pixels.window": "four rooms ask where the lung window is",
}


def test_no_module_is_named_like_one_of_the_standard_library() -> None:
    assert not {module.split(".")[-1] for module in FILES} & set(sys.stdlib_module_names)


DECODING = "pixels.content pixels.decoding pixels.dicom pixels.dicom_reader pixels.greys"
KERAS = "networks.files networks.keras_backend networks.normalisation pixels.greys records"
CLASSIFIER = f"{KERAS} networks.backbones networks.classifier networks.field networks.smoothing"
PROBES = f"{CLASSIFIER} measures networks.twin pixels.covering pixels.window explaining.subjects drawings.transplant"
SCREENER = (
    f"{KERAS} networks.blocks networks.shipped devices.files devices.quality devices.readings devices.screener "
    "matching measures tables"
)
KEYS = {
    "preparing.ingestion": f"matching {DECODING} preparing.copies preparing.groups preparing.patients "
    "records runs.manifest sources.layout tables",
    "preparing.quality": "matching pixels.greys pixels.looks preparing.groups records runs.manifest tables",
    "preparing.splitting": "records runs.manifest",
    "preparing.packing": f"{DECODING} preparing.copies records runs.manifest",
    "preparing.screening": "devices.files devices.quality devices.readings matching measures networks.shipped records "
    "runs.manifest tables",
    "preparing.segmenting": "networks.lung_fields pixels.greys records",
    "training.fitting": f"{CLASSIFIER} networks.augmentation networks.checkpoints networks.field_augmentation "
    "networks.twin training.members training.labelled_images training.settling",
    "training.calibration": f"{CLASSIFIER} measures networks.familiarity networks.twin networks.blocks "
    "networks.segmenter networks.shipped pixels.borrowed_looks pixels.covering pixels.shifts",
    "training.evaluation": f"{CLASSIFIER} measures pixels.covering pixels.shifts",
    "training.exporting": f"{CLASSIFIER} networks.twin",
    "explaining.explanations": f"{PROBES} explaining.lime_sampling explaining.lime_quality explaining.pictures "
    "runs.manifest",
    "explaining.auditing": f"{PROBES} explaining.baselines explaining.lungs explaining.probes explaining.verdict "
    "drawings.devices",
    "training.screener": f"{SCREENER} {DECODING} networks.augmentation networks.checkpoints networks.smoothing "
    "drawings.chests drawings.devices drawings.distractors drawings.sample training.screener_lessons "
    "training.screener_losses training.drawn_pictures training.epochs",
    "training.lungs": f"{KERAS} {DECODING} measures tables networks.augmentation networks.blocks networks.checkpoints "
    "networks.segmenter networks.shipped networks.smoothing drawings.chests drawings.devices drawings.sample "
    "training.drawn_pictures training.epochs training.lung_lessons training.lung_quality",
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


def make_setup(folder: Path, *words: str, **versions: str) -> subprocess.CompletedProcess[str]:
    """Has make set up ``.venv`` where those names on the path say that they are those versions of Python."""
    for name, version in versions.items():
        file = folder / name.replace("_", ".")
        major, minor = version.split(".")
        file.write_text(
            f"#!{sys.executable}\nimport sys\nsys.version_info = ({major}, {minor}, 0)\nexec(sys.argv[2])\n"
        )
        file.chmod(0o755)
    # Whoever calls the tests through make hands on its flags and, with them, its PYTHON.
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "MAKEFLAGS", "MFLAGS")}
    environment["PATH"] = f"{folder}{os.pathsep}{environment['PATH']}"
    command = ["make", "--always-make", ".venv/.run", *words]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("version", ["2.7", "3.10", "3.14"])
def test_make_refuses_a_python_that_is_not_supported_and_names_those_that_are(tmp_path: Path, version: str) -> None:
    done = make_setup(tmp_path, "PYTHON=some_python", some_python=version)
    assert done.returncode == 2
    assert re.findall("^error: .*", done.stderr, re.MULTILINE) == [
        "error: Python 3.11, 3.12 or 3.13 is needed; name one with make PYTHON=/path/to/python3.12"
    ]
    assert "Python 3.11, 3.12 or 3.13" in (REPOSITORY / "README.md").read_text()


@pytest.mark.parametrize(
    "names",
    [
        {"python3": "3.12", "python3_11": "3.11"},
        {"python3": "3.14", "python3_13": "3.13", "python3_12": "3.12"},
        {"python3": "3.10", "python3_13": "3.10", "python3_12": "3.10", "python3_11": "3.11"},
    ],
)
def test_make_takes_python3_or_the_newest_that_is_supported(tmp_path: Path, names: dict[str, str]) -> None:
    done = make_setup(tmp_path, "--dry-run", **names)
    taken = next(name for name, version in names.items() if version in ("3.11", "3.12", "3.13"))
    assert f"{taken.replace('_', '.')} -c" in done.stdout, done.stdout + done.stderr


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
    code = "import sys, flows.pipeline; print([m for m in ('tensorflow', 'keras', 'great_expectations', 'matplotlib', "
    code += "'lime') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
