"""What leaves a site, seen on the wire: allowed tensors, no name, no path, no detail of an error."""

import pytest
from flwr.common.serde import message_from_proto
from flwr.proto.message_pb2 import Message as ProtoMessage

from sparsecontrast import checkpoint, payload
from sparsecontrast.overrides import assign
from tests.federations import MODEL, DirectGrid, serve, words, write_images

CANARIES = ("DOE^JANE", "p-DOE^JANE", "PATIENT-9731", "/images", ".png", "/state", "site.yaml")


@pytest.fixture(scope="module")
def left_the_site(tmp_path_factory):
    """Every byte that two sites send in two rounds, with names and paths that must not be among them."""
    import yaml

    folder = tmp_path_factory.mktemp("PATIENT-9731")
    nodes = []
    for name in ("north", "south"):
        index = write_images(folder / name / "images", {name: 5}, prefix="DOE^JANE-")
        told = {"name": name, "state_dir": str(folder / name / "state"),
                "overrides": [assign("data.index", index), "data.min_images=2"]}  # fmt: skip
        (folder / name / "site.yaml").write_text(yaml.safe_dump(told))
        nodes.append({"site-config": str(folder / name / "site.yaml")})
    out = tmp_path_factory.mktemp("server")
    grid = serve(nodes, words(out / "nothing.csv", out / "run", "federation.sites=2"))
    return folder, grid.sent


def messages(sent):
    return [message_from_proto(ProtoMessage.FromString(data)) for data in sent]


def test_the_only_tensors_that_leave_are_the_allowed_ones(left_the_site):
    from sparsecontrast.config import compose
    from sparsecontrast.methods import build_method

    _, sent = left_the_site
    method = build_method(compose(list(MODEL)))
    state, allowed = method.state_dict(), sorted(method.shared_parameters())
    assert set(state) - set(allowed)  # there is something to keep back
    total = sum(state[name].numel() for name in allowed)
    trained = [m for m in messages(sent) if m.content.array_records]
    assert len(trained) == 4
    for message in trained:
        (record,) = message.content.array_records.values()
        (array,) = record.values()
        assert list(record) == ["flat"]
        assert array.numpy().shape == (total,)
        assert message.content.config_records["manifest"]["names"] == allowed
        assert all(isinstance(v, int | float) for v in message.content.metric_records["metrics"].values())
    # nothing but that array is large: no room for another tensor in names, metrics or status
    names = sum(map(len, allowed))
    for data, message in zip(sent, messages(sent), strict=True):
        arrays = sum(len(a.data) for r in message.content.array_records.values() for a in r.values())
        assert len(data) - arrays < 3 * names + 2000


def test_local_tensors_do_not_leave(left_the_site):
    folder, sent = left_the_site
    kept = 0
    for path in folder.glob("*/state/state/*/round_*.safetensors"):
        for name, tensor in checkpoint.read_tensors(path).items():
            values = tensor.flatten()[:64]
            if len(values) == 64 and len(values.unique()) > 60:
                kept += 1
                for data in sent:
                    assert values.numpy().tobytes() not in data, name
                    assert values.half().numpy().tobytes() not in data, name
    assert kept > 40


def test_shared_tensors_are_found_by_the_same_search(left_the_site):
    """The search above would see a tensor that leaves: it sees those that do."""
    _, sent = left_the_site
    message = next(m for m in messages(sent) if m.content.array_records)
    flat = message.content.array_records["arrays"]["flat"].numpy()
    assert any(flat[1000:1064].tobytes() in data for data in sent)


def test_no_name_or_path_leaves(left_the_site):
    folder, sent = left_the_site
    for canary in (*CANARIES, str(folder)):
        assert not [data for data in sent if canary.encode() in data], canary
    assert any(b"north" in data for data in sent)  # the agreed name does


def test_an_exception_leaves_as_a_code_and_stays_in_the_sites_log(tmp_path, monkeypatch):
    monkeypatch.setattr("server.roll.SETTLE_SECONDS", 0.0)
    import yaml

    from sparsecontrast.errors import FederationError, QuorumError

    index = write_images(tmp_path / "DOE^JANE", {"x": 4}, broken=("x",))
    site = tmp_path / "site.yaml"
    told = {"name": "x", "state_dir": str(tmp_path / "state"), "overrides": [assign("data.index", index)]}
    site.write_text(yaml.safe_dump(told))
    more = ("federation.sites=1", "federation.min_sites=1")
    with pytest.raises(QuorumError, match="site_empty") as caught:
        serve([{"site-config": str(site)}], words(index, tmp_path / "run", *more))
    assert "DOE" not in str(caught.value)
    assert "EmptySiteError" in (tmp_path / "state" / "client.log").read_text()
    site.write_text("name: [")
    with pytest.raises(FederationError, match="1 x config") as caught:
        serve([{"site-config": str(site)}], words(index, tmp_path / "run2", *more))
    assert str(tmp_path) not in str(caught.value)
    assert "site.yaml" in (tmp_path / "client.log").read_text()


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"run_key": "../../../etc"}, "config"),
        ({"run_key": "ABC"}, "config"),
        ({"round": 0}, "config"),
        ({"round": 3}, "config"),
        ({"proximal_mu": -1.0}, "config"),
        ({"site": "elsewhere"}, "config"),
        ({}, "payload_size"),
    ],
)
def test_orders_of_a_hostile_server_are_refused(tmp_path, change, code):
    from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

    from client.app import app
    from server.conversation import ask, status_of
    from sparsecontrast.overrides import join
    from tests.federations import partitions

    index = write_images(tmp_path / "images", {"x": 4})
    told = join(words(index, tmp_path / "run", "federation.sites=1", "federation.min_sites=1"))
    orders = {
        "overrides": told,
        "site": "x",
        "round": 1,
        "rounds": 2,
        "run_key": "0" * 32,
        "proximal_mu": 0.0,
    }
    torn = Array("float32", (9,), "numpy.ndarray", b"torn")
    content = RecordDict({"config": ConfigRecord({**orders, **change}), "manifest": ConfigRecord({}),
                          "arrays": ArrayRecord({"flat": torn})})  # fmt: skip
    answers = ask(DirectGrid(partitions(1), app), {"x": (10, content)}, "train", 30, "1")
    assert status_of(answers.replies["x"])[1] == code
    assert not list(tmp_path.rglob("round_*"))


@pytest.mark.parametrize("spelling", ["backbone.pretrained={0}", "++backbone.pretrained={0}",
                                      "backbone={{pretrained: {0}}}"])  # fmt: skip
@pytest.mark.parametrize("pinned", [False, True])
def test_a_server_cannot_ask_which_files_lie_at_a_site(tmp_path, monkeypatch, spelling, pinned):
    import os

    import yaml

    site, index = tmp_path / "site.yaml", write_images(tmp_path / "images", {"x": 5})
    own = [assign("data.index", index), "data.min_images=2", *(MODEL[:3] if pinned else ())]
    site.write_text(yaml.safe_dump({"name": "x", "state_dir": str(tmp_path / "state"), "overrides": own}))
    secret, looked, real = tmp_path / "secret.safetensors", [], os.stat
    secret.write_bytes(b"no weights")
    monkeypatch.setattr(os, "stat", lambda path, *a, **k: looked.append(str(path)) or real(path, *a, **k))
    rounds = []
    for path in (secret, tmp_path / "missing.safetensors", "/etc/passwd", "true"):
        told = [w for w in words(index, tmp_path / "run") if not w.startswith(("data.", "output_dir"))]
        rounds.append(answers_of(site, [*told, spelling.format(path)]))
    assert rounds[0][0]["status"] == rounds[0][1]["status"] == "ok"
    assert all(found == rounds[0] for found in rounds[1:])
    assert not {p for p in looked if "secret" in p or "missing" in p or "passwd" in p}
    assert secret.is_file() and str(secret) in looked  # the spy would have seen it


def answers_of(site, told):
    """What a site says to a greeting and to a first round's orders: status records, without the times."""
    from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

    from client.app import app
    from server.conversation import ask
    from sparsecontrast.config import compose
    from sparsecontrast.methods import build_method
    from sparsecontrast.overrides import join

    method = build_method(compose(list(MODEL)))
    state, allowed = method.state_dict(), method.shared_parameters()
    start = payload.pack({n: state[n] for n in allowed}, allowed, "fp32")
    array = Array(str(start.flat.dtype), start.flat.shape, "numpy.ndarray", payload.to_npy(start.flat))
    orders = {"round": 1, "rounds": 2, "run_key": "0" * 32, "proximal_mu": 0.0, "overrides": join(told)}
    content = {"manifest": ConfigRecord(start.manifest), "arrays": ArrayRecord({"flat": array})}
    grid, found = DirectGrid([{"site-config": str(site)}], app), []
    for action, more in (("query.hello", {}), ("train", content)):
        message = RecordDict({"config": ConfigRecord({**orders, "site": "x"}), **more})
        reply = ask(grid, {"x": (10, message)}, action, 60, "1").replies["x"]
        found.append(dict(reply.config_records["status"]))
    return found
