"""Whatever flags or parameters a run is given: settings within their bounds, or a refusal in one line."""

import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from fault_table import FaultTable
from hostile import bounded_memory, ends_well, hostile  # noqa: F401
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from recipe import RECIPE, to_flags

from flows.engine.command_line import describe_problem, read_flags
from tasks.addresses import source_name
from tasks.errors import SettingsError
from tasks.files import REPOSITORY
from tasks.runs.run import Run
from tasks.settings import Section, Settings
from tasks.sources.fetching import fetch_source


def leaves(model: type[Section] = Settings, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        nested = isinstance(kind, type) and issubclass(kind, Section)
        found += leaves(kind, (*prefix, name)) if nested else [(*prefix, name)]  # type: ignore[arg-type]
    return found


LEAVES = leaves()
NAMES = st.one_of(
    st.sampled_from(LEAVES), st.sampled_from([("dropbox_token",), ("training", "optimizer"), ("__class__",), ("",)])
)
WORDS = st.sampled_from(
    [
        *("", " ", "true", "nan", "inf", "-inf", "1e400", "1e308", "-1", "0", "1", "3.5", "9" * 400, "0x10", "1_000"),
        *("None", "null", "[]", "{}", "[1,2]", '{"a":1}', "a,b", "val,test"),
        *("s3://", "s3://b", "s3://bucket", "s3://bucket/../../x/y", "s3://bucket/x/..", "s3://bucket/x/y/"),
        *("s3://k:v@b/x", "https://", "https://[", "ftp://u:p@h/x", "dropbox:", "dropbox:/../..", "file:///etc/passwd"),
        *(
            "tcp://h:99999",
            "../../..",
            "/dev/null",
            "/proc/self/mem",
            "~",
            "a\nb",
            "-rf",
            "--seed",
            "=1+1",
            "x" * 5_000,
        ),
        *("\u202egpj", "\ud800", "a\x00b", "<script>", "${HOME}", "%s%n", "sample", "\x1b[31m", "ü" * 200),
    ]
)
VALUES = st.one_of(
    WORDS,
    st.integers(-(10**30), 10**30),
    st.floats(),
    st.booleans(),
    st.none(),
    st.lists(st.one_of(WORDS, st.integers()), max_size=3),
    st.dictionaries(st.sampled_from(["a", "source"]), WORDS, max_size=2),
    st.text(max_size=20),
)


def build(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    return {path[0]: build(path[1:], value) if len(path) > 1 else value}


def validate(parameters: Any) -> Settings:
    """As Prefect validates the parameters of a deployment, with the command line's sentence for what does not fit."""
    try:
        return Settings.model_validate(parameters)
    except ValidationError as error:
        raise SettingsError("; ".join(describe_problem(problem) for problem in error.errors())) from None


def use(settings: Settings) -> None:
    """What every command does with its settings first; nothing may appear outside of the named folders."""
    for section in [settings, *(value for _, value in settings if isinstance(value, Section))]:
        assert all(math.isfinite(value) for _, value in section if isinstance(value, float))
    # Whatever is kept or shown of settings is JSON in UTF-8, and names are names.
    settings.model_dump_json().encode()
    source_name(settings.public_source).encode("ascii")
    repr(settings).encode()
    if settings.run_dir is not None:
        folder, copies = Run(settings).folder.absolute(), Run(settings).cache.absolute() / "runs"
        if Run(settings).in_bucket:
            assert folder.resolve().is_relative_to(copies.resolve()) and folder.resolve() != copies.resolve()


@given(parts=st.lists(st.tuples(NAMES, VALUES), min_size=1, max_size=3))
@hostile
def test_any_parameters_of_a_deployment_are_settings_or_refused_in_one_line(
    faults: FaultTable, parts: list[tuple[tuple[str, ...], Any]]
) -> None:
    parameters: dict[str, Any] = {}
    for path, value in parts:
        parameters |= build(path, value)
    ends_well(faults, lambda: use(validate(parameters)))


@given(value=st.recursive(VALUES, lambda inner: st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=8))
@hostile
def test_json_that_is_no_settings_is_refused_in_one_line(faults: FaultTable, value: Any) -> None:
    ends_well(faults, lambda: use(validate(value)))


@given(parts=st.lists(st.tuples(NAMES, WORDS), min_size=1, max_size=3), joined=st.booleans())
@hostile
def test_any_flags_are_settings_or_refused_in_one_line(
    faults: FaultTable, parts: list[tuple[tuple[str, ...], str]], joined: bool
) -> None:
    flags = []
    for path, value in parts:
        name = "--" + ".".join(path).replace("_", "-")
        flags += [f"{name}={value}"] if joined else [name, value]
    ends_well(faults, lambda: use(read_flags(flags, "test")))


def is_real_place(source: str) -> bool:
    """Whether reading it would mean reading this machine, or asking a server; these have tests of their own."""
    if source == "sample" or source.startswith(("https://", "s3://b", "dropbox:")):
        return True
    try:
        return Path(source).is_dir()
    except (OSError, ValueError):
        return False


@given(source=st.one_of(WORDS, st.text(min_size=1, max_size=30)))
@hostile
def test_any_source_without_a_network_is_fetched_or_refused_in_one_line(faults: FaultTable, source: str) -> None:
    if source.strip("/. ") in ("", "sample", "~", "proc", "tmp") or source.startswith(
        ("https://", "s3://b", "dropbox:")
    ):
        return  # those are real places; servers and buckets have tests of their own
    with tempfile.TemporaryDirectory() as name:
        where = {"raw": f"{name}/raw", "cache": f"{name}/cache"}
        ends_well(faults, lambda: fetch_source(validate({"source": source, "storage": where})))
        assert not list(Path(name).rglob("*.partial"))


LINES = [
    ["--source", "no/such/place"],
    ["--source", "a\nb\x1b[31m.zip"],
    ["--source", "x" * 4_000],
    ["--source", "ftp://user:planted-word-5@host/x.zip"],
    ["--source", "https://["],
    ["--training.epochs", "nan"],
    ["--training.learning-rate", "inf"],
    ["--quality.max-undecodable", "nan"],
    ["--ingestion.timeout-s", "1e400"],
    ["--seed", "9" * 400],
    ["--run-dir", "s3://bucket/../x/y"],
    ["--run-dir", "/dev/null/x"],
    ["--run-dir", "x" * 4_000],
    ["--screening.review", "/dev/null"],
    ["--screening.screener", "/proc/self"],
    ["--no-such-flag", "=cmd|' /C calc'!A0"],
]


def run_line(flags: list[str], tmp_path: Path, api: str) -> "subprocess.CompletedProcess[str]":
    folders = ["--storage.cache", str(tmp_path / "cache"), "--storage.raw", str(tmp_path / "raw")]
    folders += to_flags({"sample": RECIPE["sample"]})
    if "--run-dir" not in flags:
        folders += ["--run-dir", str(tmp_path / "run")]
    return subprocess.run(
        [sys.executable, "-m", "flows.pipeline", *flags, *folders],
        cwd=REPOSITORY,
        env=os.environ | {"PREFECT_API_URL": api, "PREFECT_HOME": str(tmp_path / "prefect")},
        capture_output=True,
        text=True,
        check=False,
    )


def assert_one_line(faults: FaultTable, flags: list[str], tmp_path: Path, api: str) -> None:
    faults.n_cases += 1
    done = run_line(flags, tmp_path, api)
    said = done.stdout + done.stderr
    assert done.returncode == 2, said
    assert "Traceback" not in said and "planted-word" not in said
    assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1
    assert "\x1b[31m.zip" not in said


@pytest.mark.slow
@pytest.mark.parametrize("flags", LINES[3:6], ids=str)
def test_a_hostile_command_ends_with_one_line_and_code_2(
    faults: FaultTable, flags: list[str], tmp_path: Path, api: str
) -> None:
    assert_one_line(faults, flags, tmp_path, api)


@pytest.mark.long
@pytest.mark.parametrize("flags", [*LINES[:3], *LINES[6:]], ids=lambda flags: " ".join(flags)[:40])
def test_each_hostile_command_ends_with_one_line_and_code_2(
    faults: FaultTable, flags: list[str], tmp_path: Path, api: str
) -> None:
    assert_one_line(faults, flags, tmp_path, api)


def test_settings_that_fit_are_taken(faults: FaultTable) -> None:
    assert ends_well(faults, lambda: use(validate({"seed": 3, "training": {"epochs": 2}})))
    assert ends_well(faults, lambda: use(validate(json.loads(Settings().model_dump_json()))))
