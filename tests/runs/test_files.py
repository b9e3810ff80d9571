"""Files are whole or not there; a stage is done once for what it depends on."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from infra.clean_runs import name_used
from tasks.errors import DiskError, RunError, SourceError
from tasks.files import (
    REPOSITORY,
    digest,
    locked,
    make_once,
    open_source,
    read_json,
    sha256_of_file,
    write_json,
    write_whole,
)
from tasks.publishing.sealing import _lead_to
from tasks.records import Facts
from tasks.runs import keys, stages
from tasks.runs.keys import code_version, imported_modules, names_imported
from tasks.runs.manifest import MANIFEST_DTYPES, read_manifest, write_manifest
from tasks.runs.run import Run
from tasks.runs.stages import read_stage
from tasks.settings import Settings


def names_in(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_file_is_written_with_its_folders_and_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.txt"
    write_whole(path, "first")
    write_whole(path, b"second")
    assert path.read_text() == "second"
    assert names_in(tmp_path) == ["a/b.txt"]


def test_a_write_that_fails_keeps_the_earlier_file_and_leaves_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    write_whole(path, "first")

    def disk_full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", disk_full)
    with pytest.raises(DiskError, match=r"the disk is full: 6 bytes are needed there and .* are free"):
        write_whole(path, "second")
    assert path.read_text() == "first"
    assert names_in(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [float("nan")]}])
def test_json_with_a_number_that_is_none_is_refused_and_not_written(value: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", value)
    assert list(tmp_path.iterdir()) == []


def test_json_comes_back_and_what_is_no_json_is_named(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": [1, None, "ä"]})
    assert read_json(tmp_path / "a.json") == {"b": [1, None, "ä"]}
    (tmp_path / "a.json").write_text('{"b": ')
    with pytest.raises(RunError, match=r"a\.json is not JSON"):
        read_json(tmp_path / "a.json")
    with pytest.raises(RunError, match=r"none\.json is missing"):
        read_json(tmp_path / "none.json")


def test_a_file_that_cannot_be_read_is_named_with_the_reason(tmp_path: Path) -> None:
    said = r"gone cannot be read \(No such file or directory\)"
    with pytest.raises(SourceError, match=said), open_source(tmp_path / "gone"):
        pass


def write_name(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / name).write_text("1")

    return make


def fail(error: type[BaseException]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / "half").write_text("1")
        raise error

    return make


def test_a_folder_is_made_once(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b"
    assert make_once(target, write_name("x")) is False
    assert make_once(target, write_name("y")) is True
    assert names_in(tmp_path) == ["a/b/x"]


def test_a_folder_that_no_longer_holds_is_made_again(tmp_path: Path) -> None:
    make_once(tmp_path / "a", write_name("x"))
    assert make_once(tmp_path / "a", write_name("y"), is_valid=lambda folder: (folder / "y").exists()) is False
    assert names_in(tmp_path) == ["a/y"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_folder_whose_making_failed_leaves_nothing(error: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(error):
        make_once(tmp_path / "a", fail(error))
    assert names_in(tmp_path) == []


def test_what_a_killed_process_left_is_not_taken_over(tmp_path: Path) -> None:
    (tmp_path / "a.partial").mkdir()
    (tmp_path / "a.partial" / "old").write_text("1")
    make_once(tmp_path / "a", write_name("x"))
    assert names_in(tmp_path) == ["a/x"]


def test_a_resumable_folder_keeps_what_an_interrupted_attempt_left(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        make_once(tmp_path / "a", fail(KeyboardInterrupt), resumable=True)
    assert not (tmp_path / "a").exists()
    make_once(tmp_path / "a", write_name("rest"), resumable=True)
    assert names_in(tmp_path) == ["a/half", "a/rest"]


def test_two_processes_never_make_the_same_folder_at_once(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from tasks.files import make_once\n"
        "place, me = Path(sys.argv[1]), sys.argv[2]\n"
        "def make(folder):\n"
        "    while len(list(place.parent.glob('*.ready'))) < 2: time.sleep(0.02)\n"
        "    (folder / me).write_text('1')\n"
        "place.with_name(me + '.ready').touch()\n"
        "print(make_once(place, make))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a")]
    started = [subprocess.Popen([*command, name], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) for name in "xy"]
    said = sorted(process.communicate(timeout=60)[0].strip().splitlines()[-1] for process in started)
    assert said == ["False", "True"], "one makes it, the other finds it"
    assert len(names_in(tmp_path / "a")) == 1


def test_of_many_threads_that_want_a_lock_each_gets_it_alone(tmp_path: Path) -> None:
    inside: list[int] = []

    def count(_: int) -> int:
        with locked(tmp_path / "lock"):
            inside.append(1)
            n_inside = len(inside)
            inside.pop()
        return n_inside

    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(count, range(500))) == {1}
    assert not (tmp_path / "lock").exists()


def test_the_checksum_of_a_file_is_its_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_of_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_digest_depends_on_values_and_not_on_the_order_of_keys() -> None:
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    assert len({digest({"a": v}) for v in (1, "1", 1.5, None, True, [1])}) == 6


# -- the run folder and its manifest -----------------------------------------------------------------------------------


def test_a_run_folder_has_to_be_named_and_may_not_be_a_file(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run folder is named"):
        _ = Run(Settings()).folder
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="is a file"):
        _ = Run(Settings(run_dir=str(tmp_path / "file"))).folder
    assert Run(Settings(run_dir=str(tmp_path / "new"))).folder == tmp_path / "new"


def test_a_manifest_comes_back_sorted_in_its_types_with_unknown_as_missing(tmp_path: Path) -> None:
    rows = pd.DataFrame({"path": ["b", "a"], "label": [1, 0], "has_device": [True, None], "extra": [1, 2]})
    write_manifest(tmp_path, rows)
    manifest = read_manifest(tmp_path)
    assert list(manifest.columns) == list(MANIFEST_DTYPES)
    assert {name: str(dtype) for name, dtype in manifest.dtypes.items()} == MANIFEST_DTYPES
    assert manifest["path"].tolist() == ["a", "b"]
    assert manifest["has_device"].tolist() == [pd.NA, True]
    assert manifest["device_score"].isna().all()
    assert names_in(tmp_path) == ["manifest.parquet"]


def test_the_same_manifest_has_the_same_bytes(tmp_path: Path) -> None:
    rows = pd.DataFrame({"path": ["b", "a"], "label": [1, 0]})
    write_manifest(tmp_path, rows)
    first = sha256_of_file(tmp_path / "manifest.parquet")
    write_manifest(tmp_path, read_manifest(tmp_path))
    assert sha256_of_file(tmp_path / "manifest.parquet") == first


def test_a_run_folder_without_a_manifest_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="run the prepare flow"):
        read_manifest(tmp_path)


# -- stages ------------------------------------------------------------------------------------------------------------


class Work:
    """A stage that counts how often it is done."""

    def __init__(self, tmp_path: Path) -> None:
        self.tmp_path = tmp_path
        self.n_done = 0
        self.files = {"a.txt": "1", "deep/b.txt": "2"}

    def make(self, out: Path) -> Facts:
        self.n_done += 1
        for name, content in self.files.items():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_text(content)
        return {"n": self.n_done}

    def settings(self, run: str = "run") -> Settings:
        return Settings.model_validate(
            {"run_dir": str(self.tmp_path / run), "storage": {"cache": str(self.tmp_path / "cache")}}
        )

    def do(
        self,
        run: str = "run",
        *,
        inputs: dict[str, object] | None = None,
        module: str = "tasks.sources.layout",
        packages: tuple[str, ...] = (),
        make: Callable[[Path], Facts] | None = None,
    ) -> Facts:
        def make_here(out: Path) -> Facts:
            return (make or self.make)(out)

        make_here.__module__ = module
        given = inputs or {"x": 1}
        return Run(self.settings(run)).stage("work", given=given, make=make_here, packages=packages)


@pytest.fixture
def work(tmp_path: Path) -> Work:
    return Work(tmp_path)


def test_a_stage_places_its_files_and_its_record_in_the_run_folder(work: Work, tmp_path: Path) -> None:
    facts = work.do()
    assert (facts["n"], facts["reused"]) == (1, False)
    assert names_in(tmp_path / "run") == ["a.txt", "deep/b.txt", "stages/work.json"]
    record = read_stage(tmp_path / "run", "work")
    assert (record.facts, record.files) == ({"n": 1}, ["a.txt", "deep/b.txt"])
    assert (tmp_path / "cache" / record.entry).is_dir()


def test_a_stage_is_not_done_again_in_the_same_run_folder_or_a_new_one(work: Work, tmp_path: Path) -> None:
    first = work.do()
    for run in ("run", "other"):
        again = work.do(run)
        assert (again["reused"], again["n"], again["seconds"]) == (True, 1, first["seconds"])
    assert work.n_done == 1
    assert (tmp_path / "other" / "deep" / "b.txt").read_text() == "2"
    assert read_stage(tmp_path / "other", "work").reused is True


def test_a_stage_is_done_again_when_an_input_changes_and_not_again_when_it_changes_back(work: Work) -> None:
    assert [work.do(inputs={"x": x})["reused"] for x in (1, 2, 1)] == [False, False, True]


def test_a_stage_is_done_again_when_other_code_or_packages_do_it(work: Work) -> None:
    work.do()
    assert work.do(module="tasks.tables")["reused"] is False
    assert work.do(packages=("pandas",))["reused"] is False
    assert work.n_done == 3


WORDS = {
    "a comment": ("tasks.training.members", "import ", "# why\nimport "),
    "a docstring": ("tasks.networks.augmentation", '"""Augmentation: ', '"""Augmenting: '),
    "an error's sentence": ("tasks.networks.backbones", "is not a Keras Applications network", "is not known to Keras"),
    "a line of the log": ("tasks.training.members", "is trained again:", "trains again:"),
    "how artifacts are shown": ("tasks.runs.artifacts", "def show_table(", "def show_rows(): ...\ndef show_table("),
    "a retry": ("tasks.runs.retries", "LONGEST_PAUSE_S = 60.0", "LONGEST_PAUSE_S = 90.0"),
}
MEANING = {
    "the augmentation": ("tasks.networks.augmentation", "gamma: float = 0.5", "gamma: float = 0.6"),
    "how packed greys become floats": ("tasks.pixels.greys", "255.0", "256.0"),
    "an import of our own code": ("tasks.training.members", "import ", "from tasks.networks import twin\nimport "),
}


@pytest.mark.parametrize("change", [*WORDS, *MEANING])
def test_training_is_done_again_when_code_changes_that_shapes_it_and_not_when_words_do(
    work: Work, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    work.do(module="tasks.training.fitting")
    module, before, after = (WORDS | MEANING)[change]
    honest = keys.source_of
    assert before in honest(module), "there is nothing to change"
    changed = honest(module).replace(before, after, 1)
    monkeypatch.setattr(keys, "source_of", lambda name: changed if name == module else honest(name))
    assert work.do(module="tasks.training.fitting")["reused"] is (change in WORDS)


def test_a_file_that_was_changed_in_the_run_folder_is_put_back(work: Work, tmp_path: Path) -> None:
    work.do()
    (tmp_path / "run" / "a.txt").write_text("changed by hand")
    work.do()
    assert (tmp_path / "run" / "a.txt").read_text() == "1"


def test_files_of_an_earlier_try_leave_the_run_folder_and_those_of_others_stay(work: Work, tmp_path: Path) -> None:
    work.do()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    work.files = {"a.txt": "3"}
    work.do(inputs={"x": 2})
    assert names_in(tmp_path / "run") == ["a.txt", "notes.txt", "stages/work.json"]


def test_a_stage_that_fails_leaves_no_entry_and_the_run_folder_as_it_was(work: Work, tmp_path: Path) -> None:
    work.do()

    def fail(out: Path) -> Facts:
        (out / "a.txt").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work.do(inputs={"x": 2}, make=fail)
    assert len(list((tmp_path / "cache" / "work").iterdir())) == 1
    assert (tmp_path / "run" / "a.txt").read_text() == "1"
    assert work.do(inputs={"x": 2})["reused"] is False


def test_facts_that_are_no_json_leave_no_entry(work: Work, tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        work.do(make=lambda out: {"n": np.zeros(3)})
    assert list((tmp_path / "cache" / "work").iterdir()) == []
    assert not (tmp_path / "run").exists()


def test_an_entry_that_lost_its_record_is_made_again(work: Work, tmp_path: Path) -> None:
    work.do()
    (record,) = (tmp_path / "cache").rglob("stage.json")
    record.unlink()
    assert work.do()["reused"] is False
    assert work.do()["reused"] is True


def test_any_stage_that_changes_a_run_folder_breaks_its_seal(work: Work, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    work.do()
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_resumable_stage_goes_on_from_what_was_left(work: Work) -> None:
    seen: list[list[str]] = []

    def make(out: Path) -> Facts:
        seen.append(names_in(out))
        (out / f"epoch_{len(seen)}").write_text("x")
        if len(seen) < 3:
            raise KeyboardInterrupt
        return {}

    def do() -> Facts:
        return Run(work.settings()).stage("fit", given={}, make=make, resumable=True)

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            do()
    do()
    assert seen == [[], ["epoch_1"], ["epoch_1", "epoch_2"]]


def cut_off_after(n_files: int, patch: pytest.MonkeyPatch) -> None:
    """The process is killed when it has placed so many files of a stage."""
    place, turns = stages._place, count()

    def place_or_die(source: Path, target: Path) -> None:
        if next(turns) == n_files:
            raise KeyboardInterrupt
        place(source, target)

    patch.setattr(stages, "_place", place_or_die)


@pytest.mark.parametrize("n_files", [0, 1, 2])
def test_files_placed_by_a_process_that_was_cut_off_leave_the_run_folder_with_the_next_try(
    n_files: int, work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work.do()
    work.files = {"deep/c.txt": "3", "deep/d.txt": "4", "e.txt": "5"}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        cut_off_after(n_files, patch)
        work.do(inputs={"x": 2})
    work.files = {"a.txt": "6"}
    work.do(inputs={"x": 3})
    assert names_in(tmp_path / "run") == ["a.txt", "stages/work.json"]
    assert read_stage(tmp_path / "run", "work").files == ["a.txt"]


def test_a_stage_cut_off_while_its_files_were_placed_leaves_none_of_an_earlier_try(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work.files = {"a.txt": "1", "same.txt": "2"}
    work.do()
    work.files = {"a.txt": "3", "same.txt": "2"}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        cut_off_after(0, patch)
        work.do(inputs={"x": 2})
    assert names_in(tmp_path / "run") == ["same.txt", "stages/work.json"]
    (entry,) = name_used(tmp_path / "run")
    assert (tmp_path / "cache" / entry / "a.txt").read_text() == "3", "cleaning leaves it what it goes on with"
    assert work.do(inputs={"x": 2})["reused"] is True
    assert (tmp_path / "run" / "a.txt").read_text() == "3"


def test_the_key_and_parts_of_an_entry_can_be_read_by_a_person(work: Work, tmp_path: Path) -> None:
    work.do(packages=("pandas",))
    (path,) = (tmp_path / "cache").rglob("stage.json")
    parts = json.loads(path.read_text())["parts"]
    assert (parts["given"], list(parts["packages"])) == ({"x": 1}, ["pandas"])
    assert path.parent.name == digest(parts)[:24]


def test_threads_that_ask_at_once_are_told_the_same() -> None:
    modules = [
        "tasks.explaining.explanations",
        "tasks.explaining.auditing",
        "tasks.preparing.ingestion",
        "tasks.training.fitting",
    ] * 8

    def ask(module: str) -> set[str]:
        names_imported.cache_clear()
        return imported_modules(module)

    with ThreadPoolExecutor(8) as pool:
        said = list(pool.map(ask, modules))
    assert said == [imported_modules(module) for module in modules]


def test_the_code_of_two_stages_differs() -> None:
    assert code_version("tasks.preparing.ingestion") != code_version("tasks.preparing.screening")


def test_a_finished_run_does_not_fail_where_latest_cannot_lead_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").write_text("a file in the way")
    _lead_to(tmp_path / "run")
    assert "data/runs/latest does not lead to this run: Not a directory" in capsys.readouterr().out
