"""The private loop of a site: reserved first, and nothing is told but what is covered."""

import dataclasses

import numpy as np
import pytest
import torch

from sparsecontrast.account import open_account
from sparsecontrast.config import compose
from sparsecontrast.disclosure import public_patients
from sparsecontrast.errors import BudgetSpentError, ConfigError, LedgerError, MethodError, PrivacyError
from sparsecontrast.federated import Place
from sparsecontrast.federated.images import training_set
from sparsecontrast.methods import build_method
from sparsecontrast.overrides import assign
from sparsecontrast.private_trainer import PrivateTrainer
from sparsecontrast.trainer import LocalTrainer
from tests.dicom_files import write_dicom

KEY = b"k" * 32
WORDS = (
    "privacy=dp_sgd", "method=patch_contrast", "backbone.img_size=32", "backbone.patch_size=4",
    "backbone.depth=1", "method.projection_hidden=16", "method.projection_dim=8", "train.batch_size=8",
    "privacy.planned_rounds=2", "privacy.steps_per_round=3", "privacy.sample_rate=0.3",
)  # fmt: skip
INSECURE = "privacy.insecure_seed=5"


def films(n=24):
    rng = np.random.Generator(np.random.PCG64(0))
    return rng.integers(0, 256, (n, 4, 4), dtype=np.uint8).repeat(8, 1).repeat(8, 2), np.arange(n) // 2


def private(folder, *words, run="run", patients=None, method=None):
    config = compose([*WORDS, *words])
    people = films()[1] if patients is None else patients
    account = open_account(config, folder, run, [f"p{code}" for code in people], KEY)
    return PrivateTrainer(method or build_method(config), config, "a", account)


def weights(trainer):
    return {n: p.detach().clone() for n, p in trainer.module.named_parameters()}


def equal(a, b):
    return all(torch.equal(value, b[name]) for name, value in a.items())


def test_noise_is_secret_unless_a_seed_says_otherwise(tmp_path):
    found = {}
    for name, words in {"1": [INSECURE], "2": [INSECURE], "3": [], "4": []}.items():
        trainer = private(tmp_path / name, *words)
        trainer.run(*films(), 1, 2)
        found[name] = weights(trainer)
    assert equal(found["1"], found["2"])
    assert not equal(found["3"], found["4"]) and not equal(found["1"], found["3"])


def test_only_what_no_image_decides_is_told(tmp_path):
    trainer = private(tmp_path)
    result = trainer.run(*films(), 1, 2)
    assert (result.steps, result.images, result.seconds) == (3, None, None)
    assert result.examples == 10  # of twelve patients
    assert set(result.metrics) == {"epsilon", "delta", "noise_multiplier", "noise_to_signal", "keep"}
    assert result.metrics["keep"] == trainer.method.keep
    told = trainer.account.ledger.read().entries[-1]
    assert result.metrics["epsilon"] == told.epsilon <= 8
    assert trainer.account.cohort.fingerprint == told.cohort and told.charge.steps == 3
    other = private(tmp_path / "other", patients=films()[1])
    pixels = 255 - films()[0]
    assert other.run(pixels, films()[1], 1, 2).metrics == result.metrics


def test_a_seeded_run_says_so_and_has_a_ledger_apart(tmp_path):
    trainer = private(tmp_path, INSECURE)
    assert trainer.run(*films(), 1, 2).metrics["insecure_noise"] == 1
    assert trainer.account.ledger.path.parent == tmp_path / "insecure"
    assert not (tmp_path / "ledger.sqlite").exists()


def test_the_plan_ends_within_the_promise_and_the_next_round_is_refused_untouched(tmp_path):
    trainer = private(tmp_path)
    for number in (1, 2):
        epsilon = trainer.run(*films(), number, 9).metrics["epsilon"]
    assert 7.9 < epsilon <= 8
    before = weights(trainer)
    with pytest.raises(BudgetSpentError, match="8 was promised"):
        trainer.run(*films(), 3, 9)
    assert equal(before, weights(trainer)) and len(trainer.account.ledger.read().entries) == 2
    other = private(tmp_path, run="under another name")  # only noise that drowns everything still fits
    assert other.account.mechanism.noise_multiplier > 5 * trainer.account.mechanism.noise_multiplier
    assert other.run(*films(), 1, 9).metrics["epsilon"] <= 8


def test_nothing_is_drawn_before_the_ledger_holds_it(tmp_path, monkeypatch):
    """A crash in the first draw, of whatever kind, finds the round charged."""
    trainer = private(tmp_path)
    started = weights(trainer)

    def crash(self, *_):
        raise KeyboardInterrupt

    monkeypatch.setattr("sparsecontrast.sampling.PatientSampler.draw", crash)
    with pytest.raises(KeyboardInterrupt):
        trainer.run(*films(), 1, 2)
    assert equal(started, weights(trainer))
    assert [e.charge.steps for e in trainer.account.ledger.read().entries] == [3]


def test_steps_beyond_the_reserved_ones_are_refused(tmp_path):
    account = private(tmp_path).account
    with pytest.raises(PrivacyError, match="not reserved"):
        account.book(account.mechanism)
    account.reserve(1)
    for _ in range(3):
        account.book(account.mechanism)
    with pytest.raises(PrivacyError, match="not reserved"):
        account.book(account.mechanism)
    account.reserve(2)
    with pytest.raises(PrivacyError, match="not reserved"):
        account.book(dataclasses.replace(account.mechanism, noise_multiplier=0.1))


def test_a_model_that_cannot_be_trained_privately_is_found_before_a_charge(tmp_path):
    config = compose(WORDS)
    method = build_method(config)
    method.projector[0].register_forward_hook(lambda m, i, o: o - o.mean(0))
    trainer = private(tmp_path, method=method)
    with pytest.raises(MethodError):
        trainer.run(*films(), 1, 2)
    assert not (tmp_path / "ledger.sqlite").exists()


def test_a_run_that_goes_on_keeps_its_sigma_and_its_state(tmp_path):
    whole, first = private(tmp_path / "a", INSECURE), private(tmp_path / "b", INSECURE)
    whole.run(*films(), 1, 2)
    whole.run(*films(), 2, 2)
    first.run(*films(), 1, 2)
    first.local.save(tmp_path / "state.safetensors")
    again = private(tmp_path / "b", INSECURE)
    again.module.load_state_dict(
        {n: t for n, t in first.module.state_dict().items() if n in first.method.shared_parameters()},
        strict=False,
    )
    again.local.load(tmp_path / "state.safetensors")
    assert again.account.mechanism == whole.account.mechanism
    again.run(*films(), 2, 2)
    assert equal(weights(whole), weights(again))


def test_the_proximal_pull_is_added_to_what_was_noised(tmp_path):
    free, held = private(tmp_path / "a", INSECURE), private(tmp_path / "b", INSECURE)
    start = weights(free)
    free.run(*films(), 1, 2)
    held.run(*films(), 1, 2, proximal_mu=1e6)
    moved, stayed = (
        sum(float((p - start[n]).square().sum()) for n, p in weights(t).items() if n.startswith("backbone."))
        for t in (free, held)
    )
    assert 0 < stayed < moved


def test_large_draws_come_in_pieces_of_the_same_step(tmp_path):
    """Equal up to the views, which are drawn batch by batch: same patients, same noise, one charge a step."""
    moved = []
    for size in (4, 24):
        trainer = private(tmp_path / str(size), INSECURE, f"train.batch_size={size}")
        start = weights(trainer)
        assert trainer.run(*films(), 1, 2).steps == 3
        moved.append(torch.cat([(p - start[n]).flatten() for n, p in weights(trainer).items()]))
        assert trainer.account._left == 0
    assert torch.nn.functional.cosine_similarity(*moved, dim=0) > 0.9


def test_plain_and_coupled_training_is_refused_under_privacy(tmp_path):
    config = compose(WORDS)
    with pytest.raises(PrivacyError, match="neither clips"):
        LocalTrainer(build_method(config), config, "a")
    with pytest.raises(MethodError, match="patch_contrast"):
        build_method(compose([*WORDS, "method=sparse_contrast"]))


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("train.compile=true", "train.compile"),
        ("privacy.images_per_patient=9", "images_per_patient"),
        ("evaluation.baselines=[local_only]", "without privacy"),
        ("privacy.public_patients=0", "public_patients"),
    ],
)
def test_impossible_private_configurations(word, message):
    with pytest.raises(ConfigError, match=message):
        compose([*WORDS, word])


def test_another_key_of_pseudonyms_is_no_new_budget(tmp_path):
    private(tmp_path).run(*films(), 1, 2)
    with pytest.raises(LedgerError, match="pseudonym"):
        open_account(compose(WORDS), tmp_path, "run", ["p0", "p1"], b"x" * 32)


def test_the_number_of_patients_is_told_in_steps_or_as_a_constant(tmp_path):
    found = [public_patients(compose(WORDS), n) for n in (1, 9, 57, 99, 129, 1234, 98765)]
    assert found == [10, 10, 50, 90, 120, 1200, 98000]
    account = private(tmp_path, "privacy.public_patients=7").account
    assert account.mechanism.patients == 7


def test_an_image_that_names_no_patient_has_no_budget_and_is_left_out(tmp_path):
    """Each would be a patient of its own: a person of a stripped export would have many."""
    root = tmp_path / "export"
    root.mkdir()
    for i in range(24):
        pixels = np.random.Generator(np.random.PCG64(i)).integers(0, 4096, (40, 40)).astype(np.uint16)
        patient = "" if i % 4 == 0 else f"p{i}"
        write_dicom(root / f"{i}.dcm", pixels, PatientID=patient, StudyInstanceUID=f"1.{i}")
    words = ["data=dicom", assign("data.root", root), assign("data.cache_dir", tmp_path / "cache"),
             "data.min_images=2"]  # fmt: skip
    said: list[str] = []
    place = Place("a", False, tmp_path / "state", tmp_path / "state", "0" * 16, said.append)
    plain = training_set(compose(words), place)
    assert not said and not plain.frame["patient_id"].str.match("[0-9a-f]{16}$").all()
    own = training_set(compose([*WORDS, *words]), place)
    assert own.frame["patient_id"].str.match("[0-9a-f]{16}$").all() and len(own) == len(plain.named()) > 2
    assert said == [f"{len(plain) - len(own)} image(s) that name no patient are left out of private training"]
