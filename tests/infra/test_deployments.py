"""``prefect.yaml``: what it deploys can be loaded, and starts with parameters that its flow takes."""

import asyncio
from typing import Any

import pytest
import yaml
from prefect.client.orchestration import PrefectClient
from prefect.flows import load_flow_from_entrypoint
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools import validate
from prefect.utilities.schema_tools.validation import ValidationError
from prefect.workers.process import ProcessJobConfiguration

from infra.pools import POOLS, job_template
from tasks.files import REPOSITORY

DEPLOYMENTS: list[dict[str, Any]] = yaml.safe_load((REPOSITORY / "prefect.yaml").read_text())["deployments"]


def full_name(deployment: dict[str, Any]) -> str:
    return f"{deployment['entrypoint'].split(':')[1].replace('_', '-')}/{deployment['name']}"


def load(deployment: dict[str, Any]) -> Any:
    file, function = deployment["entrypoint"].split(":")
    return load_flow_from_entrypoint(f"{REPOSITORY / file}:{function}")


def check_parameters(flow: Any, parameters: dict[str, Any]) -> None:
    """As the server does it: what is missing may still be given when the run is started."""
    schema = parameter_schema(flow.fn).model_dump_for_openapi()
    validate(parameters, schema, raise_on_error=True, ignore_required=True)


def test_the_deployments_are_these_on_their_pools() -> None:
    assert {full_name(deployment): deployment["work_pool"]["name"] for deployment in DEPLOYMENTS} == {
        "pipeline/weekly": "cpu",
        "prepare/cpu": "cpu",
        "train/gpu": "gpu",
        "train-screener/gpu": "gpu",
        "train-lungs/gpu": "gpu",
        "explain/cpu": "cpu",
        "screen/on-demand": "cpu",
        "review/on-demand": "cpu",
        "score/on-demand": "cpu",
        "audit/on-demand": "cpu",
        "publish/on-demand": "cpu",
    }
    assert {deployment["work_pool"]["name"] for deployment in DEPLOYMENTS} == set(POOLS)


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=full_name)
def test_a_deployed_flow_can_be_loaded_and_takes_its_parameters(deployment: dict[str, Any]) -> None:
    flow = load(deployment)
    assert full_name(deployment).split("/")[0] == flow.name
    check_parameters(flow, deployment.get("parameters", {}))


def test_the_weekly_run_is_one_at_a_time_in_a_named_time_zone_and_trains_where_the_gpu_is() -> None:
    (weekly,) = (deployment for deployment in DEPLOYMENTS if deployment["name"] == "weekly")
    assert weekly["concurrency_limit"] == 1
    (schedule,) = weekly["schedules"]
    assert (schedule["cron"], schedule["timezone"]) == ("0 3 * * 1", "UTC")
    settings = load(weekly).validate_parameters(weekly["parameters"])["settings"]
    assert settings.source == "sample" and settings.ingestion.skip_unchanged
    assert settings.train_on in {full_name(deployment) for deployment in DEPLOYMENTS}


@pytest.mark.parametrize("wrong", [{"source": ""}, {"train_onn": "train/gpu"}, {"ingestion": {"skip_unchanged": 7}}])
def test_parameters_that_do_not_fit_would_be_noticed(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        check_parameters(load(DEPLOYMENTS[0]), {"settings": wrong})


def test_a_run_in_a_process_sends_heartbeats_as_often_as_the_server_was_told() -> None:
    template = job_template("cpu", "process", 45)
    nobody = PrefectClient("http://127.0.0.1:9/api")  # asked for blocks and variables only, which no template names
    values = {"env": {"OWN": "1"}}
    job: Any = asyncio.run(ProcessJobConfiguration.from_template_and_values(template, values, client=nobody))
    assert job.env == {
        "OWN": "1",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "45",
        "PREFECT_CLIENT_MAX_RETRIES": "8",
        "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",
    }
