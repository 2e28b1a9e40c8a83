"""What leaves a lab that trains with others, what may not, and who decides."""

import dataclasses

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord
from flwr.clientapp import ClientApp

from client import site as sites
from client.app import hello
from client.app import train as honest
from client.guard import guard
from server.verification import Expectation, read_reply
from sparsecontrast import checkpoint, payload
from sparsecontrast.classify.lab import LabTrainer, build_network
from sparsecontrast.config import compose
from sparsecontrast.egress import EgressLog
from sparsecontrast.errors import ConfigError, FederationError, PayloadError, PrivacyError
from sparsecontrast.federated import compose_run
from sparsecontrast.overrides import assign
from sparsecontrast.release import COUNTS, PLAIN
from tests.cell_files import CLASSES
from tests.federations import partitions, rows, serve
from tests.labs import ALONE, MODEL, lab, one_lab, told
from tests.test_leaves import messages

pytestmark = pytest.mark.usefixtures("impatient")


def test_no_count_of_a_class_no_path_and_no_name_of_a_picture_leaves(two_labs, pictures):
    _, sent = two_labs
    trained = [m for m in messages(sent) if m.content.array_records]
    assert len(trained) == 4
    for message in trained:
        told = set(message.content.metric_records["metrics"])
        assert {"loss", "num-examples"} <= told <= {*PLAIN, *COUNTS}
        names = message.content.config_records["manifest"]["names"]
        assert all(name.startswith(("backbone.", "saliency.")) for name in names)
    for data in sent:
        for word in (str(pictures), ".png", "disc", "ring", "grey-", "class"):
            assert word.encode() not in data


def test_every_answer_stands_in_the_labs_own_log(two_labs):
    out, _ = two_labs
    kinds = [row.kind for row in EgressLog(out / "sites" / "grey").rows()]
    assert kinds.count("train") == 2 and set(kinds) <= {"hello", "train"}


def other_name(content):
    manifest = content["manifest"]
    names = ["backbone.pictures", *manifest["names"][1:]]
    content["manifest"] = ConfigRecord({**manifest, "names": names})


def other_shape(content):
    manifest, flat = content["manifest"], content["arrays"]["flat"].numpy()[:-1]
    content["arrays"] = ArrayRecord({"flat": Array(flat)})
    content["manifest"] = ConfigRecord({**manifest, "shapes": [*manifest["shapes"][:-1], "1"]})


@pytest.mark.parametrize("lie", [other_name, other_shape])
def test_an_answer_of_another_name_or_shape_is_held_back_and_would_be_refused(pictures, tmp_path, lie):
    spoilt = []
    app = ClientApp(mods=[guard])
    app.query("hello")(hello)

    @app.train()
    def train(message, context):
        reply = honest(message, context)
        lie(reply.content)
        spoilt.append((message, reply.content))
        return reply

    out = tmp_path / "out"
    with pytest.raises(FederationError, match="egress"):
        serve(partitions(1), told(pictures, out, *ALONE), app)
    assert "held back: egress" in (out / "sites" / "grey" / "client.log").read_text()
    ((message, content),) = spoilt
    shapes = {n: tuple(t.shape) for n, t in checkpoint.read_round(out, 0).tensors.items()}
    orders = message.content.config_records["config"]
    sent = payload.from_npy(message.content.array_records["arrays"]["flat"].data)
    expected = Expectation(1, str(orders["run_key"]), shapes, "fp32", "weights", sent, 10.0)
    with pytest.raises(PayloadError) as refused:
        read_reply("grey", content, expected)
    assert refused.value.reason in ("names", "shape", "size")


# ---- who decides


def test_the_labs_file_wins_over_the_servers_word_on_pictures_and_its_log_says_so(pictures, tmp_path):
    own = one_lab(tmp_path / "pictures", "grey", "disc", "ring")
    node = lab(tmp_path, "north", own, "cells.test_fraction=0.5")
    words = [*MODEL, assign("cells.root", "/secret"), "cells.test_fraction=0", *ALONE[:3]]
    (found,) = sites.resolve(node, " ".join(words))
    assert found.config.cells.root == str(own) and found.config.cells.test_fraction == 0.5
    assert found.config.classes == CLASSES  # the size of the network is the run's
    assert found.unheard == ("cells.root", "cells.test_fraction")
    serve([node], [*words, assign("output_dir", tmp_path / "out")])
    assert [r["num_examples"] for r in rows(tmp_path / "out") if r["site"]] == [10]
    log = (tmp_path / "north" / "state" / "client.log").read_text()
    assert "refused from the server, this site's own file decides" in log
    assert "'cells.root', 'cells.test_fraction'" in log


def test_a_lab_that_names_no_pictures_takes_none_that_the_server_names(pictures, tmp_path):
    node = lab(tmp_path, "north")
    with pytest.raises(FederationError):
        serve([node], told(pictures, tmp_path / "out", *ALONE[:3]))
    assert "cells.root: not set" in (tmp_path / "north" / "state" / "client.log").read_text()


def test_one_file_of_a_site_serves_both_kinds_of_runs(images, pictures, tmp_path):
    node = lab(tmp_path, "both", pictures, assign("data.index", images))
    (pretrains,), (classifies,) = (sites.resolve(node, words) for words in ("", " ".join(MODEL)))
    assert pretrains.config.data.index == str(images) and not hasattr(pretrains.config, "cells")
    assert classifies.config.cells.root == str(pictures) and not hasattr(classifies.config, "data")


def test_a_labs_file_may_not_choose_the_classes(pictures, tmp_path):
    node = lab(tmp_path, "north", pictures, "cells.classes=[disc,blast]")
    with pytest.raises(ConfigError, match="of the run, not of a site"):
        sites.resolve(node, " ".join(MODEL))


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("cells.classes=[]", r"cells\.classes=\[\]: labs may not choose their own"),
        ("cells.classes=[disc,disc]", "name at least two"),
        ("federation.partition=iid", "the sites of pictures are labs"),
        ("federation.min_sites=3", "must be in 1..federation.sites=2"),
        ("train.local_epochs=0", "train.local_epochs=0"),
        ("train.image_size=30", "must be a multiple of method.patch=4"),
        ("data=csv", r"unknown \['data'\]"),
        ("train.crop_area=[1,1]", "unknown"),
        ("audit.canaries=0.5", r"unknown \['audit'\]"),
    ],
)
def test_what_cannot_be_is_refused_with_what_to_do(word, says):
    with pytest.raises(ConfigError, match=says):
        compose_run([*MODEL, word])


def test_without_its_experiment_the_method_is_pointed_to_its_commands():
    for composed in (compose, compose_run):
        with pytest.raises(ConfigError, match="a federation with experiment=cells"):
            composed("method=sparse_attn_net")
    with pytest.raises(ConfigError, match=r"unknown \['cells'\]"):
        compose("cells.root=/pictures")


def test_privacy_is_refused_and_never_trained_without(pictures, tmp_path):
    private = ("privacy=dp_sgd", "privacy.planned_rounds=2")
    with pytest.raises(PrivacyError, match="not built for method=sparse_attn_net"):
        serve(partitions(2), told(pictures, tmp_path / "run", *private))
    config = compose_run(told(pictures, tmp_path))
    asked = dataclasses.replace(config, privacy=compose_run(told(pictures, tmp_path, *private)).privacy)
    with pytest.raises(PrivacyError):
        LabTrainer(build_network(config), asked, "grey", torch.tensor([0, 1]))
    node = lab(tmp_path, "north", pictures, *private)
    with pytest.raises(FederationError, match="privacy"):
        serve([node], told(pictures, tmp_path / "out", *ALONE[:3]))
    log = (tmp_path / "north" / "state" / "client.log").read_text()
    assert "not built for method=sparse_attn_net" in log
    assert [row.kind for row in EgressLog(tmp_path / "north" / "state").rows()] == ["hello"]


@pytest.mark.parametrize("epsilon", ["8", "null"])
def test_weights_of_a_private_lab_are_held_back_even_if_they_were_trained(
    pictures, tmp_path, monkeypatch, epsilon
):
    monkeypatch.setattr("sparsecontrast.classify.lab.refuse_privacy", lambda config: None)
    node = lab(tmp_path, "north", pictures, "privacy=dp_sgd", f"privacy.target_epsilon={epsilon}")
    with pytest.raises(FederationError, match="egress"):
        serve([node], told(pictures, tmp_path / "out", *ALONE[:3]))
    assert "no ledger holds a charge" in (tmp_path / "north" / "state" / "client.log").read_text()
