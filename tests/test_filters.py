import pytest

from sparsecontrast.data.filters import is_chest, is_frontal, normal_view
from sparsecontrast.data.images import Header


@pytest.mark.parametrize(
    ("text", "view"),
    [
        ("PA", "PA"), ("ap", "AP"), ("AP Supine", "AP"), ("AP_horizontal", "AP"), ("AP erect", "AP"),
        ("?", ""), ("", ""), ("UNK", ""), ("Frontal", ""), ("LATERAL", "LATERAL"), ("LL", "LATERAL"),
        ("L", "LATERAL"), ("XTABLE LATERAL", "LATERAL"), ("AP AXIAL", "OTHER"), ("PA LLD", "OTHER"),
        ("AP RLD", "OTHER"),
        ("MLO", "OTHER"), ("COSTAL", "OTHER"), ("EXCLUDE", "OTHER"), ("postero-anterior", "PA"),
        ("LAO", "LATERAL"), ("antero-posterior", "AP"), ("POSTEROANTERIOR", "PA"),
        ("left lateral", "LATERAL"), ("SWIMMERS", "LATERAL"),
    ],
)  # fmt: skip
def test_views(text, view):
    assert normal_view(text) == view
    assert is_frontal(view) is (view in ("PA", "AP", ""))


@pytest.mark.parametrize(
    ("modality", "part", "description", "kept"),
    [
        ("CR", "CHEST", "", True), ("DX", "Thorax", "", True), ("CR", "", "", True), ("", "", "", True),
        ("CR", "", "Chest PA", True), ("CR", "", "Knie / KNEE ap", False), ("CR", "TSPINE", "", False),
        ("DX", "THORACIC SPINE", "", False), ("DX", "", "Thoracic spine", False), ("MG", "", "", False),
        ("CT", "CHEST", "", False), ("CR", "HIP", "chest", False), ("RG", "BREAST", "", False),
    ],
)  # fmt: skip
def test_chests(modality, part, description, kept):
    assert is_chest(Header(9, 9, modality=modality, body_part=part, description=description)) is kept
