"""What a run may ask of a site's machine, and what is noted of words that the site does not hear."""

import pytest
import yaml

from client import site as sites
from sparsecontrast.errors import ConfigError, LimitError
from sparsecontrast.overrides import assign
from sparsecontrast.provision.plan import PlannedSite, site_yaml
from sparsecontrast.site_file import Limits, parse_site_file
from tests.federations import MODEL
from tests.labs import MODEL as CELLS
from tests.test_guard import site
from tests.test_server_words import greeted


def limited(folder, *more, **limits):
    node = site(folder, more=more)
    path = folder / "x" / "site.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"limits": limits}))
    return node


BEYOND = {
    "train.threads": (["train.threads=5"], {"threads": 4}),
    "train.batch_size": (["train.batch_size=9"], {"max_batch_size": 8}),
    "backbone.img_size": (["backbone.img_size=64"], {"max_image_size": 32}),
}


@pytest.mark.parametrize(("words", "limits"), BEYOND.values(), ids=BEYOND)
def test_a_run_that_asks_for_more_is_refused_and_the_log_says_for_what(tmp_path, words, limits):
    node, state = limited(tmp_path, **limits), tmp_path / "x" / "state"
    status = greeted(node, *MODEL, *words)
    assert (status["status"], status["code"]) == ("error", "limit")
    assert words[0] in (state / "client.log").read_text()
    (key, most), (_, _, least) = next(iter(limits.items())), words[0].partition("=")
    (tmp_path / "more").mkdir()
    assert greeted(limited(tmp_path / "more", **{key: int(least)}), *MODEL, *words)["status"] == "ok"
    assert most < int(least)


def test_limits_hold_where_the_file_says_nothing_and_null_lifts_them(tmp_path):
    node = site(tmp_path)
    for word in ("train.threads=512", "train.batch_size=100000000", "backbone.img_size=8192"):
        with pytest.raises(LimitError, match=word):
            sites.resolve(node, word)
        (tmp_path / word).mkdir()
        free = limited(tmp_path / word, threads=None, max_image_size=None, max_batch_size=None)
        assert sites.resolve(free, word)
    with pytest.raises(LimitError, match="train.image_size=32"):  # of pictures of cells, too
        sites.resolve(limited(tmp_path, max_image_size=31), " ".join(CELLS))


def test_a_kit_names_all_limits_and_impossible_ones_are_refused(tmp_path):
    told = yaml.safe_load(site_yaml(PlannedSite("x", "/state")))["limits"]
    assert told["threads"] and told["max_image_size"] and told["max_batch_size"]
    assert parse_site_file(tmp_path, site_yaml(PlannedSite("x", "/state"))).limits == Limits()
    for key in ("threads", "max_image_size", "max_batch_size"):
        with pytest.raises(ConfigError, match=f"limits.{key}"):
            parse_site_file(tmp_path, f"name: x\nstate_dir: /s\nlimits: {{{key}: 0}}")


def test_every_word_that_is_not_heard_is_noted_by_its_key_alone(tmp_path):
    own = ["site.state_dir", "site.name", "output_dir", "audit.canaries", "init", "resume", "data.root",
           "++data.index", "privacy.target_epsilon", "cells.root"]  # fmt: skip
    node = site(tmp_path)
    assert greeted(node, *MODEL, *(assign(key, "/gone/s3cret") for key in own))["status"] == "ok"
    log = (tmp_path / "x" / "state" / "client.log").read_text()
    for key in own:
        assert repr(key.lstrip("+")) in log
    assert "s3cret" not in log


@pytest.mark.parametrize(
    ("pinned", "word", "noted"),
    [
        (False, "backbone.pretrained=/etc/passwd", ("backbone.pretrained",)),
        (False, "backbone={pretrained: /etc/passwd}", ("backbone.pretrained",)),
        (False, "backbone.depth=1", ()),
        (True, "backbone.depth=1", ("backbone.depth",)),
        (False, "privacy=dp_sgd", ("privacy",)),
        (False, "seed=3 train.lr=0.1", ()),
    ],
)
def test_of_a_backbone_what_the_site_does_not_take(tmp_path, pinned, word, noted):
    node = site(tmp_path, more=["backbone=vit_tiny"] * pinned)
    (found,) = sites.resolve(node, word)
    assert found.unheard == noted
