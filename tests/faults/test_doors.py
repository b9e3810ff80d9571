"""Doors that stay shut: one loader of networks, no pickle, settings that hide keys, a policy that grants no more."""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from fault_table import FaultTable
from hostile import ends_well, hostile
from hypothesis import given
from hypothesis import strategies as st
from recipe import FLAGS
from s3_server import running_s3, set_aws

from infra.pools import POOLS, PoolType, job_template
from tasks.addresses import hide_keys
from tasks.files import REPOSITORY
from tasks.runs.bucket import fetch_run
from tasks.runs.run import Run
from tasks.settings import Settings, StorageSettings

CODE = sorted(path for folder in ("flows", "tasks", "infra") for path in (REPOSITORY / folder).rglob("*.py"))
TREES = {path.relative_to(REPOSITORY).as_posix(): ast.parse(path.read_text()) for path in CODE}


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Calls with the last part of what is called: ``load_model`` of ``keras.saving.load_model(…)``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            yield name, node


def keyword(call: ast.Call, name: str) -> Any:
    found = [item.value for item in call.keywords if item.arg == name]
    return found[0].value if found and isinstance(found[0], ast.Constant) else None


# -- models and pickles ------------------------------------------------------------------------------------------------


def test_one_function_loads_networks_and_does_so_in_safe_mode_after_their_checksum() -> None:
    found = [(file, call) for file, tree in TREES.items() for name, call in calls(tree) if name == "load_model"]
    assert [file for file, _ in found] == ["tasks/networks/files.py"]
    assert keyword(found[0][1], "safe_mode") is True
    (loader,) = [
        node
        for node in ast.walk(TREES["tasks/networks/files.py"])
        if isinstance(node, ast.FunctionDef) and node.name == "load_checked"
    ]
    lines = {name: call.lineno for name, call in calls(loader)}
    assert lines["_refuse_change"] < lines["load_model"]


def test_weights_alone_are_loaded_for_backbones_only() -> None:
    users = {file for file, tree in TREES.items() for name, _ in calls(tree) if name == "load_weights"}
    assert users <= {"tasks/networks/backbones.py"}


def test_nothing_reads_or_writes_a_pickle() -> None:
    forbidden = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    for file, tree in TREES.items():
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not {name.split(".")[0] for name in imported} & forbidden, file
        assert not {name for name, _ in calls(tree)} & {"read_pickle", "to_pickle", "eval", "exec"}, file
        for name, call in calls(tree):
            of_numpy = isinstance(call.func, ast.Attribute) and getattr(call.func.value, "id", "") == "np"
            if of_numpy and name == "load":
                assert keyword(call, "allow_pickle") is False, f"{file}:{call.lineno}"


@pytest.mark.long
def test_results_that_prefect_is_told_to_keep_are_json(tmp_path: Path) -> None:
    flags = [*FLAGS, "--run-dir", str(tmp_path / "run")]
    flags += ["--storage.cache", str(tmp_path / "cache"), "--storage.raw", str(tmp_path / "raw")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")} | {
        "PREFECT_HOME": str(tmp_path / "home"),
        "PREFECT_RESULTS_PERSIST_BY_DEFAULT": "true",
        "PREFECT_LOCAL_STORAGE_PATH": str(tmp_path / "results"),
    }
    command = [sys.executable, "-m", "flows.pipeline", *flags]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kept = [path for path in (tmp_path / "results").rglob("*") if path.is_file()]
    assert len(kept) >= 4, "a result of each flow"
    for path in kept:
        kept_value = json.loads(path.read_text())  # a flow's alone: a pickle would stand there in base64
        if isinstance(kept_value, dict) and "metadata" in kept_value:  # a task's with what is noted of it
            assert kept_value["metadata"]["serializer"]["type"] == "json", path


def test_results_are_json_unless_somebody_says_otherwise() -> None:
    code = "import tasks; from prefect.settings import PREFECT_RESULTS_DEFAULT_SERIALIZER as s; print(s.value())"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "json"


@pytest.mark.parametrize("kind", ["process", "kubernetes"])
def test_results_of_a_run_that_a_worker_starts_are_json_too(kind: PoolType) -> None:
    """There Prefect has read its settings before this package is imported."""
    code = "import prefect.flow_engine, tasks; from prefect.results import get_default_result_serializer as s"
    for pool in POOLS:
        given = job_template(pool, kind, 30)["variables"]["properties"]["env"]["default"]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")} | given
        done = subprocess.run(
            [sys.executable, "-c", f"{code}; print(s().type)"],
            cwd=REPOSITORY,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == "json"


# -- keys in settings --------------------------------------------------------------------------------------------------

LINKS = [
    "https://www.dropbox.com/scl/fi/planted-a/set.zip?rlkey=planted-b&st=planted-c&dl=0",
    "https://www.dropbox.com/s/planted-a/set.zip?dl=1",
    "https://planted-a:planted-b@host/planted-c/set.zip",
    "https://bucket.host/set.zip?X-Amz-Credential=planted-a&X-Amz-Signature=planted-b",
    "ftp://planted-a:planted-b@host/set.zip",
    "s3://planted-a:planted-b@bucket/set.zip",
    "s3://bucket/set.zip?X-Amz-Signature=planted-a",
    "https://[planted-a/set.zip",
    "www.dropbox.com/scl/fi/planted-a/set.zip?rlkey=planted-b&dl=0",
    "https:/www.dropbox.com/s/planted-a/set.zip?dl=1",
    "scl/fi/planted-a/set.zip?rlkey=planted-b",
    "//www.dropbox.com/s/planted-a/set.zip?dl=0",
    "https//www.dropbox.com/s/planted-a/set.zip",
    "ttps:/www.dropbox.com/s/planted-a/set.zip",
    "www.dropbox.com:443/s/planted-a/set.zip",
    "planted-b@www.dropbox.com/s/planted-a/set.zip",
    ' "www.dropbox.com/s/planted-a/set.zip',
]


@pytest.mark.parametrize("link", LINKS)
def test_no_key_of_a_link_is_in_what_settings_show(faults: FaultTable, link: str) -> None:
    faults.n_cases += 1
    settings = Settings(source=link)
    shown = [repr(settings), str(settings), settings.model_dump_json(), settings.public_source]
    shown += [json.dumps(settings.model_dump(mode="json"))]
    assert not [text for text in shown if "planted" in text]
    assert settings.source == link and settings.model_copy().source == link
    assert Settings.model_validate(settings.model_dump()).source == link


@given(address=st.one_of(st.text(max_size=40), st.text(max_size=30).map(lambda text: "https://" + text)))
@hostile
def test_any_address_is_shown_without_an_error_and_shown_again_alike(faults: FaultTable, address: str) -> None:
    faults.n_cases += 1
    shown = hide_keys(address)
    assert hide_keys(shown) == shown
    assert "://" in address or shown == address


def test_no_setting_is_a_secret() -> None:
    page = (REPOSITORY / "docs" / "settings.md").read_text()
    names = re.findall(r"^\| `([a-z0-9_.]+)` \|", page, re.MULTILINE)
    assert names and not [name for name in names if re.search("token|secret|password|key|auth|credential", name)]


# -- the bucket --------------------------------------------------------------------------------------------------------

# What each call of boto3 needs: https://docs.aws.amazon.com/service-authorization/latest/reference/list_amazons3.html
NEEDED = {
    "list_objects_v2": "s3:ListBucket",
    "download_file": "s3:GetObject",  # a HEAD and GETs
    "put_object": "s3:PutObject",
    "delete_objects": "s3:DeleteObject",
}
MAKES_THE_BUCKET = {"list_buckets", "create_bucket"}


def bucket_calls(file: str) -> set[str]:
    """Names of calls to S3 in a file: of methods, of methods handed on, and of paginators."""
    tree, known = TREES[file], set(dir(client()))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in known and ast.unparse(node.value) in OWNERS:
            found.add(node.attr)
    for name, call in calls(tree):
        if name == "get_paginator" and isinstance(call.args[0], ast.Constant):
            found.add(str(call.args[0].value))
    return found - {"get_paginator", "meta", "close"}


OWNERS = {"self.client", "self._client", "client", "store", "s3", "self.s3", "bucket.client"}


def client() -> Any:
    import boto3

    return boto3.client("s3", region_name="us-east-1", aws_access_key_id="a", aws_secret_access_key="b")


def test_the_policy_grants_what_runs_ask_of_a_bucket_and_no_more() -> None:
    policy = json.loads((REPOSITORY / "infra" / "s3_policy.json").read_text())
    granted = {
        action
        for statement in policy["Statement"]
        for action in ([statement["Action"]] if isinstance(statement["Action"], str) else statement["Action"])
    }
    used = {file: bucket_calls(file) for file in TREES if file.startswith(("tasks/", "flows/"))}
    asked = set().union(*used.values())
    assert {file for file, found in used.items() if found} == {
        "tasks/sources/bucket_mirror.py",
        "tasks/runs/s3_client.py",
    }
    assert asked <= set(NEEDED), "a call that nobody has looked up"
    assert {NEEDED[call] for call in asked} == granted
    assert bucket_calls("infra/bucket.py") == MAKES_THE_BUCKET, "only the compose file's own store has its bucket made"


def test_the_policy_reaches_one_prefix_and_never_everything() -> None:
    policy = json.loads((REPOSITORY / "infra" / "s3_policy.json").read_text())
    for statement in policy["Statement"]:
        assert statement["Effect"] == "Allow" and "*" not in str(statement["Action"]) and "Principal" not in statement
        listing = statement["Action"] == "s3:ListBucket"
        assert statement["Resource"] == "arn:aws:s3:::BUCKET" + ("" if listing else "/PREFIX/*")
        assert not listing or statement["Condition"] == {"StringLike": {"s3:prefix": ["PREFIX", "PREFIX/*"]}}


def test_names_in_a_bucket_that_lead_out_of_a_run_write_nothing_there(
    faults: FaultTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["runs/one/../../../../../out.txt", "runs/one//out.txt"]
    cache = tmp_path / "a" / "b" / "cache"
    settings = Settings(run_dir="s3://x-rays/runs/one", storage=StorageSettings(cache=str(cache)))
    with running_s3({"x-rays": dict.fromkeys(names, b"out")}) as url:
        for name, value in set_aws(url).items():
            if name.startswith("AWS_"):
                monkeypatch.setenv(name, value)
        assert not ends_well(faults, lambda: fetch_run(Run(settings)))
    assert not list(tmp_path.rglob("out.txt")) and not Path("/out.txt").exists()


# -- containers --------------------------------------------------------------------------------------------------------

SERVICES: dict[str, dict[str, Any]] = yaml.safe_load((REPOSITORY / "infra" / "compose.yaml").read_text())["services"]
OURS = [name for name, service in SERVICES.items() if "build" in service]


@pytest.mark.parametrize("name", OURS)
def test_a_container_of_ours_has_no_rights_and_at_most_one_writable_mount(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True and service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert "privileged" not in service and service.get("user", "") not in ("0", "root", "0:0")
    mounts = service.get("volumes", [])
    assert len(mounts) <= 1 and all(mount.endswith(":/data") for mount in mounts)


@pytest.mark.parametrize("pool", ["cpu", "gpu"])
def test_a_job_on_kubernetes_has_no_rights_and_one_writable_mount(pool: str) -> None:
    text = (REPOSITORY / "infra" / "kubernetes" / f"{pool}.json").read_text()
    job = json.loads(text)["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
    (container,) = job["containers"]
    secured = {**job.get("securityContext", {}), **container["securityContext"]}
    assert secured["runAsNonRoot"] is True and secured["readOnlyRootFilesystem"] is True
    assert secured["allowPrivilegeEscalation"] is False and secured["capabilities"] == {"drop": ["ALL"]}
    lasting = [volume for volume in job["volumes"] if "emptyDir" not in volume]
    assert len(lasting) == 1 and "hostPath" not in text


def test_no_file_of_the_repository_names_a_package_index() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    word = re.compile(r"^(-i|--index-url|--extra-index-url|--find-links|--trusted-host)\b|index-url\s*=", re.MULTILINE)
    for name in listed.stdout.splitlines():
        if name.endswith((".txt", ".lock", ".toml", ".cfg", ".ini")) or "Dockerfile" in name:
            assert not word.search((REPOSITORY / name).read_text()), name


def test_advisories_that_cannot_be_reached_cost_a_line_and_not_the_check(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from infra import audit_packages

    monkeypatch.setattr(audit_packages, "ask_advisories", lambda lock: [])
    assert audit_packages.main() == 0
    assert capsys.readouterr().err.count("\n") == 1
    flaw = {"id": "PYSEC-1", "fix_versions": ["2"]}
    known = [{"name": "a", "version": "1", "vulns": [flaw]}, {"name": "b", "version": "1", "vulns": []}]
    monkeypatch.setattr(audit_packages, "ask_advisories", lambda lock: known)
    assert audit_packages.main() == 1
    assert capsys.readouterr().out.startswith("a 1: PYSEC-1, fixed in 2")
