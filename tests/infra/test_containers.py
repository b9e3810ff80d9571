"""Images and the compose file: what can be said of them without a container engine."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from s3_server import AWS, running_s3

from infra.bucket import main as make_bucket
from tasks.files import REPOSITORY

DOCKERFILE = REPOSITORY / "infra" / "Dockerfile"
COMPOSE = REPOSITORY / "infra" / "compose.yaml"
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(COMPOSE.read_text())["services"]
TARGETS = ("cpu", "gpu")
IMAGE_PYTHON = "3.11"


def read_stages() -> dict[str, tuple[str, list[tuple[str, str]]]]:
    """Name of a stage -> what it starts from, and its instructions with their arguments."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE)
    stages: dict[str, tuple[str, list[tuple[str, str]]]] = {}
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        if not line.strip():
            continue
        word, rest = line.split(maxsplit=1)
        if word == "FROM":
            base, name = re.fullmatch(r"(\S+) AS (\S+)", rest).groups()  # type: ignore[union-attr]
            instructions: list[tuple[str, str]] = []
            stages[name] = (base, instructions)
        else:
            instructions.append((word, rest))
    return stages


STAGES = read_stages()


def effective(target: str) -> list[tuple[str, str]]:
    """A target's instructions after those of the stages it starts from."""
    base, own = STAGES[target]
    return [*(effective(base) if base in STAGES else []), *own]


def pinned(name: str, file: str = "requirements.txt") -> str:
    found = re.search(rf"^{re.escape(name)}==(\S+)", (REPOSITORY / file).read_text(), re.MULTILINE)
    assert found, f"{name} is not pinned in {file}"
    return found[1]


def test_every_image_comes_with_a_version_and_none_is_the_latest() -> None:
    images = [base for base, _ in STAGES.values() if base not in STAGES]
    images += [service["image"] for service in SERVICES.values() if "build" not in service]
    assert images and all(re.search(r":[^:]*\d+\.\d+", image) and "latest" not in image for image in images), images


def test_the_images_have_the_oldest_python_that_is_supported() -> None:
    assert {base for base, _ in STAGES.values() if base not in STAGES} == {f"python:{IMAGE_PYTHON}.14-slim-bookworm"}


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_runs_as_a_user_without_rights_and_says_how_it_is(target: str) -> None:
    words = effective(target)
    users = [rest for word, rest in words if word == "USER"]
    assert users and users[-1].split(":")[0] not in ("0", "root")
    assert any(word == "HEALTHCHECK" and "/health" in rest for word, rest in words)
    assert [rest for word, rest in words if word == "VOLUME"] == ["/data"]


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_starts_a_worker_of_its_pool_that_hands_its_runs_back_when_asked_to_stop(target: str) -> None:
    words = effective(target)
    environment = " ".join(rest for word, rest in words if word == "ENV")
    assert f"POOL={target}" in environment.split()
    assert "PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR=reschedule" in environment.split()
    (entry,) = (json.loads(rest) for word, rest in words if word == "ENTRYPOINT")
    script = REPOSITORY / Path(entry[0]).relative_to("/app")
    assert os.access(script, os.X_OK)
    assert 'prefect worker start --pool "$POOL" --type process --with-healthcheck' in script.read_text()


def test_the_entrypoint_is_a_shell_script_that_a_shell_accepts() -> None:
    subprocess.run(["sh", "-n", str(REPOSITORY / "infra" / "entrypoint.sh")], check=True)


def read_lock(target: str) -> dict[str, tuple[str, list[str]]]:
    """Name of a package -> its version and the sha256 of its files."""
    text = (REPOSITORY / "infra" / f"requirements-{target}.lock").read_text()
    lines = re.findall(r"^([\w.-]+)==(\S+)((?: \\\n +--hash=sha256:[0-9a-f]{64})+)$", text, re.MULTILINE)
    assert len(lines) == len(re.findall(r"^[^#\s]", text, re.MULTILINE)), "every line is a package with hashes"
    return {canonicalize_name(name): (version, re.findall("[0-9a-f]{64}", sums)) for name, version, sums in lines}


def read_pins(file: str) -> dict[str, str]:
    lines = re.findall(r"^([\w.-]+)(?:\[\w+\])?==(\S+)", (REPOSITORY / file).read_text(), re.MULTILINE)
    return {canonicalize_name(name): version for name, version in lines}


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_installs_nothing_but_files_with_known_checksums(target: str) -> None:
    installs = [rest for word, rest in effective(f"packages-{target}") if word == "RUN" and "pip install" in rest]
    assert installs[-1].endswith(f"-r requirements-{target}.lock")
    assert all("--require-hashes" in line for line in installs)
    assert all(sums for _, sums in read_lock(target).values())


@pytest.mark.skipif(
    sys.version_info[:2] != tuple(map(int, IMAGE_PYTHON.split("."))),
    reason=f"the lock is that of Python {IMAGE_PYTHON}, which the images have; others need other packages",
)
def test_the_lock_holds_what_the_requirements_pin_and_all_that_it_brings_along() -> None:
    locked = {name: version for name, (version, _) in read_lock("cpu").items()}
    required, tested = read_pins("requirements.txt"), read_pins("constraints.txt")
    assert {name: locked.get(name) for name in required} == required
    assert {name: version for name, version in locked.items() if tested.get(name, required.get(name)) != version} in (
        {},
        {"setuptools": locked["setuptools"], "wheel": locked["wheel"]},
    ), "other versions than those that were tested together"
    for name in set(locked) - {"setuptools", "wheel"}:
        for text in importlib.metadata.requires(name) or []:
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                assert needed.specifier.contains(locked[canonicalize_name(needed.name)], prereleases=True), text


def test_the_gpu_image_has_what_the_tensorflow_of_the_requirements_brings_for_a_gpu() -> None:
    assert importlib.metadata.version("tensorflow") == pinned("tensorflow")
    of_cuda = [Requirement(text) for text in importlib.metadata.requires("tensorflow") or [] if "and-cuda" in text]
    locked = read_lock("gpu")
    assert {canonicalize_name(needed.name) for needed in of_cuda} <= set(locked)
    for needed in of_cuda:
        assert needed.specifier.contains(locked[canonicalize_name(needed.name)][0]), needed


def test_what_the_images_copy_exists_and_is_not_ignored() -> None:
    rules = [line for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert rules[0] == "*"
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    copies = [rest.split() for _, words in STAGES.values() for word, rest in words if word == "COPY"]
    for name in (name for words in copies if not words[0].startswith("--from") for name in words[:-1]):
        assert (REPOSITORY / name).exists() and name.split("/")[0] in allowed, name


@pytest.mark.parametrize("name", ["data/raw", "data/cache", "data/runs", "infra/.env"])
def test_data_and_secrets_stay_out_of_the_images(name: str) -> None:
    rules = [line for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line and line[0] not in "#!"]
    assert any(fnmatch(name, rule) for rule in rules[1:])


def test_the_compose_file_follows_the_schema_of_the_compose_specification() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(COMPOSE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_secret_is_in_the_compose_file_and_each_is_asked_for() -> None:
    secret = re.compile("SECRET|PASSWORD|AUTH_STRING|ACCESS_KEY|CONNECTION_URL")
    values = [
        (name, v) for s in SERVICES.values() for name, v in s.get("environment", {}).items() if secret.search(name)
    ]
    assert len(values) >= 10
    for name, value in values:
        assert re.search(r"\$\{[A-Z0-9_]+:\?[^}]+\}", value), name


def test_the_example_of_the_environment_names_what_the_compose_file_asks_for_and_no_value() -> None:
    example = (REPOSITORY / "infra" / "compose.env.example").read_text()
    lines = [line for line in example.splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Z0-9_]+=", line) for line in lines)
    asked = re.findall(r"\$\{([A-Z0-9_]+):[?-]", COMPOSE.read_text())
    assert {line[:-1] for line in lines} == set(asked)


def test_git_ignores_the_filled_in_environment() -> None:
    done = subprocess.run(["git", "check-ignore", "-q", "infra/.env"], cwd=REPOSITORY, check=False)
    assert done.returncode == 0


def test_the_server_asks_for_its_password_checks_csrf_and_remembers_who_holds_the_gpu() -> None:
    environment = SERVICES["server"]["environment"]
    assert environment["PREFECT_SERVER_API_AUTH_STRING"].startswith("${PREFECT_AUTH_STRING:?")
    assert environment["PREFECT_SERVER_CSRF_PROTECTION_ENABLED"] == "true"
    assert environment["PREFECT_SERVER_DATABASE_CONNECTION_URL"].startswith("postgresql+asyncpg://")
    assert environment["PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE"].endswith("filesystem")
    assert all(port.startswith("127.0.0.1:") for service in SERVICES.values() for port in service.get("ports", []))


def test_every_service_is_read_only_and_every_lasting_one_says_how_it_is() -> None:
    for name, service in SERVICES.items():
        assert service["read_only"] is True and "/tmp" in service["tmpfs"], name
        assert "no-new-privileges:true" in service["security_opt"], name
        assert service.get("build") or service.get("healthcheck"), name
    assert {name for name, service in SERVICES.items() if "restart" not in service} == {"bootstrap"}


def test_the_gpu_worker_reserves_the_gpus_and_workers_wait_for_the_bootstrap() -> None:
    (device,) = SERVICES["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia" and device["capabilities"] == ["gpu"]
    for pool in TARGETS:
        worker = SERVICES[f"worker-{pool}"]
        assert worker["image"] == f"x-ray-classification:{pool}" and worker["build"]["target"] == pool
        assert worker["depends_on"]["bootstrap"]["condition"] == "service_completed_successfully"
        assert worker["volumes"] == ["data:/data"]


def test_the_bucket_is_made_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with running_s3() as url:
        for name, value in (AWS | {"AWS_ENDPOINT_URL": url, "S3_BUCKET": "x-rays"}).items():
            monkeypatch.setenv(name, value)
        assert (make_bucket(), make_bucket()) == (0, 0)
    assert capsys.readouterr().out.splitlines() == ["bucket x-rays: created", "bucket x-rays: there already"]


def test_a_bucket_that_cannot_be_made_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("S3_BUCKET", raising=False)
    assert make_bucket() == 2
    assert capsys.readouterr().err == "error: S3_BUCKET: no bucket is named; set it to one, such as x-rays\n"
