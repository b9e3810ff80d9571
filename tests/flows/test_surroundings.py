"""What a command finds on its machine: servers, proxies, files and variables of the user (docs/surroundings.md)."""

import http.server
import importlib.util
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from flows.engine.command_line import run_command
from tasks.files import REPOSITORY


class Refuses(http.server.BaseHTTPRequestHandler):
    """A server that asks for a password."""

    def do_GET(self) -> None:
        self.send_error(401)

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        """Says nothing."""


def say_of_server(**environment: str) -> str:
    """What a command says that needs a server; asserts that it is one sentence with exit code 2."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    done = subprocess.run(
        [sys.executable, "-m", "flows.publish"],
        cwd=REPOSITORY,
        env={**kept, "PREFECT_CLIENT_MAX_RETRIES": "0", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 2 and "Traceback" not in said, said
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return line


def test_a_prefect_server_that_is_not_there_is_named_in_one_sentence(tmp_path: Path) -> None:
    line = say_of_server(PREFECT_API_URL="http://127.0.0.1:9/api", PREFECT_HOME=str(tmp_path))
    assert "PREFECT_API_URL: the server at http://127.0.0.1:9/api cannot be used" in line


def test_a_prefect_server_that_asks_for_a_password_is_named_in_one_sentence(tmp_path: Path) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuses) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/api"
        line = say_of_server(PREFECT_API_URL=address, PREFECT_HOME=str(tmp_path))
        server.shutdown()
    assert f"PREFECT_API_AUTH_STRING: is missing or refused by the server at {address}" in line


def test_a_place_where_prefect_s_temporary_server_cannot_write_is_named_at_once() -> None:
    assert "PREFECT_HOME: /dev/null/x cannot be written to" in say_of_server(PREFECT_HOME="/dev/null/x")


def test_a_prefect_that_may_start_no_server_is_said_at_once(tmp_path: Path) -> None:
    line = say_of_server(PREFECT_SERVER_ALLOW_EPHEMERAL_MODE="false", PREFECT_HOME=str(tmp_path))
    assert line.startswith("error: PREFECT_SERVER_ALLOW_EPHEMERAL_MODE: is false, and no server is named")


@pytest.mark.parametrize(
    ("backend", "said"), [("jax", "KERAS_BACKEND: jax is not installed here"), ("theano", "'theano' is not known")]
)
def test_a_backend_that_is_not_there_is_said_at_once(
    backend: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if importlib.util.find_spec(backend):
        pytest.skip(f"{backend} is installed")
    monkeypatch.setenv("KERAS_BACKEND", backend)
    assert run_command(lambda settings: "never", [], "x") == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ALL_PROXY", "socks4://proxy.example:1080"),
        ("https_proxy", "http://user:SECRET@proxy.example:port"),
        ("SSL_CERT_FILE", "/no/such/file.pem"),
    ],
)
def test_proxies_and_certificates_that_cannot_be_used_are_said_at_once(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, value)
    assert run_command(lambda settings: "never", [], "x") == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: HTTP_PROXY, HTTPS_PROXY, ALL_PROXY or SSL_CERT_FILE: cannot be used (")
    assert shown.count("\n") == 1 and "SECRET" not in shown


SURROUNDINGS = {
    "HTTP_PROXY": "http://127.0.0.1:9",
    "ALL_PROXY": "socks5://127.0.0.1:9",
    "KERAS_MAX_EPOCHS": "1",
    "MPLBACKEND": "nonsense",
    "PREFECT_TASKS_DEFAULT_RETRIES": "5",
    "PREFECT_TASKS_DEFAULT_NO_CACHE": "false",
    "PREFECT_RESULTS_DEFAULT_SERIALIZER": "pickle",
}
"""Of a machine that is not ours."""
LOOK = """
import json, flows
from tasks.networks.keras_backend import keras
from tasks.reporting.figures import mpl
from prefect.settings import get_current_settings
found = get_current_settings()
print(json.dumps({
    "backend": keras.backend.backend(), "floatx": keras.config.floatx(), "epsilon": keras.config.epsilon(),
    "format": keras.config.image_data_format(), "policy": keras.config.dtype_policy().name,
    "epochs": keras.config.max_epochs(), "mpl": mpl.get_backend(), "font": mpl.rcParams["font.size"],
    "retries": found.tasks.default_retries, "no_cache": found.tasks.default_no_cache,
    "serializer": found.results.default_serializer,
}))
"""


def test_what_a_result_rests_on_is_not_the_user_s_to_set_by_accident(tmp_path: Path) -> None:
    (tmp_path / ".keras").mkdir()
    theirs = {"backend": "torch", "floatx": "float16", "epsilon": 0.1, "image_data_format": "channels_first"}
    (tmp_path / ".keras" / "keras.json").write_text(json.dumps(theirs))
    (tmp_path / ".config" / "matplotlib").mkdir(parents=True)
    (tmp_path / ".config" / "matplotlib" / "matplotlibrc").write_text("font.size: 50\nbackend: nonsense\n")
    environment = {**os.environ, **SURROUNDINGS, "HOME": str(tmp_path)}
    for name in ("KERAS_BACKEND", "KERAS_HOME", "MPLCONFIGDIR", "XDG_CONFIG_HOME"):
        environment.pop(name, None)
    command = [sys.executable, "-c", LOOK]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "backend": "tensorflow",
        "floatx": "float32",
        "epsilon": 1e-7,
        "format": "channels_last",
        "policy": "float32",
        "epochs": None,
        "mpl": "agg",
        "font": 10.0,
        "retries": 0,
        "no_cache": True,
        "serializer": "json",
    }


def test_a_keras_json_that_keras_does_not_start_with_is_named(tmp_path: Path) -> None:
    (tmp_path / "keras.json").write_text('{"floatx": "float8"}')
    code = "from flows.engine.command_line import run_command\ndef load(settings):\n"
    code += " from tasks.networks.keras_backend import keras\nraise SystemExit(run_command(load, [], 'x'))"
    environment = {**os.environ, "KERAS_HOME": str(tmp_path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert (
        "error: keras.json: Keras does not start with the one in ~/.keras or KERAS_HOME (Invalid `floatx`"
        in done.stderr
    )
    assert "Traceback" not in done.stderr


def test_a_home_that_is_not_there_yet_is_made_for_prefect(tmp_path: Path) -> None:
    home = tmp_path / "not" / "yet"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    environment |= {"HOME": str(home)}
    code = "from flows.engine.command_line import run_command\n"
    code += "raise SystemExit(run_command(lambda settings: 'done', [], 'x'))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "done"), done.stderr
    assert (home / ".prefect").is_dir()
