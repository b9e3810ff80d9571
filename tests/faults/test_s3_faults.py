"""A run folder on S3 through a network that fails a tenth of the requests, with credentials that expire midway."""

import json
from pathlib import Path

import pytest
from fault_table import FaultTable
from pipeline_runs import BUCKET, Objects, Store, epochs_in, flags, plain_environment, run_pipeline
from s3_server import faulty_proxy, set_aws

FAULTS = ("500", "503", "reset", "stall", "lost")


@pytest.mark.long
def test_a_run_through_a_tenth_of_faults_ends_like_an_undisturbed_one_and_leaves_nothing_under_another_name(
    faults: FaultTable, store: Store, tmp_path: Path
) -> None:
    with (
        faulty_proxy(store.url, share=0.1, faults=FAULTS, stall_s=8.0) as proxy,
        faults.attempt(
            "S3: 500, 503, silence, reset, lost answers, expired keys at a tenth of the requests"
        ) as attempt,
    ):

        def expire(request: str) -> None:
            if request.startswith(f"PUT /{BUCKET}/faulty/cache/calibrate/"):
                proxy.expired = {"first"}

        proxy.before = expire
        arguments = [*flags(tmp_path, f"s3://{BUCKET}/faulty/one"), "--ingestion.timeout-s", "4"]
        environment = plain_environment(set_aws(proxy.url))
        log = tmp_path / "first.log"
        first = run_pipeline(arguments, environment | {"AWS_ACCESS_KEY_ID": "first"}, log).end(code=2)
        (said,) = [line for line in first.splitlines() if line.startswith("error:")]
        assert said.startswith(
            f"error: run_dir: s3://{BUCKET}/faulty/cache: the AWS credentials have expired; renew them"
        )
        assert "Traceback" not in first
        second = run_pipeline(arguments, environment | {"AWS_ACCESS_KEY_ID": "second"}, tmp_path / "second.log").end()
        found = Objects(store.client, BUCKET, "faulty/")
        attempt.kept(found.kinds() == store.plain.kinds(), "the bucket holds what it holds after an undisturbed run")
        found.require_like(store.plain, attempt, "one")
        sent = [request for request in proxy.requests if request.startswith(f"PUT /{BUCKET}/faulty/one/")]
        attempt.whole(sent[-1].endswith("/run.json"), "the seal went last")
        assert set(proxy.n_failed) == set(FAULTS) and proxy.n_failed.total() > 25
        assert len(epochs_in(first, second)) == 2 and "taken from the cache" in second, "no epoch was trained twice"


@pytest.mark.long
def test_of_two_runs_on_one_folder_from_two_machines_the_one_that_began_last_goes_on_and_the_other_sends_nothing_more(
    faults: FaultTable, store: Store, tmp_path: Path
) -> None:
    with faults.attempt("two runs on one run folder in a bucket at once") as attempt:
        address, environment = f"s3://{BUCKET}/plain/two", plain_environment(set_aws(store.url))
        started = []
        for name, others in (("first", []), ("second", ["--explanation.n-images", "2"])):
            arguments = [*flags(tmp_path / name, address), *others]
            started.append(run_pipeline(arguments, environment, tmp_path / f"{name}.log"))
        codes = [run.process.wait(600) for run in started]
        assert sorted(codes) == [0, 2]
        said = [run.end(code=code) for run, code in zip(started, codes, strict=True)]
        winner, loser = codes.index(0), codes.index(2)
        attempt.whole(
            "was taken over by another process" in said[loser] and "Traceback" not in said[loser], said[loser]
        )
        found = Objects(store.client, BUCKET, "plain/")
        n_images = json.loads(found.read("two/run.json"))["settings"]["explanation"]["n_images"]
        attempt.whole(n_images == (4, 2)[winner], "the run that went on sealed the folder")
        maps = [name for name in found.names if name.startswith("two/explanations/") and name.endswith(".json")]
        attempt.whole(len(maps) == n_images, f"{maps} are those of its settings")
        found.require_like(store.plain, attempt, "two", "one")
        assert epochs_in(*said) == [], "training came from the shared cache"
