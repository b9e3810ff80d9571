"""A full disk: one sentence with what was needed and what is free, nothing lost, and it goes on once there is room.

The disks are small file systems in memory (tmpfs), which only root may mount; a limit on the size of files is for all.
"""

import re
import resource
import shutil
import signal
import subprocess
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from broken_runs import (
    Place,
    copy_place,
    epochs_done,
    finish,
    finished_tasks,
    finished_work,
    started,
    wait_until,
)
from dropbox_server import TOKEN, DropboxServer
from fault_table import Attempt, FaultTable
from PIL import Image
from pipeline_runs import compare_runs
from s3_server import running_s3, set_aws

from flows.engine.command_line import run_command
from tasks.errors import DiskError
from tasks.files import free_bytes, sha256_of_file, write_whole
from tasks.preparing.packing import pack_shard
from tasks.settings import Settings
from tasks.sources.fetching import fetch_source

FAULT = "disk full"
SENTENCE = re.compile(
    r"^error: (\S+): the disk is full: (more than )?([\d,.]+ (?:MB|bytes)) are needed there and "
    r"([\d,.]+ (?:MB|bytes)) are free; make room there, or name another disk with storage\.cache, storage\.raw or "
    r"--run-dir, and give the same command again; what is finished is kept$"
)
SPARE = 100_000
"""Bytes left free: enough for the small files of a stage, too little for what the next one writes."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """An empty disk of 48 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted here ({done.stderr.strip()})")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def fill(disk: Path, leave: int) -> None:
    """Leaves so many bytes free, and not more than a page less."""
    with (disk / "ballast").open("ab") as stream:
        while (waiting := free_bytes(disk) - leave) > 0:
            stream.write(bytes(min(waiting, 1 << 20)))
            stream.flush()


def make_room(disk: Path) -> None:
    (disk / "ballast").unlink()


def write_pictures(folder: Path, n: int) -> dict[str, str]:
    """Noise, in files; sha256 -> name."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(n):
        Image.fromarray(rng.integers(0, 256, (120, 120), dtype=np.uint8)).save(folder / f"{i}.png")
    return {sha256_of_file(path): path.name for path in sorted(folder.iterdir())}


def write_source(folder: Path) -> None:
    for part in ("train/NORMAL", "train/PNEUMONIA", "test/NORMAL", "test/PNEUMONIA"):
        write_pictures(folder / part, 10)


def write_archive(path: Path, folder: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            archive.write(file, file.relative_to(folder).as_posix())


def test_a_full_disk_stops_unpacking_before_a_byte_is_written_and_later_it_goes_on(
    faults: FaultTable, disk: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_source(tmp_path / "set")
    write_archive(tmp_path / "set.zip", tmp_path / "set")
    needed = sum(path.stat().st_size for path in (tmp_path / "set").rglob("*.png"))
    flags = ["--source", str(tmp_path / "set.zip"), "--storage.raw", str(disk / "raw")]
    fill(disk, needed // 2)
    with faults.attempt(FAULT) as attempt:
        before = free_bytes(disk)
        assert run_command(fetch_source, flags, "test") == 2
        said = SENTENCE.match(capfd.readouterr().err.strip().splitlines()[-1])
        assert said is not None
        assert (said[3], said[4]) == (f"{needed / 1e6:,.1f} MB", f"{before / 1e6:,.1f} MB")
        attempt.whole(not [p for p in (disk / "raw").rglob("*") if p.is_file()], "something was left half unpacked")
        make_room(disk)
        fetched = fetch_source(Settings(source=str(tmp_path / "set.zip"), storage={"raw": str(disk / "raw")}))
        attempt.kept(len(list(Path(fetched.folder).rglob("*.png"))) == 40, "files are missing")


def starve_fetch(
    attempt: Attempt, disk: Path, flags: list[str], free: int, capfd: pytest.CaptureFixture[str]
) -> "re.Match[str]":
    """Fetches 40 pictures to a disk with so much room, which ends with the sentence, and then to one with enough."""
    flags = [*flags, "--storage.raw", str(disk / "raw"), "--ingestion.tries", "2", "--ingestion.backoff-s", "0.01"]
    fill(disk, free)
    assert run_command(fetch_source, flags, "test") == 2
    told = capfd.readouterr().err.strip().splitlines()[-1]
    said = SENTENCE.match(told)
    assert said is not None and Path(said[1]).is_relative_to(disk / "raw"), told
    make_room(disk)
    assert run_command(fetch_source, flags, "test") == 0
    attempt.kept(len(list((disk / "raw").rglob("*.png"))) == 40, "files are missing")
    return said


def test_a_full_disk_is_named_with_what_a_link_needs(
    faults: FaultTable, disk: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], dropbox: DropboxServer
) -> None:
    write_source(tmp_path / "set")
    write_archive(tmp_path / "set.zip", tmp_path / "set")
    content = (tmp_path / "set.zip").read_bytes()
    with faults.attempt(FAULT) as attempt:
        flags = ["--source", dropbox.put("set.zip", content), "--ingestion.ca-file", str(dropbox.ca_file)]
        flags += ["--ingestion.allowed-hosts", ",".join(dropbox.hosts)]
        said = starve_fetch(attempt, disk, flags, 300_000, capfd)
    assert (said[2], said[3], said[4]) == (None, f"{len(content) / 1e6:,.1f} MB", "0.3 MB")


def test_a_full_disk_is_named_with_what_a_dropbox_folder_needs(
    faults: FaultTable,
    disk: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    dropbox: DropboxServer,
) -> None:
    write_source(tmp_path / "set")
    monkeypatch.setenv("DROPBOX_TOKEN", TOKEN)
    with faults.attempt(FAULT) as attempt:
        for name, host in dropbox.sdk_environment.items():
            # The package reads its variables only once, and another test may have imported it.
            monkeypatch.setattr(f"dropbox.dropbox_client.{name.removeprefix('DROPBOX_')}", host)
        for path in (tmp_path / "set").rglob("*.png"):
            dropbox.private[f"/Scans/{path.relative_to(tmp_path / 'set').as_posix()}"] = path.read_bytes()
        flags = ["--source", "dropbox:/Scans", "--ingestion.ca-file", str(dropbox.ca_file)]
        said = starve_fetch(attempt, disk, flags, 300_000, capfd)
    needed = sum(len(content) for content in dropbox.private.values())
    assert (said[2], said[3], said[4]) == (None, f"{needed / 1e6:,.1f} MB", "0.3 MB")


def test_a_full_disk_is_named_with_what_a_folder_or_an_archive_of_a_bucket_needs(
    faults: FaultTable,
    disk: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_source(tmp_path / "set")
    files = {path.relative_to(tmp_path / "set").as_posix(): path for path in (tmp_path / "set").rglob("*.png")}
    (tmp_path / "set" / "notes.bin").write_bytes(bytes(17_000_000))
    write_archive(tmp_path / "set.zip", tmp_path / "set")
    archive = (tmp_path / "set.zip").read_bytes()
    objects = {f"set/{name}": path.read_bytes() for name, path in files.items()} | {"set.zip": archive}
    with running_s3({"x-rays": objects}) as url:
        for name, value in set_aws(url).items():
            monkeypatch.setenv(name, value)
        with faults.attempt(FAULT) as attempt:
            said = starve_fetch(attempt, disk, ["--source", "s3://x-rays/set"], 300_000, capfd)
            n_bytes = sum(path.stat().st_size for path in files.values())
            assert (said[2], said[3], said[4]) == (None, f"{n_bytes / 1e6:,.1f} MB", "0.3 MB")
        shutil.rmtree(disk / "raw")
        with faults.attempt(FAULT) as attempt:
            said = starve_fetch(attempt, disk, ["--source", "s3://x-rays/set.zip"], 9_000_000, capfd)
            assert (said[2], said[3], said[4]) == (None, f"{len(archive) / 1e6:,.1f} MB", "9.0 MB")


def test_a_full_disk_leaves_no_part_of_a_shard_and_keeps_those_that_are_packed(
    faults: FaultTable, disk: Path, tmp_path: Path
) -> None:
    pictures = list(write_pictures(tmp_path / "set", 60).items())
    first, second = dict(pictures[:30]), dict(pictures[30:])
    shelf = disk / "shelf"
    pack_shard(tmp_path / "set", first, shelf, padding=False, max_side_px=1_000)
    before = {path: path.read_bytes() for path in shelf.iterdir()}
    for spare in (
        30 * 224 * 224 // 2,
        30 * 224 * 224 + 4_096,
    ):  # the second has room for the pixels, not for their file
        fill(disk, spare)
        with faults.attempt(FAULT) as attempt:
            if spare > 30 * 224 * 224:
                (disk / "more").write_bytes(bytes(free_bytes(disk) - 30 * 224 * 224 + 4_096))
            with pytest.raises(DiskError, match=r"1\.5 MB are needed there and .* are free"):
                pack_shard(tmp_path / "set", second, shelf, padding=False, max_side_px=1_000)
            attempt.whole({path: path.read_bytes() for path in shelf.iterdir()} == before, "the shelf is another")
            make_room(disk)
            (disk / "more").unlink(missing_ok=True)
    pack_shard(tmp_path / "set", second, shelf, padding=False, max_side_px=1_000)
    assert len(list(shelf.glob("*.npy"))) == 2


def test_a_disk_that_fills_up_while_a_file_is_written_keeps_the_earlier_file(faults: FaultTable, disk: Path) -> None:
    from tasks.files import open_whole

    page = disk / "report" / "index.html"
    write_whole(page, "<html>earlier</html>")
    fill(disk, 1_000_000)
    with faults.attempt(FAULT) as attempt:
        with pytest.raises(DiskError, match=r"2\.0 MB are needed there and 1\.0 MB are free"):
            write_whole(page, bytes(2_000_000))
        with pytest.raises(DiskError, match=r"more than 1\.0 MB are needed there"), open_whole(page) as stream:
            for _ in range(20):
                stream.write(bytes(100_000))
        attempt.whole(page.read_text() == "<html>earlier</html>", "the earlier page was touched")
        attempt.whole(len(list(page.parent.iterdir())) == 1, "a part of a file was left")
        make_room(disk)
        write_whole(page, bytes(2_000_000))


def test_a_checkpoint_that_finds_no_room_keeps_the_one_before(faults: FaultTable, disk: Path) -> None:
    from tasks.networks.checkpoints import save_checkpoint
    from tasks.settings import TrainingSettings
    from tasks.training.members import compile_trainer

    trainer = compile_trainer(TrainingSettings(side_px=32, width=16), 8)
    save_checkpoint(trainer, {"history": [{"epoch": 1}]}, disk)
    before = {path: path.read_bytes() for path in disk.iterdir()}
    size = (disk / "checkpoint-1.keras").stat().st_size
    for spare in (size // 2, size - 20_000):  # refused before, and found while Keras writes
        fill(disk, spare)
        with faults.attempt(FAULT) as attempt:
            with pytest.raises(DiskError, match=r"are needed there and .* are free"):
                save_checkpoint(trainer, {"history": [{"epoch": 1}, {"epoch": 2}]}, disk)
            make_room(disk)
            attempt.whole({path: path.read_bytes() for path in disk.iterdir()} == before, "the checkpoint is another")
    save_checkpoint(trainer, {"history": [{"epoch": 1}, {"epoch": 2}]}, disk)
    assert (disk / "checkpoint-2.keras").exists() and not (disk / "checkpoint-1.keras").exists()


def test_a_limit_on_the_size_of_files_is_named_like_a_full_disk(faults: FaultTable, tmp_path: Path) -> None:
    @contextmanager
    def limited(n_bytes: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    pictures = write_pictures(tmp_path / "set", 30)
    with faults.attempt("limit on the size of files") as attempt:
        shelf = tmp_path / "shelf"
        with (
            limited(1_000_000),
            pytest.raises(DiskError, match=r"1\.5 MB are needed there, .* 1\.0 MB at most.*ulimit"),
        ):
            pack_shard(tmp_path / "set", pictures, shelf, padding=False, max_side_px=1_000)
        attempt.whole(not list(shelf.iterdir()), "a part of a shard was left")
        pack_shard(tmp_path / "set", pictures, shelf, padding=False, max_side_px=1_000)


# -- the whole pipeline ------------------------------------------------------------------------------------------------


def starve(attempt: Attempt, place: Place, disk: Path, flags: list[str], api: str, after: str) -> str:
    """Fills the disk while a run works, right after a task; it ends with the sentence, and what was finished stays."""
    with started(place, flags, api) as process:
        log = place.last_log
        assert wait_until(process, lambda: not after or after in finished_tasks(log.read_text())), log.read_text()
        process.send_signal(signal.SIGSTOP)
        before = finished_work(place)
        fill(disk, SPARE)
        process.send_signal(signal.SIGCONT)
        process.wait(600)
    said = log.read_text()
    assert process.returncode == 2, said[-2000:]
    assert "Traceback" not in said, said[-3000:]
    found = SENTENCE.match(said.strip().splitlines()[-1])
    assert found is not None, said[-1000:]
    attempt.kept(before.items() <= finished_work(place).items(), "finished work was lost")
    attempt.kept(not (place.run / "run.json").exists(), "it takes the run for finished")
    make_room(disk)
    return found[1]


@pytest.mark.long
def test_a_run_whose_disk_fills_up_in_four_stages_names_each_time_what_it_needs_and_ends_like_an_unbroken_one(
    faults: FaultTable, prefect_engine: None, finished_run: Path, workspace: Path, disk: Path, tmp_path: Path
) -> None:
    from prefect.settings import PREFECT_API_URL

    api = str(PREFECT_API_URL.value())
    copy_place(workspace, tmp_path / "drawn")
    (sample,) = (tmp_path / "drawn" / "raw").glob("sample-*/archive")
    write_archive(tmp_path / "sample.zip", sample)
    shutil.copytree(finished_run, disk / "earlier")
    earlier = {path: sha256_of_file(path) for path in (disk / "earlier").rglob("*") if path.is_file()}
    place = Place(disk, tmp_path / "logs")
    flags = [*place.flags("--source", str(tmp_path / "sample.zip"))]
    for after, where in (("", "raw"), ("split", "cache"), ("check-prepared", "cache"), ("audit", "run")):
        with faults.attempt(FAULT) as attempt:
            named = starve(attempt, place, disk, flags, api, after)
            assert Path(named).is_relative_to(disk / where), f"{named} after {after}"
            attempt.kept({path: sha256_of_file(path) for path in earlier} == earlier, "an earlier run was touched")
            if after == "audit":
                exit_code, said = finish(place, flags, api)
                attempt.kept(exit_code == 0, said[-2000:])
                assert max(epochs_done(place.log).values()) == 1
                compare_runs(attempt, place.run, finished_run)
