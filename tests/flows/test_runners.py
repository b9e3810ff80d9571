"""Shards of images give the same files wherever they are worked on: threads, processes, a Dask cluster, a bucket."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from s3_server import running_s3, set_aws

from flows.engine.command_line import read_flags
from flows.engine.runners import deal_out, do_shards, open_runner
from tasks.errors import RunError, SettingsError
from tasks.files import REPOSITORY, sha256_of_file
from tasks.runs.bucket import send
from tasks.runs.run import Run
from tasks.settings import Settings

pytestmark = pytest.mark.usefixtures("prefect_engine")
TRAINED = ("predictions.csv", "metrics.json", "model.keras", "model.sha256")


def work_in_shards(settings: Settings, trained: Path) -> Path:
    """Prepares a run and explains it with a network that is trained already; the run folder."""
    from prefect import flow

    from flows.engine.runners import open_runner
    from flows.explain import explain_images
    from flows.prepare import prepare

    @flow
    def explain_only(settings: Settings) -> None:
        with open_runner(settings.scaling) as runner:
            explain_images(runner, Run(settings))

    prepare(settings)
    run = Run(settings).folder
    for name in TRAINED:
        (run / name).write_bytes((trained / name).read_bytes())
    send(Run(settings), TRAINED)
    explain_only(settings)
    return run


def read_shards(cache: Path) -> dict[str, str]:
    """Name and checksum of the shards in a cache."""
    return {p.relative_to(cache).as_posix(): sha256_of_file(p) for p in sorted(cache.rglob("*.np[yz]"))}


@pytest.fixture(scope="module")
def by_threads(
    finished_run: Path, small_flags: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """Run folder and cache of the small sample, done by threads."""
    folder = tmp_path_factory.mktemp("threads")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tasks.preparing.packing.SHARD_IMAGES", 20)
        run = work_in_shards(own_settings(small_flags, folder, "threads"), finished_run)
    return run, folder / "cache"


def own_settings(small_flags: list[str], folder: Path, runner: str) -> Settings:
    """Settings of the small run with a cache of its own."""
    own = ["--storage.cache", str(folder / "cache"), "--run-dir", str(folder / "run"), "--explanation.n-images", "6"]
    return read_flags([*small_flags, *own, "--scaling.runner", runner, "--scaling.n-workers", "2"], "test")


@pytest.mark.slow
def test_processes_of_dask_give_the_manifest_shards_and_explanations_that_threads_give(
    by_threads: tuple[Path, Path],
    finished_run: Path,
    small_flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tasks.preparing.packing.SHARD_IMAGES", 20)
    run = work_in_shards(own_settings(small_flags, tmp_path, "dask"), finished_run)
    compare((run, tmp_path / "cache"), by_threads)


def compare(found: tuple[Path, Path], expected: tuple[Path, Path]) -> None:
    """Both a run folder and the cache that it was made with."""
    (run, cache), (expected_run, expected_cache) = found, expected
    assert len(read_shards(expected_cache)) == 9, "three shards of pixels, three of each kind of mask"
    assert read_shards(cache) == read_shards(expected_cache)
    for name in ("manifest.parquet", "excluded.csv", "arrays/index.json", "masks/index.json", "lungs/bounds.json"):
        assert sha256_of_file(run / name) == sha256_of_file(expected_run / name), name
    explained = sorted(path.name for path in (expected_run / "explanations").iterdir())
    assert len(explained) == 12
    assert sorted(path.name for path in (run / "explanations").iterdir()) == explained
    for name in explained:
        assert sha256_of_file(run / "explanations" / name) == sha256_of_file(expected_run / "explanations" / name), name


@contextmanager
def worker_elsewhere(address: str, folder: Path, environment: dict[str, str]) -> Iterator[None]:
    """A Dask worker that knows the scheduler's address and the code, and works in a folder of its own."""
    command = [sys.executable, "-m", "distributed.cli.dask_worker", address, "--nthreads", "1", "--no-nanny"]
    folder.mkdir()
    with (folder / "log").open("w") as log:
        worker = subprocess.Popen(
            [*command, "--no-dashboard"],
            cwd=folder,
            env={**environment, "PYTHONPATH": str(REPOSITORY)},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            yield
        finally:
            worker.terminate()
            worker.wait(timeout=60)


@pytest.mark.slow
def test_workers_on_another_machine_get_their_input_and_hand_on_their_output_through_the_bucket(
    by_threads: tuple[Path, Path],
    finished_run: Path,
    small_flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from distributed import LocalCluster

    monkeypatch.setattr("tasks.preparing.packing.SHARD_IMAGES", 20)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    own = ["--storage.cache", "cache", "--storage.raw", "raw", "--run-dir", "s3://runs/weekly/one"]
    with (
        running_s3({"runs": {}}) as url,
        LocalCluster(n_workers=0, dashboard_address="127.0.0.1:0") as cluster,
        worker_elsewhere(cluster.scheduler_address, tmp_path / "elsewhere", set_aws(url)),
    ):
        for name, value in set_aws(url).items():
            if name.startswith("AWS_"):
                monkeypatch.setenv(name, value)
        flags = [*small_flags, *own, "--explanation.n-images", "6", "--scaling.runner", cluster.scheduler_address]
        settings = read_flags(flags, "test")
        run = work_in_shards(settings, finished_run)
    compare((run, Path("cache")), by_threads)
    log = (tmp_path / "elsewhere" / "log").read_text()
    assert "drawing 60 chest X-rays" in log, "the source, which the worker could not see, was fetched there"
    assert "explained images 1 to 4 of 6" in log
    assert read_shards(tmp_path / "elsewhere" / "cache") == read_shards(Path("cache"))


# -- runners that cannot be had ----------------------------------------------------------------------------------------


def open_one(runner: str) -> None:
    with open_runner(read_flags(["--scaling.runner", runner], "test").scaling):
        pass


def test_a_scheduler_that_does_not_answer_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.engine.runners.CONNECT_S", 0.5)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(
            SettingsError, match=rf"^scaling\.runner: no Dask scheduler answers at {address}; start one"
        ):
            open_one(address)


def test_a_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prefect_dask", None)
    with pytest.raises(SettingsError, match=r"^scaling\.runner: dask needs prefect-dask .*; install requirements\.txt"):
        open_one("dask")


@pytest.mark.parametrize("runner", ["dusk", "tcp://nobody", "tcp://host:1/path", "http://host:1"])
def test_a_runner_of_another_kind_is_refused(runner: str) -> None:
    with pytest.raises(SettingsError, match=r"scaling\.runner"):
        read_flags(["--scaling.runner", runner], "test")


@pytest.mark.parametrize(("n", "most", "sizes"), [(1, 60, [1]), (59, 60, [1] * 59), (5, 2, [2, 3]), (7, 3, [2, 3, 2])])
def test_shards_are_dealt_out_in_order_over_at_most_so_many_task_runs(n: int, most: int, sizes: list[int]) -> None:
    groups = deal_out(list(range(n)), most)
    assert [len(group) for group in groups] == sizes
    assert [shard for group in groups for shard in group] == list(range(n))


def fail_on(settings: Settings, shards: list[int]) -> None:
    if 3 in shards:
        raise RunError("shard 3 is broken: mend it")


@pytest.mark.parametrize("runner", ["threads", pytest.param("dask", marks=pytest.mark.slow)])
def test_a_shard_that_fails_elsewhere_raises_its_own_sentence_here(runner: str) -> None:
    from prefect import flow, task

    @flow
    def do_some(settings: Settings) -> None:
        with open_runner(settings.scaling) as opened:
            do_shards(opened, "tried", task(fail_on), [1, 2, 3, 4], settings=settings)

    with pytest.raises(RunError, match=r"^shard 3 is broken: mend it$"):
        do_some(read_flags(["--scaling.runner", runner, "--scaling.n-workers", "2"], "test"))
