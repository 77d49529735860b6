"""Models on the hub, against a server on this machine that speaks the few endpoints needed."""

import base64
import hashlib
import json
import re
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import huggingface_hub
import pytest
import timm
import torch
import yaml
from conftest import tiny_vit
from huggingface_hub import constants
from test_hostile import ARGS

import slimcli
from slimcli import SlimError

TOKEN = "hf_" + "secret" * 5


class Hub(BaseHTTPRequestHandler):
    """Repositories by name, each a list of commits: {file: content} and the branches that point at them."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_words):
        return

    def answer(self, code, content=b"", **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def repository(self, name):
        return self.server.repositories.get(name)

    def missing(self, what):
        self.answer(404, {"error": what}, X_Error_Code=what)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.server.asked.append((self.command, self.path))
        path = unquote(self.path.partition("?")[0])
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            repository = self.repository(found[1])
            if repository is None:
                return self.missing("RepoNotFound")
            commit = repository["branches"].get(found[2] or "main", found[2])
            if commit not in repository["commits"]:
                return self.missing("RevisionNotFound")
            files = [{"rfilename": name} for name in repository["commits"][commit]]
            return self.answer(
                200, {"id": found[1], "sha": commit, "private": repository["private"], "siblings": files}
            )
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        repository = self.repository(found[1]) if found else None
        if repository is None:
            return self.missing("RepoNotFound")
        commit = repository["branches"].get(found[2], found[2])
        if commit not in repository["commits"]:
            return self.missing("RevisionNotFound")
        content = repository["commits"][commit].get(found[3])
        if content is None:
            return self.answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        etag = hashlib.sha256(content).hexdigest()
        return self.answer(200, content, ETag=f'"{etag}"', X_Repo_Commit=commit)

    def do_PUT(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        oid = self.path.removeprefix("/lfs/")
        assert hashlib.sha256(content).hexdigest() == oid
        # what is stored elsewhere needs no token, and gets none
        assert "Authorization" not in self.headers
        self.server.large[oid] = content
        self.answer(200)

    def do_POST(self):
        self.server.asked.append((self.command, self.path))
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            # a server that says back what it was sent
            return self.answer(401, {"error": f"denied: {self.headers.get('Authorization')}"})
        path = unquote(self.path)
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            private = asked.get("private", asked.get("visibility") == "private")
            self.server.repositories[name] = {
                "private": private, "branches": {"main": "0" * 40}, "commits": {"0" * 40: {}}
            }  # fmt: skip
            return self.answer(200, {"url": f"{self.server.address}/{name}"})
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [{"oid": one["oid"], "size": one["size"], "actions": {
                "upload": {"href": f"{self.server.address}/lfs/{one['oid']}"},
                "verify": {"href": f"{self.server.address}/verify"}}}
                for one in json.loads(body)["objects"]]  # fmt: skip
            return self.answer(200, {"transfer": "basic", "objects": objects})
        if path == "/verify":
            return self.answer(200, {})
        name, action, branch = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(\w+)/(.+)", path).groups()
        repository = self.repository(name)
        if action == "branch":
            repository["branches"][branch] = repository["branches"]["main"]
            return self.answer(200, {})
        if action == "preupload":
            # weights go to the store for large files, as on the hub
            files = [{"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                      "shouldIgnore": False} for file in json.loads(body)["files"]]  # fmt: skip
            return self.answer(200, {"files": files})
        files = dict(repository["commits"][repository["branches"][branch]])
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            elif entry["key"] == "lfsFile":
                files[entry["value"]["path"]] = self.server.large[entry["value"]["oid"]]
            elif entry["key"] == "deletedFile":
                del files[entry["value"]["path"]]
        commit = hashlib.sha1(body).hexdigest()
        repository["commits"][commit] = files
        repository["branches"][branch] = commit
        return self.answer(200, {"commitUrl": f"{self.server.address}/{name}/commit/{commit}", "commitOid": commit})


@pytest.fixture
def hub(tmp_path, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address, server.repositories, server.asked = f"http://127.0.0.1:{server.server_port}", {}, []
    server.large = {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    here(monkeypatch, server.address, tmp_path / "cache")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()


def here(monkeypatch, address, cache):
    """The library's settings are read when it is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", address)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model = slimcli.slim(tiny_vit(), 0.5, life_layer=1).eval()
    with torch.no_grad():
        for parameter in model.selector.parameters():
            parameter += 0.01
    model.class_names = [f"class {n}" for n in range(10)]
    folder = tmp_path_factory.mktemp("saved") / "model"
    return slimcli.save(model, folder, model_name="vit_tiny_patch16_224", model_args=ARGS)


def test_what_is_pushed_is_loaded_again_by_every_command(hub, slim, saved):
    result = slim("push", saved, "me/small", "--private")
    assert result.exit_code == 0, result.output
    repository = hub.repositories["me/small"]
    files = repository["commits"][repository["branches"]["main"]]
    assert repository["private"]
    assert set(files) == {"README.md", "config.json", "model.safetensors", "slim.safetensors"}
    assert {files["model.safetensors"], files["slim.safetensors"]} == set(hub.large.values())
    head = yaml.safe_load(files["README.md"].decode().split("---")[1])
    assert head["library_name"] == "slimcli" and "token-pruning" in head["tags"]
    assert 'slimcli.load("hf-hub:me/small")' in files["README.md"].decode()
    images = torch.randn(2, 3, 32, 32)
    own, fetched = slimcli.load(saved), slimcli.load("hf-hub:me/small")
    assert torch.equal(own(images), fetched(images)) and fetched.class_names == own.class_names
    result = slim("profile", "hf-hub:me/small", "--seconds", "0", "--json")
    assert result.exit_code == 0, result.output
    # without the network, from the cache
    constants.HF_HUB_OFFLINE = True
    assert torch.equal(own(images), slimcli.load("hf-hub:me/small")(images))


def test_a_revision_and_what_is_pushed_again(hub, slim, saved):
    assert slim("push", saved, "me/small").exit_code == 0
    first = hub.repositories["me/small"]["branches"]["main"]
    assert slim("push", saved, "me/small", "--revision", "next").exit_code == 0
    assert slimcli.load("hf-hub:me/small@next").keep_rate == 0.5
    assert slimcli.load(f"hf-hub:me/small@{first}").keep_rate == 0.5
    with pytest.raises(SlimError, match="no such revision"):
        slimcli.load("hf-hub:me/small@none")


def test_what_cannot_be_pushed_is_refused_in_a_line(hub, refused, saved, tmp_path, monkeypatch):
    hub.repositories["me/other"] = {
        "private": False, "branches": {"main": "1" * 40}, "commits": {"1" * 40: {"pytorch_model.bin": b"x"}}
    }  # fmt: skip
    (tmp_path / "empty").mkdir()
    assert "holds something else" in refused("push", saved, "me/other")
    assert "is public already: leave --private out" in refused("push", saved, "me/other", "--private")
    assert "is not a model folder" in refused("push", tmp_path / "empty", "me/small")
    assert "no such folder" in refused("push", tmp_path / "none", "me/small")
    assert "owner/name" in refused("push", saved, "../small")
    monkeypatch.setenv("HF_TOKEN", "hf_" + "wrongtoken" * 3)
    line = refused("push", saved, "me/small")
    assert "HF_TOKEN" in line and "hf_wrong" not in line
    assert set(hub.repositories) == {"me/other"}


def test_a_token_is_in_no_traceback(hub, slim, saved, monkeypatch):
    import traceback

    monkeypatch.setenv("HF_TOKEN", "hf_" + "wrongtoken" * 3)
    result = slim("push", saved, "me/small", "--debug")
    told = "".join(traceback.format_exception(result.exception))
    assert "the hub refuses" in told and "wrongtoken" not in told + result.output


def test_weights_are_fetched_only_for_a_sound_config(hub, slim, saved, tmp_path):
    assert slim("push", saved, "me/small").exit_code == 0
    repository = hub.repositories["me/small"]
    files = repository["commits"][repository["branches"]["main"]]
    config = json.loads(files["config.json"])
    config["model"]["args"]["checkpoint_path"] = "/etc/passwd"
    files["config.json"] = json.dumps(config).encode()
    hub.asked.clear()
    with pytest.raises(SlimError, match="checkpoint_path"):
        slimcli.load("hf-hub:me/small")
    assert not any("safetensors" in path for _, path in hub.asked)


def test_without_network_one_line_says_so(refused, tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    here(monkeypatch, address, tmp_path / "cache")
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    line = refused("eval", "hf-hub:me/small")
    assert "hf-hub:me/small" in line and "connect to the network" in line
    line = refused("eval", "vit_tiny_patch16_224", "--set", "model.pretrained=true")
    assert "vit_tiny_patch16_224" in line and "connect to the network" in line
    # the hub's library would try again for half a minute
    assert sum(waits) < 1
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE forbids" in refused("eval", "hf-hub:me/small")


def test_timm_reads_the_dense_model_of_a_folder(saved):
    dense = timm.create_model(f"local-dir:{saved}", pretrained=True).eval()
    own = slimcli.load(saved)
    images = torch.randn(2, 3, 32, 32)
    own.mode = "none"
    assert torch.allclose(dense(images), own(images), atol=1e-5)
    assert dense.pretrained_cfg["mean"] == tuple(own.transform().prepare["mean"]) or dense.num_classes == 10


def test_a_life_head_that_is_not_beside_its_model_is_missed_aloud(slim, saved, tmp_path):
    import shutil

    shutil.copytree(saved, tmp_path / "half")
    (tmp_path / "half" / "slim.safetensors").unlink()
    result = slim("profile", tmp_path / "half", "--seconds", "0")
    assert "which is not there" in result.stderr
