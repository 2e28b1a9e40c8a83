import json

import torch

from benchmarks import miram_step


def test_every_arm_is_set_against_the_plain_autoencoder(tmp_path):
    threads = torch.get_num_threads()
    miram_step.main(["--quick", "--json", str(tmp_path / "found.json")])
    torch.set_num_threads(threads)
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert [(r["precision"], r["arm"]) for r in rows] == [
        (p, a) for p in ("fp32", "bf16") for a in miram_step.ARMS
    ]
    assert all(r["of_mae"] == 1 for r in rows if r["arm"] == "mae")
    assert all(r["least"] <= r["of_mae"] <= r["most"] for r in rows)


def test_arms_reconstruct_what_their_names_say():
    mae, some, every = (
        miram_step.build([*miram_step.QUICK, *miram_step.ARMS[name]])[0]
        for name in ("mae", "miram, softmax, a share of 0.0625", "miram, softmax")
    )
    assert mae.high_decoder is None
    assert (
        mae.low_decoder.head.out_features == 4 * every.high_decoder.head.out_features
    )  # half its resolution
    assert (some.high_decoder.asked, every.high_decoder.asked) == (3, None)
