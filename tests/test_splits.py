import hashlib
from collections import Counter

import pandas as pd
import pytest

from sparsecontrast.data.sites import merge_sites, one_site_a_patient, safe_name
from sparsecontrast.data.splits import assign_splits, published_splits
from sparsecontrast.errors import ConfigError, PatientLeakError, RecipeError

IDS = [f"p{i}" for i in range(4000)]


def test_a_split_is_the_hash_of_salt_and_patient():
    expected = []
    for patient in IDS[:300]:
        digest = hashlib.sha256(f"salt:{patient}".encode()).hexdigest()
        u = int(digest[:13], 16) / 16**13
        expected.append("test" if u < 0.2 else "val" if u < 0.3 else "train")
    assert assign_splits(IDS[:300], "salt", 0.1, 0.2) == expected
    assert assign_splits(IDS[:300], "pepper", 0.1, 0.2) != expected


def test_shares_come_out_as_asked():
    shares = Counter(assign_splits(IDS, "s", 0.1, 0.2))
    assert abs(shares["val"] / 4000 - 0.1) < 0.02 and abs(shares["test"] / 4000 - 0.2) < 0.02
    assert set(assign_splits(IDS, "s", 0.0, 0.0)) == {"train"}
    for fractions in ((0.5, 0.5), (-0.1, 0.2)):
        with pytest.raises(ConfigError, match="below 1"):
            assign_splits(IDS, "s", *fractions)


def test_a_published_split_is_followed_and_filled():
    published = ["test"] * 1000 + ["trainval"] * 1000 + [""] * 1000 + ["val"] * 1000
    splits = published_splits(IDS, published, "s", 0.2, 0.2)
    assert set(splits[:1000]) == {"test"} and set(splits[3000:]) == {"val"}
    assert (
        abs(Counter(splits[1000:2000])["val"] / 1000 - 0.25) < 0.05
    )  # 0.2 of all is 0.25 of what is no test
    assert set(splits[1000:2000]) == {"train", "val"}
    assert splits[2000:3000] == assign_splits(IDS[2000:3000], "s", 0.2, 0.2)
    # an image without a word follows its patient
    assert published_splits(["p", "p", "q"], ["", "test", "val"], "s", 0.2, 0.2) == ["test", "test", "val"]


def test_a_published_split_must_be_one_and_must_keep_patients_whole():
    with pytest.raises(PatientLeakError, match="1 patients"):
        published_splits(["p", "p", "q"], ["test", "trainval", "train"], "s", 0.1, 0.1)
    with pytest.raises(RecipeError, match="'valid'"):
        published_splits(["p"], ["valid"], "s", 0.1, 0.1)


def frame(**sizes):
    return pd.DataFrame({"site": [site for site, n in sizes.items() for _ in range(n)]})


def test_the_two_smallest_sites_merge_until_few_remain():
    sites = frame(big=50, d=4, c=3, b=3, a=3)
    assert Counter(merge_sites(sites, 4)["site"]) == {"big": 50, "d": 4, "a+b": 6, "c": 3}
    assert Counter(merge_sites(sites, 3)["site"]) == {"big": 50, "a+b": 6, "c+d": 7}
    assert Counter(merge_sites(sites, 2)["site"]) == {"big": 50, "a+b+c+d": 13}
    shuffled = sites.sample(frac=1, random_state=1)
    assert merge_sites(shuffled, 2)["site"].sort_index().equals(merge_sites(sites, 2)["site"])
    pd.testing.assert_frame_equal(merge_sites(sites, 9), sites)
    with pytest.raises(ConfigError, match="merge_sites_to=0"):
        merge_sites(sites, 0)


def test_long_names_are_shortened_but_stay_apart():
    sites = frame(**{f"a_hospital_of_some_name_{i:02d}": 1 + i for i in range(12)})
    merged = merge_sites(sites, 2)["site"]
    assert merged.nunique() == 2 and merged.map(len).max() <= 64
    assert "a_hospital_of_some_name_00+" in merged[0] and merged[0].endswith("_others")


def test_a_patient_at_two_sites_goes_to_the_one_with_most_images():
    patients, sites = ["p", "p", "p", "q", "q", "r"], ["b", "a", "b", "b", "a", "c"]
    assert one_site_a_patient(patients, sites) == (["b", "b", "b", "a", "a", "c"], 2)


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("St. Mary's / Ward 3", "St._Mary_s_Ward_3"),
        ("../etc", "etc"),
        ("a+b", "a+b"),
        ("", "site"),
        ("…", "site"),
    ],
)
def test_names_of_sites_are_fit_for_folders(name, safe):
    assert safe_name(name) == safe


def test_merging_remembers_where_images_came_from():
    frame = pd.DataFrame({"site": list("aabbbcccc")})
    once = merge_sites(frame, 2)
    assert once["source_site"].tolist() == frame["site"].tolist()
    again = merge_sites(once, 1)
    assert again["source_site"].tolist() == frame["site"].tolist() and again["site"].nunique() == 1
