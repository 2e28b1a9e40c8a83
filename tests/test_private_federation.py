"""Hospitals with budgets of their own in one federation: what the server may say, and who goes on."""

from types import SimpleNamespace

import pytest
import yaml

from sparsecontrast.errors import QuorumError
from sparsecontrast.overrides import assign
from sparsecontrast.promised import INSECURE, promised
from sparsecontrast.report import write_report
from sparsecontrast.runs import read_run
from tests.federations import rows, serve, words, write_images
from tests.test_leaves import messages

PRIVATE = ("privacy=dp_sgd", "privacy.steps_per_round=2", "privacy.sample_rate=0.5")
METRICS = {"num-examples", "steps", "state-round", "epsilon", "delta", "noise_multiplier", "noise_to_signal",
           "keep"}  # fmt: skip


def hospitals(folder, plans):
    """Node configs; ``plans`` says for how many rounds each hospital plans its budget, 0 for none."""
    nodes = []
    for name, planned in plans.items():
        index = write_images(folder / name / "images", {name: 6}, prefix=f"{name}-")
        own = [assign("data.index", index), "data.min_images=2"]
        own += [*PRIVATE, f"privacy.planned_rounds={planned}"] if planned else []
        told = {"name": name, "state_dir": str(folder / name / "state"), "overrides": own}
        (folder / name / "site.yaml").write_text(yaml.safe_dump(told))
        nodes.append({"site-config": str(folder / name / "site.yaml")})
    return nodes


def told(folder, sites, *more):
    base = words(
        folder / "nothing.csv", folder / "run", f"federation.sites={sites}", "federation.min_sites=1"
    )
    return [*base, "method=patch_contrast", "federation.rounds=3", *more]


def test_a_spent_site_leaves_and_the_federation_goes_on(tmp_path):
    nodes = hospitals(tmp_path, {"north": 3, "south": 1})
    grid = serve(nodes, told(tmp_path, 2))
    found = rows(tmp_path / "run")
    by_site = {s: [r for r in found if r["site"] == s] for s in ("north", "south", None)}
    assert [r["status"] for r in by_site["north"]] == ["ok"] * 3
    assert [(r["status"], r.get("code")) for r in by_site["south"]] == [
        ("ok", None),
        ("refused", "budget_spent"),
    ]
    assert [r["contributors"] for r in by_site[None]] == [["north", "south"], ["north"], ["north"]]
    assert [r["epsilon"] for r in by_site[None]][1:] == [r["epsilon"] for r in by_site["north"]][1:]
    assert all(0 < r["epsilon"] <= 8 and "loss" not in r for r in found if r.get("status") == "ok")
    for message in messages(grid.sent):
        assert set(message.content.metric_records.get("metrics", METRICS)) == METRICS
    table = promised(read_run(tmp_path / "run"))
    assert [line[0] for line in table["table"][1:]] == ["north", "south"]
    assert [line[-2:] for line in table["table"][1:]] == [["3", "0"], ["1", "1"]]
    assert not table["insecure"] and not table["open"] and not table["spent"]
    assert "8 steps of 2 hospitals" in table["price"]


def test_the_report_says_how_much_of_a_step_is_noise():
    row = {"epsilon": 1.0, "delta": 1e-5, "noise_multiplier": 1.0, "steps": 3, "noise_to_signal": 6.0}
    sites = [row | {"round": n, "site": s, "weight": 0.5} for n in (1, 2) for s in ("north", "south")]
    config = SimpleNamespace(privacy=SimpleNamespace(insecure_seed=None))
    price = promised(SimpleNamespace(sites=sites, config=config))["price"]
    assert "the noise is 6 times" in price and "all 12 steps of 2 hospitals" in price
    assert "down to 1.7 at best" in price  # 6 / sqrt(12)
    wide = promised(
        SimpleNamespace(sites=[sites[0] | {"noise_to_signal": n} for n in (70, 139)], config=config)
    )
    assert "the noise is 70 to 140 times" in wide["price"]
    old = [{k: v for k, v in r.items() if k != "noise_to_signal"} for r in sites]
    assert promised(SimpleNamespace(sites=old, config=config))["price"] == ""
    refused = [r | {"weight": 0.0} for r in sites]
    assert promised(SimpleNamespace(sites=refused, config=config))["price"] == ""


def test_the_end_of_every_budget_is_the_end_of_the_run_not_a_failure(tmp_path, caplog):
    serve(hospitals(tmp_path, {"north": 1, "south": 1}), told(tmp_path, 2))
    assert "ends after round 1: every site's privacy budget is spent" in caplog.text
    assert sorted(p.name for p in (tmp_path / "run" / "rounds").glob("*.safetensors"))[-1].startswith(
        "round_0001"
    )
    assert sum(r.get("code") == "budget_spent" for r in rows(tmp_path / "run")) == 2
    page = write_report(tmp_path / "run", show=False).read_text()
    assert "every privacy budget is spent" in page and "Losses are withheld" in page and INSECURE not in page
    told_seed = "privacy.insecure_seed=3"
    assert INSECURE in write_report(tmp_path / "run", [*PRIVATE, told_seed], show=False).read_text()


def test_too_few_sites_with_a_budget_is_a_failure_that_names_them(tmp_path):
    nodes = hospitals(tmp_path, {"north": 3, "south": 1, "west": 1})
    with pytest.raises(QuorumError, match=r"budget spent: \['south', 'west'\]"):
        serve(nodes, told(tmp_path, 3, "federation.min_sites=2"))


def test_the_server_cannot_set_or_relax_privacy_and_the_site_notes_the_attempt(tmp_path):
    nodes = hospitals(tmp_path, {"north": 2, "open": 0})
    loose = [
        "privacy=dp_sgd",
        "privacy.target_epsilon=500",
        "privacy.noise_multiplier=0.1",
        "federation.rounds=1",
    ]
    serve(nodes, told(tmp_path, 2, *loose))
    found = {r["site"]: r for r in rows(tmp_path / "run")}
    assert found["north"]["epsilon"] <= 8 and found["north"]["noise_multiplier"] > 0.1
    assert "epsilon" not in found["open"] and "loss" in found["open"]  # what it is, it says itself
    note = (tmp_path / "north" / "state" / "client.log").read_text()
    assert "privacy.noise_multiplier" in note and "privacy.target_epsilon" in note and "500" not in note
    assert promised(read_run(tmp_path / "run"))["open"] == ["open"]


def test_a_coupled_method_never_reaches_a_private_site(tmp_path):
    nodes = hospitals(tmp_path, {"north": 2, "open": 0})
    serve(
        nodes,
        told(tmp_path, 2, "method=sparse_contrast", "federation.rounds=1", "federation.connect_timeout=2"),
    )
    assert {r["site"] for r in rows(tmp_path / "run")} == {"open", None}
    assert "patch_contrast" in (tmp_path / "north" / "state" / "client.log").read_text()
    assert not (tmp_path / "north" / "state" / "ledger.sqlite").exists()


def test_a_run_at_one_place_is_continued_on_the_same_account(tmp_path):
    from sparsecontrast.config import compose
    from sparsecontrast.pretrain import pretrain
    from tests.tiny import WORDS

    base = [
        *WORDS,
        "method=patch_contrast",
        *PRIVATE,
        "privacy.planned_rounds=3",
        f"site.state_dir={tmp_path}/state",
    ]
    pretrain(compose([*base, f"output_dir={tmp_path}/run"]), show=False)
    pretrain(compose([f"resume={tmp_path}/run", "federation.rounds=3"]), show=False)
    found = [r for r in rows(tmp_path / "run") if r["site"]]
    assert [r["round"] for r in found] == [1, 2, 3] and len({r["noise_multiplier"] for r in found}) == 1
    assert found[0]["epsilon"] < found[1]["epsilon"] < found[2]["epsilon"] <= 8
    assert all("loss" not in r and "seconds" not in r and "images" not in r for r in found)
