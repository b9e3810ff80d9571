"""The job templates of the pools on Kubernetes, read by the worker's own classes; the policy of the bucket."""

import asyncio
import copy
import json
import re
from typing import Any

import pytest
import yaml
from prefect.client.orchestration import PrefectClient
from prefect_kubernetes.worker import KubernetesWorker, KubernetesWorkerJobConfiguration

from infra.pools import job_template
from tasks.files import REPOSITORY

POOLS = ("cpu", "gpu")
OTHER_VALUES: dict[str, Any] = {
    "string": "another-value",
    "integer": 7,
    "boolean": False,
    "object": {"another": "value"},
    "array": [{"key": "another", "operator": "Exists"}],
}


def configure(pool: str, values: dict[str, Any] | None = None) -> KubernetesWorkerJobConfiguration:
    """What the worker makes of a pool's template and a deployment's job variables."""
    template = job_template(pool, "kubernetes", 30)
    nobody = PrefectClient("http://127.0.0.1:9/api")  # asked for blocks and variables only, which no template names
    return asyncio.run(KubernetesWorkerJobConfiguration.from_template_and_values(template, values or {}, client=nobody))


def pod(pool: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Specification of the pod, and of its container."""
    found = configure(pool).job_manifest["spec"]["template"]["spec"]
    return found, found["containers"][0]


def properties(pool: str) -> dict[str, Any]:
    return job_template(pool, "kubernetes", 30)["variables"]["properties"]


@pytest.mark.parametrize("pool", POOLS)
def test_variables_and_the_names_that_the_job_uses_are_the_same(pool: str) -> None:
    used = re.findall(r"\{\{ *(\w+) *\}\}", json.dumps(job_template(pool, "kubernetes", 30)["job_configuration"]))
    assert set(used) == set(properties(pool))


@pytest.mark.parametrize("pool", POOLS)
def test_the_template_knows_every_variable_of_the_workers_own(pool: str) -> None:
    own = KubernetesWorker.get_default_base_job_template()["variables"]["properties"]
    assert own.keys() <= properties(pool).keys()


@pytest.mark.parametrize(("pool", "name"), [(pool, name) for pool in POOLS for name in properties(pool)])
def test_a_value_given_to_a_variable_arrives_in_the_job(pool: str, name: str) -> None:
    field = properties(pool)[name]
    if name == "cluster_config":
        pytest.skip("takes a block of the server")
    kinds = [field["type"]] if "type" in field else [choice["type"] for choice in field["anyOf"]]
    value = "Always" if name == "image_pull_policy" else OTHER_VALUES[kinds[0]]
    before, after = configure(pool).model_dump(), configure(pool, {name: copy.deepcopy(value)}).model_dump()
    assert before != after
    assert json.dumps(value)[1:-1] in json.dumps(after)


@pytest.mark.parametrize("pool", POOLS)
def test_a_job_runs_without_rights_on_a_read_only_disk_with_one_place_for_data(pool: str) -> None:
    spec, container = pod(pool)
    assert spec["securityContext"]["runAsNonRoot"] is True and spec["securityContext"]["runAsUser"] == 10001
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {"data": "/data", "tmp": "/tmp"} and {volume["name"] for volume in spec["volumes"]} == set(mounts)
    assert container["image"] == f"x-ray-classification:{pool}"
    assert set(container["resources"]["requests"]) == {"cpu", "memory"} <= set(container["resources"]["limits"])


@pytest.mark.parametrize("pool", POOLS)
def test_secrets_come_from_a_secret_of_the_cluster(pool: str) -> None:
    _, container = pod(pool)
    assert container["envFrom"] == [{"secretRef": {"name": "x-ray-classification"}}]


@pytest.mark.parametrize("values", [{}, {"env": {"OWN": "1"}}])
@pytest.mark.parametrize("pool", POOLS)
def test_an_evicted_job_hands_its_run_back_and_a_lost_one_is_noticed(pool: str, values: dict[str, Any]) -> None:
    environment = configure(pool, values).env
    assert isinstance(environment, dict)
    assert environment["PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR"] == "reschedule"
    assert environment["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == "30"


def test_only_the_gpu_pool_asks_for_gpus_on_nodes_that_have_them() -> None:
    spec, container = pod("gpu")
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert spec["nodeSelector"] == {"nvidia.com/gpu.present": "true"}
    assert spec["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert "nvidia" not in json.dumps(configure("cpu").job_manifest)


@pytest.mark.parametrize("kind", ["process", "kubernetes"])
def test_what_a_deployment_sets_is_a_variable_of_its_pool(kind: Any) -> None:
    for deployment in yaml.safe_load((REPOSITORY / "prefect.yaml").read_text())["deployments"]:
        pool = deployment["work_pool"]
        known = job_template(pool["name"], kind, 30)["variables"]["properties"]
        assert pool["job_variables"].keys() <= known.keys(), deployment["entrypoint"]


def test_the_policy_of_the_bucket_allows_four_things_on_one_prefix() -> None:
    statements = json.loads((REPOSITORY / "infra" / "s3_policy.json").read_text())["Statement"]
    actions = [a for s in statements for a in ([s["Action"]] if isinstance(s["Action"], str) else s["Action"])]
    assert sorted(actions) == ["s3:DeleteObject", "s3:GetObject", "s3:ListBucket", "s3:PutObject"]
    assert all(statement["Effect"] == "Allow" for statement in statements)
    listing, objects = statements
    assert listing["Resource"] == "arn:aws:s3:::BUCKET"
    assert listing["Condition"] == {"StringLike": {"s3:prefix": ["PREFIX", "PREFIX/*"]}}
    assert objects["Resource"] == "arn:aws:s3:::BUCKET/PREFIX/*"
