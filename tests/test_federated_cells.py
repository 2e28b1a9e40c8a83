"""Labs that train one classifier together: through the same apps, on pictures that stay where they are."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image

from sparsecontrast import checkpoint
from sparsecontrast.classify.cells import Split, class_weights, load_cells, split_cells, training_rows
from sparsecontrast.classify.federation import as_classify
from sparsecontrast.classify.fit import fit
from sparsecontrast.classify.lab import LabTrainer, build_network
from sparsecontrast.cli import main
from sparsecontrast.errors import CheckpointError, ConfigError
from sparsecontrast.federated import cells as kind
from sparsecontrast.federated import compose_run
from sparsecontrast.overrides import assign
from sparsecontrast.part_round import PartRound
from sparsecontrast.trainer import derive_seed
from tests.cell_files import CLASSES
from tests.federations import DirectGrid, partitions, rows, serve
from tests.labs import ALONE, MODEL, lab, one_lab, told, weights

pytestmark = pytest.mark.usefixtures("impatient")

# ---- what a run is


def test_two_labs_train_one_classifier_and_the_chain_of_rounds_is_whole(two_labs):
    out, _ = two_labs
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


def test_the_same_run_twice_gives_the_same_bytes(two_labs, pictures, tmp_path):
    serve(partitions(2), told(pictures, tmp_path / "again"))
    assert weights(tmp_path / "again") == weights(two_labs[0])


def test_one_node_that_serves_both_labs_gives_the_same_bytes(two_labs, pictures, tmp_path):
    serve(partitions(1), told(pictures, tmp_path / "again"))
    assert weights(tmp_path / "again") == weights(two_labs[0])


def test_a_run_stopped_after_round_one_and_resumed_ends_with_the_same_bytes(two_labs, pictures, tmp_path):
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
    assert weights(tmp_path / "cut") == weights(two_labs[0])


@pytest.mark.parametrize("strategy", ["fedadam", "fedprox"])
def test_any_configured_strategy_joins_the_labs(two_labs, pictures, tmp_path, strategy):
    more = (f"federation.strategy={strategy}", "federation.proximal_mu=1.0", "federation.weighting=uniform")
    serve(partitions(2), told(pictures, tmp_path / strategy, *more))
    assert checkpoint.latest(tmp_path / strategy) == 2
    assert weights(tmp_path / strategy) != weights(two_labs[0])


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


def test_pixels_of_held_out_groups_are_never_trained_on(two_labs, pictures, tmp_path):
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
    assert weights(tmp_path / "run-held") == weights(two_labs[0])
    assert weights(tmp_path / "run-trained") != weights(two_labs[0])


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


# ---- what comes of it


@pytest.fixture(scope="module")
def judged(pictures, tmp_path_factory):
    from simulation import run as simulation

    out = tmp_path_factory.mktemp("simulated") / "out"
    return simulation.run(told(pictures, out, "federation.workers=1"))


def test_the_simulation_ends_with_scores_of_each_lab_and_a_report(judged, two_labs):
    assert weights(judged) == weights(two_labs[0])  # worker processes change nothing
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
