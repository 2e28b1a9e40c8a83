"""Labs that train one classifier together: through the same apps, on pictures that stay where they are."""

import dataclasses
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from flwr.app import Array, ArrayRecord, ConfigRecord
from flwr.clientapp import ClientApp
from PIL import Image

from client import site as sites
from client.app import hello
from client.app import train as honest
from client.guard import guard
from server.verification import Expectation, read_reply
from sparsecontrast import checkpoint, payload
from sparsecontrast.classify.cells import Split, class_weights, load_cells, split_cells, training_rows
from sparsecontrast.classify.federation import as_classify
from sparsecontrast.classify.fit import fit
from sparsecontrast.classify.lab import LabTrainer, build_network
from sparsecontrast.cli import main
from sparsecontrast.config import compose
from sparsecontrast.egress import EgressLog
from sparsecontrast.errors import CheckpointError, ConfigError, FederationError, PayloadError, PrivacyError
from sparsecontrast.federated import cells as kind
from sparsecontrast.federated import compose_run
from sparsecontrast.overrides import assign
from sparsecontrast.part_round import PartRound
from sparsecontrast.release import COUNTS, PLAIN
from sparsecontrast.trainer import derive_seed
from tests.cell_files import CLASSES, draw_cell, write_cells
from tests.federations import DirectGrid, partitions, rows, serve
from tests.test_leaves import messages

MODEL = (
    "experiment=cells", "cells.classes=[disc,ring]", "train.image_size=32", "train.batch_size=8",
    "train.local_epochs=1", "method.width=16", "method.heads=2", "federation.rounds=2",
    "federation.connect_timeout=60", "evaluation.bootstrap=20", "evaluation.overlays=2",
)  # fmt: skip
ALONE = ("federation.sites=1", "federation.min_sites=1", "federation.rounds=1", "cells.train_labs=[grey]")


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr("server.conversation.SETTLE_SECONDS", 0.0)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_cells(tmp_path_factory.mktemp("cells") / "drawn", rare=2)


def told(root, out, *more):
    return [*MODEL, assign("cells.root", root), assign("output_dir", out), *more]


@pytest.fixture(scope="module")
def run(pictures, tmp_path_factory):
    """Two labs, two rounds, and what they sent."""
    out = tmp_path_factory.mktemp("run") / "out"
    grid = serve(partitions(2), told(pictures, out))
    return out, grid.sent


def weights(folder, number=2):
    return checkpoint.round_file(folder, number).read_bytes()


def lab(folder, name, root=None, *more):
    """A lab's own file; its pictures lie below its folder, or nowhere."""
    told = {
        "name": name, "state_dir": str(folder / name / "state"),
        "overrides": [*([assign("cells.root", root)] if root else []), *more],
    }  # fmt: skip
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / "site.yaml").write_text(yaml.safe_dump(told))
    return {"site-config": str(folder / name / "site.yaml")}


def one_lab(folder, lab_name, *kinds):
    """Write the pictures of one lab, of some kinds."""
    (folder / "images").mkdir(parents=True)
    found = []
    for kind_of_cell in kinds:
        for i in range(10):
            path = f"images/{kind_of_cell}_{i}.png"
            drawn = draw_cell("disc" if kind_of_cell == "blast" else kind_of_cell, lab_name, i)
            Image.fromarray(drawn).save(folder / path)
            found.append({"path": path, "label": kind_of_cell, "site": lab_name, "group_id": path})
    pd.DataFrame(found).to_csv(folder / "index.csv", index=False)
    return folder


# ---- what a run is


def test_two_labs_train_one_classifier_and_the_chain_of_rounds_is_whole(run):
    out, _ = run
    found = rows(out)
    assert [(r["round"], r["site"]) for r in found] == [
        (n, name) for n in (1, 2) for name in ("grey", "yellow", None)
    ]
    read = [checkpoint.read_round(out, number) for number in range(3)]
    for before, after in zip(read, read[1:], strict=False):
        assert after.meta["parent"] == checkpoint.weights_sha256(before.meta)
        assert any(not torch.equal(before.tensors[n], t) for n, t in after.tensors.items())
    assert read[0].tensors.keys() == build_network(compose_run(list(MODEL))).state_dict().keys()
    assert [r["state_round"] for r in found if r["site"]] == [0, 0, 1, 1]
    assert all(0 < r["keep"] <= 0.15 for r in found if r["site"])  # k stays at its ceiling
    assert len({r["keep"] for r in found if r["site"]}) == 1


def test_the_same_run_twice_gives_the_same_bytes(run, pictures, tmp_path):
    serve(partitions(2), told(pictures, tmp_path / "again"))
    assert weights(tmp_path / "again") == weights(run[0])


def test_one_node_that_serves_both_labs_gives_the_same_bytes(run, pictures, tmp_path):
    serve(partitions(1), told(pictures, tmp_path / "again"))
    assert weights(tmp_path / "again") == weights(run[0])


def test_a_run_stopped_after_round_one_and_resumed_ends_with_the_same_bytes(run, pictures, tmp_path):
    class Stopped(BaseException):
        """The power goes off."""

    class Doomed(DirectGrid):
        def push_messages(self, messages):
            if messages[0].metadata.group_id == "2":
                raise Stopped
            return super().push_messages(messages)

    with pytest.raises(Stopped):
        serve(partitions(2), told(pictures, tmp_path / "cut"), kind=Doomed)
    assert checkpoint.latest(tmp_path / "cut") == 1
    serve(partitions(2), [f"resume={tmp_path / 'cut'}"])
    assert weights(tmp_path / "cut") == weights(run[0])


@pytest.mark.parametrize("strategy", ["fedadam", "fedprox"])
def test_any_configured_strategy_joins_the_labs(run, pictures, tmp_path, strategy):
    more = (f"federation.strategy={strategy}", "federation.proximal_mu=1.0", "federation.weighting=uniform")
    serve(partitions(2), told(pictures, tmp_path / strategy, *more))
    assert checkpoint.latest(tmp_path / strategy) == 2
    assert weights(tmp_path / strategy) != weights(run[0])


# ---- what a lab computes


def test_one_round_of_one_lab_is_one_epoch_of_the_training_on_one_machine(pictures, tmp_path):
    """The same steps by ``classify.fit``, which knows no federation: the same weights, bit for bit."""
    words = told(pictures, tmp_path / "out", *ALONE, "train.batch_size=6")
    serve(partitions(1), words)
    config = compose_run(words)
    cells = load_cells(config.cells, 32, config.classes)
    own = training_rows(cells, config.cells, config.seed)
    assert set(cells.labs[own]) == {"grey"} and len(own) > 2 * config.train.batch_size
    network = build_network(config)
    network.class_weights = class_weights(cells.labels[own], 2, config.train.balance)
    fit(network, cells, Split(own, own[:4], own[:4]), as_classify(config).train, derive_seed(0, "grey", 1))
    found = checkpoint.read_round(tmp_path / "out", 1).tensors
    assert found.keys() == network.state_dict().keys()
    assert all(torch.equal(found[name], value) for name, value in network.state_dict().items())


def test_a_round_that_was_killed_in_its_middle_ends_with_the_same_weights(pictures, tmp_path):
    config = compose_run(told(pictures, tmp_path))
    cells = load_cells(config.cells, 32, config.classes)

    class Killed(BaseException):
        """The power goes off."""

    def trained(part=None):
        network = build_network(config)
        trainer = LabTrainer(network, config, "grey", cells.labels)
        result = trainer.run(cells.images, cells.labels, 1, 2, part=part)
        return network.state_dict(), result.metrics

    class Doomed(PartRound):
        def keep(self, told, local, generator):
            super().keep(told, local, generator)
            if len(told["loss"]) == 3:
                raise Killed

    path = tmp_path / "part.safetensors"
    with pytest.raises(Killed):
        trained(Doomed(path, every=0.0))
    (whole, said), (resumed, said_again) = trained(), trained(PartRound(path, every=1e9))
    assert path.exists() and said == said_again
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_pixels_of_held_out_groups_are_never_trained_on(run, pictures, tmp_path):
    """Other pixels there change nothing, one other pixel where it trains does."""
    config = compose_run(told(pictures, tmp_path))
    cells = load_cells(config.cells, 32, config.classes)
    split = split_cells(cells, config.cells, config.seed)
    held = set(cells.groups[split.test])
    for name, touched in (("held", held), ("trained", {cells.groups[split.train[0]]})):
        root = tmp_path / name
        shutil.copytree(pictures, root)
        table = pd.read_csv(root / "index.csv")
        chosen = table[table["group_id"].isin(touched)]
        assert len(chosen) >= len(touched) > 0
        for path in chosen["path"]:
            Image.fromarray(np.full((32, 32, 3), 7, np.uint8)).save(root / path)
        serve(partitions(2), told(root, tmp_path / f"run-{name}"))
    assert weights(tmp_path / "run-held") == weights(run[0])
    assert weights(tmp_path / "run-trained") != weights(run[0])


def test_a_lab_without_one_class_trains_and_pictures_of_others_are_left_out_with_a_count(tmp_path):
    nodes = [
        lab(tmp_path, "north", one_lab(tmp_path / "n", "grey", "disc", "ring")),
        lab(tmp_path, "south", one_lab(tmp_path / "s", "yellow", "disc", "blast")),
    ]
    serve(nodes, [*MODEL, assign("output_dir", tmp_path / "out")])
    last = rows(tmp_path / "out")[-1]
    assert last["contributors"] == ["north", "south"] and not last["refused"]
    log = (tmp_path / "south" / "state" / "client.log").read_text()
    assert "10 picture(s) left out: class blast: none of this run's" in log
    listed = pd.read_csv(tmp_path / "south" / "state" / "quarantine.csv")
    assert len(listed) == 10 and set(listed["reason"]) == {"class blast: none of this run's"}
    assert {r["site"]: r["num_examples"] for r in rows(tmp_path / "out") if r["site"]} == {
        "north": 14, "south": 7,
    }  # fmt: skip


# ---- what leaves a lab, and what may not


def test_no_count_of_a_class_no_path_and_no_name_of_a_picture_leaves(run, pictures):
    _, sent = run
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


def test_every_answer_stands_in_the_labs_own_log(run):
    out, _ = run
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


# ---- what comes of it


@pytest.fixture(scope="module")
def judged(pictures, tmp_path_factory):
    from simulation import run as simulation

    out = tmp_path_factory.mktemp("simulated") / "out"
    return simulation.run(told(pictures, out, "federation.workers=1"))


def test_the_simulation_ends_with_scores_of_each_lab_and_a_report(judged, run):
    assert weights(judged) == weights(run[0])  # worker processes change nothing
    found = json.loads((judged / "evaluation.json").read_text())
    assert [one["lab"] for one in found["tested"]] == ["all", "grey", "yellow"]
    assert set(found["local_only"]) == {"grey", "yellow"}
    for tested in (found["tested"], *found["local_only"].values()):
        for one in tested:
            assert one["macro_f1"]["low"] <= one["macro_f1"]["value"] <= one["macro_f1"]["high"]
    page = (judged / "report.html").read_text()
    assert "2 rounds of fedavg" in page and "Beside each lab alone" in page
    assert page.count("data:image/jpeg;base64,") == 3 * 2
    assert "class rare: none of this run&#39;s" in page


def test_evaluate_reads_the_folder_again_and_its_data_may_lie_elsewhere(judged, pictures, tmp_path, capsys):
    before = (judged / "evaluation.json").read_bytes()
    assert main(["classify", "evaluate", str(judged)]) == 0
    assert (judged / "evaluation.json").read_bytes() == before
    moved = shutil.copytree(pictures, tmp_path / "moved")
    assert main(["classify", "evaluate", str(judged), assign("cells.root", moved)]) == 0
    assert (judged / "evaluation.json").read_bytes() == before
    assert main(["classify", "evaluate", str(judged), "cells.classes=[disc,rare]"]) == 0
    assert json.loads((judged / "evaluation.json").read_text())["classes"] == list(CLASSES)
    assert main(["evaluate", str(judged)]) == 2
    assert "`sparsecontrast classify evaluate`" in capsys.readouterr().err


def test_a_lab_alone_ends_where_a_federation_of_it_alone_would(judged, pictures, tmp_path):
    serve(partitions(1), told(pictures, tmp_path / "out", *ALONE[:2], "cells.train_labs=[grey]"))
    alone = checkpoint.read_tensors(judged / "local_only" / "grey.safetensors")
    found = checkpoint.read_round(tmp_path / "out", 2).tensors
    assert all(torch.equal(found[name], value) for name, value in alone.items())


def test_a_run_of_another_method_is_not_judged_as_cells(judged, tmp_path):
    from sparsecontrast.classify.run import read_trained

    folder = shutil.copytree(judged, tmp_path / "run")
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    saved["method"]["name"] = "miram"
    (folder / "config.yaml").write_text(yaml.safe_dump(saved))
    with pytest.raises(ConfigError, match="a federation of another method"):
        read_trained(folder)
    saved["method"] |= {"name": "sparse_attn_net", "width": 32}
    (folder / "config.yaml").write_text(yaml.safe_dump(saved))
    with pytest.raises(CheckpointError, match="weights of another network"):
        read_trained(folder)


def test_fewer_labs_than_sites_is_said_before_anyone_trains(pictures, tmp_path):
    from simulation import run as simulation

    with pytest.raises(ConfigError, match=r"there are 2 lab\(s\): grey, yellow"):
        simulation.run(told(pictures, tmp_path / "out", "federation.sites=3"))


def test_a_worker_reads_the_pictures_once(pictures, tmp_path, monkeypatch):
    reads = []
    real = load_cells
    monkeypatch.setattr(
        "sparsecontrast.classify.cells.load_cells", lambda *a, **k: reads.append(1) or real(*a, **k)
    )
    kind._pictures.clear()
    serve(partitions(2), told(pictures, tmp_path / "out"))
    assert len(reads) == 1
