"""`qwen-fastdecode compare NAME` against a Hub that answers as the real one does: each error is one line."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from programs import ENVIRONMENT, ROOT

# What each name stands for; the script below asks for all of them in one process, as importing takes seconds.
REFUSED = {"nobody/nothing": [], "some/gated": [], "some/model": ["--revision", "nope"]}
FAILING = {"some/broken": [], "some/half": []}  # the hub's package tries those again
SAID = {
    "nobody/nothing": "no such model: nobody/nothing is no folder, and not on the Hugging Face Hub",
    "some/gated": "some/gated is gated: accept its terms on the Hub, then `hf auth login`",
    "some/model": "--revision nope: some/model has none by that name",
    "some/broken": "some/broken is no folder, and the Hugging Face Hub cannot be asked: ",
    "some/half": "cannot load the configuration of some/half: ",
}
SCRIPT = """
import contextlib, io, json, sys
from qwen_fastdecode.cli.main import main
for name, more in json.loads(sys.argv[1]).items():
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = main(["compare", name, *more])
    print(json.dumps([name, code, said.getvalue()]))
"""


class Hub(BaseHTTPRequestHandler):
    """Codes and headers are those by which the hub's package tells errors apart."""

    def do_GET(self) -> None:
        name = "/".join(self.path.removeprefix("/api/models").split("/")[1:3])
        about = self.path.startswith("/api/models/")
        if name == "nobody/nothing":
            self._answer(404, "RepoNotFound")
        elif self.path.endswith("/revision/nope"):
            self._answer(404, "RevisionNotFound")
        elif name == "some/broken":
            self._answer(500)
        elif about:  # what is public of a gated repository as well
            self._answer(200, body={"id": name, "sha": "0" * 40, "siblings": [], "tags": []})
        elif name == "some/gated":
            self._answer(403, "GatedRepo")
        else:  # begun, and then gone
            self._answer(502)

    do_HEAD = do_GET

    def _answer(self, code: int, error: str = "", body: Any = None) -> None:
        data = json.dumps(body or {}).encode()
        self.send_response(code)
        if error:
            self.send_header("X-Error-Code", error)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def asked(endpoint: str, names: dict[str, list[str]], home: Path) -> dict[str, tuple[int, str]]:
    environment = {**ENVIRONMENT, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", SCRIPT, json.dumps(names)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return {name: (code, said) for name, code, said in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("names", [REFUSED, pytest.param(FAILING, marks=pytest.mark.slow)])
def test_each_error_is_one_line(names: dict[str, list[str]], hub: str, tmp_path: Path) -> None:
    said = asked(hub, names, tmp_path)
    assert {*said} == {*names}
    for name, (code, text) in said.items():
        assert code == 2, text
        asking, error = text.splitlines()
        assert asking == f"{name} is no folder; asking the Hugging Face Hub"
        assert error.startswith(f"qwen-fastdecode: {SAID[name]}"), error
        assert error.endswith(SAID[name]) or SAID[name].endswith(" ")


@pytest.mark.slow
def test_nobody_answers(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        said = asked(f"http://127.0.0.1:{closed.getsockname()[1]}", {"some/model": []}, tmp_path)
    code, text = said["some/model"]
    assert code == 2
    assert text.splitlines()[1].startswith(
        "qwen-fastdecode: some/model is no folder, and the Hugging Face Hub cannot be"
    )
    assert len(text.splitlines()) == 2
