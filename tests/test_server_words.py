"""A server's words set values at a site and do nothing else: no look-up, no foreign file, no network."""

import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import timm
from flwr.app import ConfigRecord, RecordDict

from client import site as sites
from client.app import app
from client.heard import heard
from server.conversation import ask
from sparsecontrast.config import CONFIG_DIR, compose
from sparsecontrast.errors import ConfigError, OverrideRefusedError
from sparsecontrast.federated import compose_run
from sparsecontrast.relations import _name_relations
from sparsecontrast.settings import Config
from tests.federations import MODEL, DirectGrid
from tests.test_guard import site

ROOT = Path(__file__).parents[1]
SECRET = "s3cret-of-the-hospital"
REFUSED = (
    "backbone.name='hf-hub:attacker/${oc.env:INTERNAL_PROXY_PASSWORD}'",
    r"backbone.name=$\{oc.env:INTERNAL_PROXY_PASSWORD\}",  # Hydra takes these backslashes out
    "++seed=${oc.env:INTERNAL_PROXY_PASSWORD}",
    "hydra.searchpath=[file:///FOLDER]",
    "+hydra.searchpath=[file:///FOLDER]",
    "++hydra.searchpath=[file:///FOLDER]",
    "~hydra.searchpath",
    "hydra/launcher=basic",
    "federation@privacy=fedavg",
    "data/phantom@privacy=x",
    "backbone@data:vit_tiny",
    "method=FOLDER/evil",
    "method=../../evil",
    "method=[../../evil]",
    "experiment='../../evil'",
    "+experiment=../../evil",
    "'seed'=3",
)


def greeted(node, *words):
    """The status with which a site answers a greeting that brings these words."""
    grid = DirectGrid([node], app)
    letter = RecordDict({"config": ConfigRecord({"overrides": " ".join(words)})})
    return dict(ask(grid, {"x": (10, letter)}, "query.hello", 60, "h").replies["x"]["status"])


@pytest.fixture
def network(monkeypatch):
    """Names that anything asked the network for; nothing gets an answer."""
    from huggingface_hub import constants

    asked = []

    def nobody(host, *_, **__):
        asked.append(str(host))
        raise OSError("blocked")

    monkeypatch.setattr(socket, "getaddrinfo", nobody)
    monkeypatch.setattr(socket.socket, "connect", lambda _, address: nobody(address))
    monkeypatch.setattr("time.sleep", lambda _: None)  # between the hub client's tries
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("INTERNAL_PROXY_PASSWORD", SECRET)
    return asked


@pytest.mark.parametrize("word", REFUSED)
def test_a_word_that_would_do_more_than_set_a_value_is_refused_and_noted(tmp_path, network, word):
    (tmp_path / "evil.yaml").write_text((CONFIG_DIR / "method" / "sparse_contrast.yaml").read_text())
    node, word = site(tmp_path), word.replace("FOLDER", str(tmp_path))
    status = greeted(node, *MODEL, word)
    assert (status["status"], status["code"]) == ("error", "override_refused")
    noted = "\n".join(path.read_text() for path in tmp_path.rglob("client.log"))
    assert "override_refused" in noted and word in noted.replace("\\\\", "\\").replace("\\'", "'")
    assert SECRET not in noted and not network


@pytest.mark.parametrize(
    "name", ["hf-hub:attacker/model", "hf_hub:attacker/model", "local-dir:FOLDER", "a/b"]
)
def test_a_backbone_is_named_and_never_fetched_or_read_from_a_folder(tmp_path, network, name):
    (tmp_path / "config.json").write_text('{"architecture": "vit_tiny_patch16_224"}')
    name, opened = name.replace("FOLDER", str(tmp_path)), []
    sys.addaudithook(lambda event, told: opened.append(str(told[0])) if event == "open" else None)
    status = greeted(site(tmp_path), *MODEL, f"backbone.name='{name}'")
    assert (status["status"], status["code"]) == ("error", "config")
    assert not network and str(tmp_path / "config.json") not in opened
    with pytest.raises(ConfigError, match="must be a timm name"):  # for everybody
        compose([*MODEL, f"backbone.name='{name}'"])


def test_the_network_that_was_watched_is_the_one_that_timm_would_use(network):
    with pytest.raises(Exception):  # noqa: B017  whatever the hub's client makes of it
        timm.create_model("hf-hub:attacker/model")
    assert "huggingface.co" in network


def test_an_honest_servers_words_are_heard(tmp_path, network):
    assert greeted(site(tmp_path), *MODEL, "++seed=3", "method=patch_contrast")["status"] == "ok"
    assert not network
    words = ["experiment=laptop", "backbone='vit_tiny'", "backbone={depth: 2}", "seed=7",
             "federation.options={tau: 1e-3}", "cells.classes=[a,b]", "train.crop_area=[0.5,1]"]  # fmt: skip
    assert heard([*words, "output_dir=/a$b", "data.root=${oc.env:HOME}"]) == words


def test_all_that_ships_may_be_asked_for(tmp_path):
    node = site(tmp_path)
    for name in ("laptop", "multisite_cxr", "mammograms"):
        (found,) = sites.resolve(node, f"experiment={name}")
        assert isinstance(found.config, Config)
        assert found.config.backbone == compose([f"experiment={name}"]).backbone
    config = compose(list(MODEL))
    for name in (*timm.list_models(), *timm.list_models(pretrained=True)):
        named = dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, name=name))
        assert all(holds for holds, _ in _name_relations(named))


def test_a_path_in_a_group_would_have_been_read_otherwise(tmp_path):
    """What is refused is no idle fear: Hydra itself composes a folder of the machine."""
    (tmp_path / "method").mkdir()
    own = (CONFIG_DIR / "method" / "sparse_contrast.yaml").read_text()
    (tmp_path / "method" / "evil.yaml").write_text(own)
    assert compose_run([f"hydra.searchpath=[file://{tmp_path}]", "method=evil"])
    with pytest.raises(OverrideRefusedError):
        heard([f"hydra.searchpath=[file://{tmp_path}]"])


OFFLINE = """if True:
    import os, sys
    from client import {module} as module
    seen = []
    def stop(*_, **__):
        seen.append(os.environ.get("HF_HUB_OFFLINE"))
        raise SystemExit
    module.{then} = stop
    os.environ["SPARSECONTRAST_SITE"] = "site.yaml"
    try:
        module.main()
    except SystemExit:
        print(seen, "huggingface_hub" in sys.modules)
"""


@pytest.mark.parametrize(("module", "then"), [("sentinel", "read_site_file"), ("executor", "Template")])
def test_the_client_process_and_the_one_it_is_forked_from_ask_no_hub(module, then):
    """Before the hub's client is imported, for it reads the variable then; whatever the environment says."""
    code = OFFLINE.format(module=module, then=then)
    environment = {**os.environ, "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == "['1'] False", done.stderr
