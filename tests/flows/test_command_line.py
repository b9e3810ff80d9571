"""Flags, errors in one sentence, and exit codes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel, Field

from flows.engine.command_line import read_flags, read_own_flags, run_command
from flows.engine.run_folders import with_run_folder
from flows.score import ScoreFlags
from flows.screen import ScreenFlags
from tasks.addresses import Folder, Place, RunFolder
from tasks.errors import SettingsError
from tasks.files import REPOSITORY
from tasks.settings import Section, Settings


def all_flags(model: type[Section] = Settings, prefix: str = "--") -> list[str]:
    """The flag of every setting."""
    flags = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        nested = isinstance(kind, type) and issubclass(kind, Section)
        flags += all_flags(kind, f"{prefix}{name}.") if nested else [f"{prefix}{name}"]  # type: ignore[arg-type]
    return flags


def test_dashes_and_underscores_name_the_same_flag() -> None:
    dashes = read_flags(["--run-dir", "a", "--sample.n-images", "60", "--quality.max-undecodable=0.5"], "x")
    underscores = read_flags(["--run_dir", "a", "--sample.n_images", "60", "--quality.max_undecodable=0.5"], "x")
    assert dashes == underscores
    assert (dashes.run_dir, dashes.sample.n_images, dashes.quality.max_undecodable) == ("a", 60, 0.5)


def test_booleans_take_true_and_false() -> None:
    assert read_flags(["--packing.padding", "true"], "x").packing.padding is True
    assert read_flags(["--packing.padding", "false"], "x").packing.padding is False


def test_values_keep_their_underscores() -> None:
    assert read_flags(["--source=my_data_set", "--splitting.salt", "a_b-c"], "x").source == "my_data_set"
    assert read_flags(["--splitting.salt", "a_b-c"], "x").splitting.salt == "a_b-c"


def test_a_flag_changes_only_its_own_setting() -> None:
    settings = read_flags(["--training.epochs", "3"], "x")
    assert settings == Settings(training=Settings().training.model_copy(update={"epochs": 3}))


def test_lists_are_separated_by_commas() -> None:
    assert read_flags(["--evaluation.splits", "val"], "x").evaluation.splits == ("val",)
    assert read_flags(["--evaluation.splits", "val,test"], "x").evaluation.splits == ("val", "test")


class OwnFlags(BaseModel):
    """What this flow does."""

    place_of_it: str = Field(min_length=1, description="Its place.")
    also: str | None = Field(None, description="Something more.")
    strict: bool = Field(False, description="Whether it is strict.")


def test_a_flow_has_flags_of_its_own_beside_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--place_of-it", "a_b,c", "--seed", "3", "--also=[1]"]
    settings, own = read_own_flags(flags, "x", OwnFlags)
    assert settings == Settings(seed=3)
    assert own == {"place_of_it": "a_b,c", "also": "[1]", "strict": False}
    told: dict[str, object] = {}
    assert run_command(lambda **given: told.update(given), flags, "x", OwnFlags) == 0
    assert told == {"settings": settings, **own}
    with pytest.raises(SystemExit):
        read_own_flags(["--help"], "x", OwnFlags)
    shown = capsys.readouterr().out
    assert "What this flow does." in shown
    assert "--place-of-it str" in shown
    assert "--seed int" in shown


def test_a_boolean_flag_without_a_value_is_true() -> None:
    for flags, strict, padding in [
        (["--strict"], True, False),
        (["--strict", "--packing.padding"], True, True),
        (["--packing.padding", "--strict", "false"], False, True),
        (["--strict=true", "--packing.padding=false"], True, False),
    ]:
        settings, own = read_own_flags(["--place-of-it", "a", *flags], "x", OwnFlags)
        assert (own["strict"], settings.packing.padding) == (strict, padding), flags


def test_a_flag_that_is_needed_is_named_when_it_is_missing() -> None:
    with pytest.raises(SettingsError, match=r"^place_of_it: is missing; give --place-of-it, see --help$"):
        read_own_flags(["--strict"], "x", OwnFlags)


def test_the_environment_changes_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SOURCE", "SEED", "source", "RUN_DIR", "TRAINING__EPOCHS"):
        monkeypatch.setenv(name, "1")
    assert read_flags([], "x") == Settings()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--no-such-setting", "1"], "no-such-setting"),
        (["--training.no-such", "1"], "training.no-such"),
        (["--training.epochs", "0"], "training.epochs"),
        (["--training.epochs", "many"], "training.epochs"),
        (["--packing.padding", "perhaps"], "packing.padding"),
        (["--ingestion.sha256", "abc"], "ingestion.sha256"),
        (["--evaluation.splits", "train"], "evaluation.splits"),
        (["--evaluation.splits", ""], "evaluation.splits"),
        (["--source"], "source"),
        (["--seed", "-1"], "seed"),
        (["--run-dir", "gs://bucket/run"], "run_dir"),
        (["--storage.cache", "s3://bucket/cache"], "storage.cache"),
        (["stray"], "stray"),
    ],
)
def test_a_flag_that_does_not_fit_is_named_in_one_line(flags: list[str], named: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read_flags(flags, "x")
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_setting_is_a_flag_with_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        read_flags(["--help"], "python -m flows.pipeline")
    shown = capsys.readouterr().out
    assert stopped.value.code == 0
    for flag in all_flags():
        assert flag.replace("_", "-") in shown, flag

    def described(model: type[Section]) -> bool:
        return all(field.description for field in model.model_fields.values())

    assert all(described(model) for model in Section.__subclasses__())


def test_a_bad_flag_ends_the_command_with_one_line_and_code_2() -> None:
    command = [sys.executable, "-m", "flows.pipeline", "--training.epochs", "0"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: training.epochs:")
    assert done.stderr.count("\n") == 1


@pytest.mark.usefixtures("prefect_engine")
@pytest.mark.parametrize(
    ("source", "sentence"),
    [("no/such/place", "does not exist"), ("ftp://example.org/x.zip", "not a kind that is known")],
)
def test_a_source_that_cannot_be_read_ends_with_code_2_and_leaves_nothing(
    source: str, sentence: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from flows.pipeline import pipeline

    run = tmp_path / "run"
    code = run_command(pipeline, ["--source", source, "--run-dir", str(run)], "x")
    shown = capfd.readouterr().err
    assert code == 2
    assert f"error: source: {source}" in shown
    assert sentence in shown
    assert "Traceback" not in shown
    assert not run.exists()


def test_weights_without_a_backbone_are_refused_by_name() -> None:
    with pytest.raises(SettingsError, match=r"^training: weights are those of a backbone; name it .*; see --help$"):
        read_flags(["--training.weights", "imagenet"], "x")


def test_a_run_without_a_folder_gets_one_named_by_time_and_source() -> None:
    named = with_run_folder(Settings(source="/data/my archive.zip"))
    assert named.run_dir is not None
    assert named.run_dir.startswith("data/runs/2")
    assert named.run_dir.endswith("Z-my-archive")
    assert with_run_folder(Settings(run_dir="there")).run_dir == "there"


def test_the_keys_of_a_link_are_in_no_name_that_is_shown() -> None:
    for link in (
        "https://www.dropbox.com/scl/fi/SECRET1/set.zip?rlkey=SECRET2&dl=0",
        "https://x.org/s/SECRET1/set.zip",
    ):
        settings = Settings(source=link)
        assert "SECRET" not in settings.public_source + str(with_run_folder(settings).run_dir)
        assert settings.public_source.endswith("/set.zip")
    assert Settings(source="s3://bucket/prefix").public_source == "s3://bucket/prefix"


@pytest.mark.usefixtures("prefect_engine")
def test_a_cache_that_cannot_be_written_ends_in_one_sentence_with_code_2(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from flows.pipeline import pipeline

    (tmp_path / "file").write_text("mine")
    flags = ["--storage.raw", str(tmp_path / "file" / "raw"), "--run-dir", str(tmp_path / "run")]
    assert run_command(pipeline, flags, "x") == 2
    shown = capfd.readouterr().err
    assert shown.strip().splitlines()[-1].startswith(f"error: {tmp_path / 'file'}")
    assert "Traceback" not in shown


def test_a_result_that_the_terminal_cannot_show_is_shown_in_ascii(tmp_path: Path) -> None:
    code = "import sys; from flows.engine.command_line import run_command; "
    code += "sys.exit(run_command(lambda settings: 'lung-\u00fc', [], 'x'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PREFECT_HOME": str(tmp_path)},
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, b"lung-\\xfc"), done.stderr


def test_a_home_folder_is_expanded_in_every_setting_and_argument_that_is_a_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    places = (Place, Folder, RunFolder, Place | None, Folder | None, RunFolder | None)
    n_expanded = 0
    for flag in all_flags():
        section, _, name = flag.removeprefix("--").rpartition(".")
        model = Settings.model_fields[section].annotation if section else Settings
        kind = model.model_fields[name]  # type: ignore[union-attr]
        if not {"AfterValidator"} & {type(part).__name__ for part in kind.metadata} and kind.annotation not in places:
            continue
        n_expanded += 1
        more = ["--training.backbone", "MobileNetV3Small"] if name == "weights" else []
        found = read_flags([f"{flag}=~/a b", *more], "x")
        assert getattr(getattr(found, section) if section else found, name) == f"{tmp_path}/a b", flag
    assert n_expanded == 10
    for own in (ScoreFlags, ScreenFlags):
        names = [name for name, field in own.model_fields.items() if field.annotation is not bool]
        line = [f"--{name.replace('_', '-')}=~/x" for name in names]
        assert set(read_own_flags(line, "x", own)[1].values()) == {f"{tmp_path}/x", False}


def test_what_only_begins_like_a_home_folder_stays_as_it_is() -> None:
    for source in ("~nobody-of-this-name/x", "~$set.xlsx", "a/~/b", "s3://bucket/~"):
        assert Settings(source=source).source == source


@pytest.mark.parametrize("flow", ["prepare", "train", "explain"])
def test_a_part_of_the_pipeline_can_be_called_alone_and_says_what_it_needs(flow: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", f"flows.{flow}", "--training.epochs", "0"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: training.epochs:")


@pytest.mark.parametrize("source", ['/a b/$HOME/it\'s "x" #1 `id` $(id) $$.zip', "~/x", "sample"])
@pytest.mark.parametrize("by", ["argument", "variable"])
def test_make_passes_the_source_as_it_was_typed(source: str, by: str, tmp_path: Path) -> None:
    fake = tmp_path / ".venv" / "bin" / "python"
    fake.parent.mkdir(parents=True)
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    for name in ("Makefile", "requirements.txt", "constraints.txt"):
        (tmp_path / name).write_bytes((REPOSITORY / name).read_bytes())
    (tmp_path / ".venv" / ".run").touch()
    words = ["make", "run", "ARGS=--splitting.salt 'a$b c'", *([f"SOURCE={source}"] if by == "argument" else [])]
    kept = {
        name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "SOURCE")
    }
    environment = kept | ({"SOURCE": source} if by == "variable" else {})
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["-m", "flows.pipeline", "--source", source, "--splitting.salt", "a$b c"]
