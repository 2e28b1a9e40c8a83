import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from sparsecontrast.classify import scores
from sparsecontrast.classify.augment import augment, normalise
from sparsecontrast.classify.cells import class_weights, load_cells, split_cells
from sparsecontrast.classify.fit import fit
from sparsecontrast.classify.run import build, read_trained
from sparsecontrast.classify.settings import compose_classify
from sparsecontrast.cli import main
from sparsecontrast.errors import ConfigError, EmptySiteError, IndexSchemaError, MissingDataError
from sparsecontrast.methods.sparse_attn_net import Labelled
from tests.cell_files import CLASSES, WORDS, write_cells


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_cells(tmp_path_factory.mktemp("cells") / "drawn", rare=3)


@pytest.fixture(scope="module")
def run_dir(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "one"
    assert main(["classify", "train", *WORDS, f"cells.root={folder}", f"output_dir={out}"]) == 0
    return out


def configured(folder, *words):
    return compose_classify([*WORDS, f"cells.root={folder}", *words])


def test_pictures_come_in_colour_with_class_lab_and_group(folder):
    cells = load_cells(configured(folder).cells, 32)
    assert cells.classes == CLASSES and len(cells) == 48
    row = cells.labs.tolist().index("grey")
    path = folder / "images" / "grey_disc_0.png"
    assert np.array_equal(cells.images[row].permute(1, 2, 0).numpy(), np.asarray(Image.open(path)))
    assert cells.groups[row] == "grey-disc-0"
    assert cells.left_out["reason"].tolist() == ["class rare: 3 pictures, too few"] * 3


def test_a_damaged_picture_is_left_out_with_its_reason(tmp_path):
    root = write_cells(tmp_path / "cells", each=5)
    (root / "images" / "grey_ring_2.png").write_bytes(b"no picture")
    (root / "images" / "grey_ring_3.png").unlink()
    cells = load_cells(configured(root, "cells.min_images=2").cells, 32)
    assert len(cells) == 18
    assert dict(cells.left_out.itertuples(index=False, name=None)) == {
        "images/grey_ring_2.png": "damaged file (UnidentifiedImageError)",
        "images/grey_ring_3.png": "no such file",
    }


def test_folders_of_classes_as_bccd_has_them(tmp_path):
    for kind in ("EOSINOPHIL", "NEUTROPHIL"):
        (tmp_path / kind).mkdir()
        for i in range(6):
            Image.new("RGB", (20, 16), (i, 2, 3)).save(tmp_path / kind / f"_{i // 2}_{i}.jpeg")
    words = ["cells=bccd", f"cells.root={tmp_path}", "cells.min_images=2", r"cells.group_pattern='_(\d+)_'"]
    cells = load_cells(compose_classify(words).cells, 16)
    assert cells.classes == ("EOSINOPHIL", "NEUTROPHIL") and cells.images.shape == (12, 3, 16, 16)
    assert sorted(set(cells.groups)) == ["0", "1", "2"] and set(cells.labs) == {"bccd"}


@pytest.mark.parametrize("seed", range(4))
def test_no_group_stands_in_two_parts_and_every_class_and_lab_in_each(folder, seed):
    config = configured(folder)
    cells = load_cells(config.cells, 32)
    split = split_cells(cells, config.cells, seed)
    parts = [set(cells.groups[rows]) for rows in vars(split).values()]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    assert sum(map(len, vars(split).values())) == len(cells)
    for rows in vars(split).values():
        strata = {(cells.labs[r], int(cells.labels[r])) for r in rows.tolist()}
        assert len(strata) == 4
    assert len(split.test) == pytest.approx(0.3 * 48, abs=4)


def test_another_lab_is_tested_whole_and_never_trained_on(folder):
    config = configured(folder, "cells.train_labs=[yellow]", "cells.test_labs=[grey]")
    cells = load_cells(config.cells, 32)
    split = split_cells(cells, config.cells, 0)
    assert set(cells.labs[split.train]) == set(cells.labs[split.val]) == {"yellow"}
    assert len(split.test) == 24 and set(cells.labs[split.test]) == {"grey"}
    assert len(split.train) + len(split.val) == 24


def test_seeds_split_differently_and_one_seed_always_the_same(folder):
    config = configured(folder)
    cells = load_cells(config.cells, 32)
    first, again, other = (split_cells(cells, config.cells, seed).test for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize(
    ("words", "error", "says"),
    [
        (["cells.root=null"], MissingDataError, r"cells\.root=FOLDER"),
        (["cells.root=/nowhere"], MissingDataError, "no such folder"),
        (["cells.index=no.csv"], MissingDataError, "no such table"),
        (["cells.lab=hospital"], IndexSchemaError, r"cells\.lab=hospital; it has path"),
        (["cells.classes=[disc,blast]"], ConfigError, "no picture of blast; there are"),
        (["cells.min_images=40"], EmptySiteError, "0 classes"),
        (["cells.layout=folders", "cells.group_pattern='('"], ConfigError, "not a regular expression"),
        (["cells.test_labs=[mars]"], ConfigError, "no lab 'mars' among grey, yellow"),
        (["cells.test_fraction=0"], EmptySiteError, "no picture for test"),
        (["method.share_floor=0.2"], ConfigError, r"must not lie above method\.share=0\.15"),
        (["train.image_size=30"], ConfigError, r"a multiple of method\.patch=4"),
        (["method.width=18", "method.heads=4"], ConfigError, "a multiple of method.heads=4"),
    ],
)
def test_what_cannot_be_is_refused_with_what_to_do(folder, words, error, says):
    with pytest.raises(error, match=says):
        config = configured(folder, *words)
        split_cells(load_cells(config.cells, 32), config.cells, 0)


def test_class_weights_even_out_the_classes():
    labels = torch.tensor([0] * 90 + [1] * 10)
    assert torch.equal(class_weights(labels, 2, 0.0), torch.ones(2))
    whole = class_weights(labels, 2, 1.0)
    assert whole[0] * 90 == pytest.approx(float(whole[1] * 10))
    assert class_weights(labels, 3, 0.5).isfinite().all()
    half = class_weights(labels, 2, 0.5)
    assert float((half[labels]).mean()) == pytest.approx(1) and float(half[1] / half[0]) == pytest.approx(3)


def test_augmentation_is_the_generators_and_keeps_the_range(folder):
    images = load_cells(configured(folder).cells, 32).images[:8]

    def again(seed: int) -> torch.Tensor:
        return augment(images, 1.0, torch.Generator().manual_seed(seed))

    assert torch.equal(again(0), again(0)) and not torch.equal(again(0), again(1))
    assert again(0).min() >= 0 and again(0).max() <= 1


def test_without_colour_strength_only_the_geometry_changes():
    flat = torch.full((4, 3, 16, 16), 120, dtype=torch.uint8)
    still = augment(flat, 0.0, torch.Generator().manual_seed(0))
    assert torch.allclose(still, torch.full_like(still, 120 / 255), atol=1e-5)
    assert augment(flat, 1.0, torch.Generator().manual_seed(0)).std() > 0.01
    assert torch.allclose(normalise(flat), (torch.tensor(120 / 255) - 0.6) / 0.25)


def test_macro_f1_and_accuracy_against_scikit_learn():
    from sklearn.metrics import accuracy_score, f1_score

    draw = np.random.default_rng(0)
    labels, said = draw.integers(0, 4, 200), draw.integers(0, 4, 200)
    assert scores.macro_f1(labels, said, 4) == pytest.approx(f1_score(labels, said, average="macro"))
    assert scores.accuracy(labels, said, 4) == accuracy_score(labels, said)
    # a class that is neither there nor said is not a class of this test
    assert scores.macro_f1(labels[labels < 3], labels[labels < 3], 4) == 1.0


def test_the_interval_is_wider_when_groups_hold_more_pictures():
    draw = np.random.default_rng(0)
    labels = np.repeat(draw.integers(0, 2, 100), 4)
    said = np.where(np.repeat(draw.random(100) < 0.8, 4), labels, 1 - labels)
    alone = scores.bootstrap(scores.accuracy, labels, said, np.arange(400), 2, 400, 0)
    grouped = scores.bootstrap(scores.accuracy, labels, said, np.repeat(np.arange(100), 4), 2, 400, 0)
    assert grouped.high - grouped.low > 1.5 * (alone.high - alone.low)
    assert grouped.low < grouped.value < grouped.high


def test_a_run_folder_is_whole_and_reads_back_what_was_trained(run_dir, folder):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [(row["pass"], row["epoch"]) for row in rows] == [
        (name, epoch) for name in ("search", "refit") for epoch in (1, 2, 3, 4)
    ]
    assert {"loss", "held_out_loss", "held_out_accuracy", "k", "lr"} <= rows[0].keys()
    found = json.loads((run_dir / "evaluation.json").read_text())
    assert [one["lab"] for one in found["tested"]] == ["all", "grey", "yellow"]
    assert found["pixel_share"] <= 0.15
    whole = found["tested"][0]
    assert whole["macro_f1"]["low"] <= whole["macro_f1"]["value"] <= whole["macro_f1"]["high"]
    assert np.trace(whole["confusion"]) / whole["images"] == pytest.approx(whole["accuracy"]["value"])
    before = (run_dir / "evaluation.json").read_bytes()
    assert main(["classify", "evaluate", str(run_dir)]) == 0
    assert (run_dir / "evaluation.json").read_bytes() == before


def test_the_same_seed_gives_the_same_weights(run_dir, folder, tmp_path):
    words = [*WORDS, f"cells.root={folder}", f"output_dir={tmp_path / 'two'}"]
    assert main(["classify", "train", *words]) == 0
    same, again = (json.loads((f / "model.json").read_text()) for f in (run_dir, tmp_path / "two"))
    assert same["sha256"] == again["sha256"]


def test_the_report_names_the_cells_and_no_path(run_dir, folder):
    page = (run_dir / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 3 * 5
    assert str(folder) not in page and "grey_disc" not in page and "<script" not in page
    assert not re.search(r"https?://", page)
    assert "chosen by a coarse look at all</h1>" in page and "framed in zeros" not in page
    assert "a new network was trained with that share on all" in page
    assert "class rare: 3 pictures, too few" in page and "% of the pixels" in page


@pytest.mark.parametrize("suffix", ["model.safetensors", "config.yaml", "model.json"])
def test_a_torn_run_is_refused(run_dir, tmp_path, suffix, capsys):
    for file in run_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    torn = tmp_path / suffix
    torn.write_bytes(torn.read_bytes()[:-40] + b"\x00")
    assert main(["classify", "evaluate", str(tmp_path)]) == 2
    assert "torn" in capsys.readouterr().err


def test_a_second_run_does_not_overwrite_the_first(run_dir, folder, capsys):
    words = [*WORDS, f"cells.root={folder}", f"output_dir={run_dir}"]
    assert main(["classify", "train", *words]) == 2
    assert "already holds a run" in capsys.readouterr().err


def test_training_ends_when_the_held_out_loss_no_longer_falls(folder):
    config = configured(folder, "train.epochs=30", "train.patience=2", "train.lr=1e-12", "train.ema=0")
    cells = load_cells(config.cells, 32)
    split = split_cells(cells, config.cells, 0)
    done = fit(build(config, cells, split.train), cells, split, config.train, 0)
    assert len(done.rows) < 30 and len(done.rows) == done.epoch + 2


def test_the_words_read_are_as_many_as_at_the_lowest_held_out_loss(run_dir):
    run = read_trained(run_dir)
    searched = [row for row in run.rows if row["pass"] == "search"]
    best = min(searched, key=lambda row: row["held_out_loss"])
    assert run.network.k == run.facts["k"] == best["k"]


def test_a_run_without_refit_keeps_the_best_epoch_and_says_so(folder, tmp_path):
    words = [*WORDS, f"cells.root={folder}", f"output_dir={tmp_path}", "train.refit=false"]
    assert main(["classify", "train", *words]) == 0
    run = read_trained(tmp_path)
    assert run.facts["epoch"] == 1 + int(np.argmin([row["held_out_loss"] for row in run.rows]))
    assert run.network.k == run.rows[run.facts["epoch"] - 1]["k"]
    assert (
        f"The weights kept are those of epoch {run.facts['epoch']}." in (tmp_path / "report.html").read_text()
    )


def test_a_run_of_before_there_was_a_choice_reads_as_it_was_trained(run_dir, folder, tmp_path):
    """Its configuration names neither ``refit`` nor ``border``: zeros lay around its coarse map."""
    words = [*WORDS, f"cells.root={folder}", f"output_dir={tmp_path}"]
    assert main(["classify", "train", *words, "train.refit=false", "method.border=zeros"]) == 0
    told = (tmp_path / "config.yaml").read_text()
    old = "".join(line for line in told.splitlines(True) if "refit" not in line and "border" not in line)
    assert old != told
    (tmp_path / "config.yaml").write_text(old)
    before = (tmp_path / "evaluation.json").read_bytes()
    assert main(["classify", "evaluate", str(tmp_path)]) == 0
    assert (tmp_path / "evaluation.json").read_bytes() == before
    assert "framed in zeros" in (tmp_path / "report.html").read_text()


class _Oracle(torch.nn.Module):
    """A reader that looks at dark words and knows nothing else."""

    def forward(self, words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(len(words), 2), (-3 * words[..., :48].mean(-1)).softmax(1)


def test_the_map_comes_to_ask_for_what_the_reader_looks_at(folder):
    """Taught by words of its own choice alone, the coarse map ends up asking for the dark cell."""
    config = configured(folder)
    cells = load_cells(config.cells, 32)
    split = split_cells(cells, config.cells, 0)
    network = build(config, cells, split.train)
    network.backbone = _Oracle()  # type: ignore[assignment]
    images, generator = normalise(cells.images), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(network.saliency.parameters(), lr=1e-2)

    def dark_share() -> float:
        dark = (cells.images[:, 1].float().reshape(-1, 8, 4, 8, 4) < 100).float().mean((2, 4)).flatten(1)
        return (dark.gather(1, network.look(images).kept).mean() / dark.mean()).item()

    before = dark_share()
    for _ in range(60):
        optimizer.zero_grad()
        network(Labelled(images, cells.labels, generator)).mean().backward()
        optimizer.step()
    assert before < 1.7 and dark_share() > 2.5  # times as dark as words drawn blindly
