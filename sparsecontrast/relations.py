"""What keys of the configuration must be to each other, each with what is said where they are not.

The range of one key on its own stands in ``ranges.py`` and holds already.
"""

import re

from sparsecontrast.errors import ConfigError
from sparsecontrast.levels import STRIDE, stack_grids
from sparsecontrast.ranges import MAX_STEPS
from sparsecontrast.settings import Config, FederationConfig, MethodConfig, MiramConfig

BASELINES = ("pixels", "random_init", "start", "local_only", "centralised")
"""What ``evaluation.baselines`` may name; ``sparsecontrast.features`` makes them."""

CHOSEN = ("delta", "noise_multiplier", "public_patients", "insecure_seed")
"""What may be null under ``privacy=dp_sgd``: chosen by the patients, by the plan, by rounding, and none."""

Relations = list[tuple[bool, str]]
"""Whether each holds, and what is said where it does not."""


def check_relations(config: Config) -> None:
    """Refuse values that are possible by themselves, but not beside each other.

    Raises:
        ConfigError: the first relation that does not hold.
    """
    kind = _vit_relations if config.backbone.tiles is None else _cnn_relations
    for relations in (
        _name_relations,
        kind,
        _method_relations,
        _relations,
        _privacy_relations,
        _evaluation_relations,
    ):
        for holds, message in relations(config):
            if not holds:
                raise ConfigError(message)


def _name_relations(config: Config) -> Relations:
    """A name of timm's, and no address: timm would fetch ``hf-hub:NAME`` and read ``local-dir:FOLDER``."""
    name = config.backbone.name
    return [
        (
            re.fullmatch(r"[A-Za-z0-9_.]+", name) is not None,
            f"backbone.name={name!r}: must be a timm name of letters, digits, _ and ., such as "
            "vit_tiny_patch16_224; for weights of your own set backbone.pretrained=FILE",
        )
    ]


def _vit_relations(config: Config) -> Relations:
    """What a ViT's keys must be to each other."""
    b = config.backbone
    if b.patch_size is None or b.pool is None:
        return [(False, "backbone: a ViT needs patch_size and pool, a CNN needs tiles; neither is complete")]
    cell, size = b.patch_size * config.method.cell, f"backbone.img_size={b.img_size}"
    return [
        (b.halo is None, f"backbone.halo={b.halo}: belongs to a CNN, beside backbone.tiles; set to null"),
        (b.img_size % cell == 0, f"{size}: must be a multiple of patch_size x cell = {cell}"),
    ]


def _cnn_relations(config: Config) -> Relations:
    """What a CNN's keys must be to each other."""
    b, tiles, halo = config.backbone, config.backbone.tiles or 1, config.backbone.halo or 0
    foreign = [f"backbone.{key}={v}" for key in ("patch_size", "depth", "pool") if (v := getattr(b, key))]
    size, tile = f"backbone.img_size={b.img_size}", b.img_size // tiles
    return [
        (not foreign, f"{', '.join(foreign)}: of a ViT, but {b.name} has backbone.tiles; set to null"),
        (
            b.img_size % (STRIDE * tiles) == 0,
            f"backbone.tiles={tiles}: {size} must be cut into tiles of whole strides of {STRIDE} px; "
            f"possible here: {_possible_tiles(b.img_size) or 'none'}",
        ),
        (halo % STRIDE == 0, f"backbone.halo={halo}: must be a multiple of {STRIDE} px, a CNN's stride"),
        (
            tile + 2 * halo <= b.img_size,
            f"backbone.halo={halo}: {size} holds no tile of {tile} px and two halos",
        ),
    ]


def _possible_tiles(size: int) -> str:
    """All ``backbone.tiles`` that an image of ``size`` pixels can be cut into."""
    return ", ".join(str(n) for n in range(2, size // STRIDE + 1) if size % (STRIDE * n) == 0)


def _least_keep(config: Config) -> float:
    """The smallest share: a ViT's highest level of cells, each one token; one tile of a CNN."""
    b, cell = config.backbone, config.method.cell
    if b.tiles is not None or b.patch_size is None:
        return 1 / (b.tiles or 1) ** 2
    side = b.img_size // b.patch_size
    if side == 0 or side % cell:
        return 1 / cell**2  # refused by what is checked beside this
    return (stack_grids((side, side), cell)[-1][0] / side) ** 2


def _method_relations(config: Config) -> Relations:
    """What the method's keys must be to each other, and to the backbone's."""
    m = config.method
    return _miram_relations(config, m) if isinstance(m, MiramConfig) else _contrast_relations(config, m)


def _contrast_relations(config: Config, m: MethodConfig) -> Relations:
    least, both = _least_keep(config), m.dense_start + m.dense_end
    return [
        (
            least <= m.keep,
            f"method.keep={m.keep}: must be in [{least:g}, 1], all coarse (a CNN: one tile) to dense",
        ),
        (both <= 1, f"method.dense_start + method.dense_end = {both:g}: must be at most 1"),
    ]


def _miram_relations(config: Config, m: MiramConfig) -> Relations:
    b, e = config.backbone, config.evaluation
    patches = (b.img_size // (b.patch_size or b.img_size)) ** 2
    visible = round((1 - m.mask_ratio) * patches)
    dim, heads = m.decoder_dim, m.decoder_heads
    return [
        (
            b.tiles is not None or 0 < visible < patches,  # a CNN is refused where it is built
            f"method.mask_ratio={m.mask_ratio}: of {patches} patches {visible} stay visible; some must be "
            "visible and some hidden",
        ),
        (
            (b.patch_size or m.upsample) % m.upsample == 0,
            f"method.upsample={m.upsample}: must divide backbone.patch_size={b.patch_size}",
        ),
        (
            m.upsample > 1 or m.high_weight == 0,
            "method.upsample=1: there is no higher resolution then; set method.high_weight=0",
        ),
        (
            dim % heads == 0 and dim % 4 == 0,
            f"method.decoder_dim={dim}: must be a multiple of 4 and of method.decoder_heads={heads}",
        ),
        (
            e.keep in ("dense", 1.0),
            f"evaluation.keep={e.keep}: method=miram chooses no regions, so only dense means anything",
        ),
    ]


def _relations(config: Config) -> Relations:
    """What keys must be to each other, whatever the method and the backbone."""
    m, t, f, d = config.method, config.train, config.federation, config.data
    return [
        (
            len(t.crop_area) == 2 and t.crop_area[0] <= t.crop_area[1],
            f"train.crop_area={list(t.crop_area)}: must be [low, high] with 0 < low <= high <= 1",
        ),
        (
            config.audit.views == 0 or m.name in ("patch_contrast", "miram"),
            f"audit.views={config.audit.views}: method={m.name} has no loss of a single image, so membership "
            "has no score; use method=patch_contrast or method=miram",
        ),
        (
            config.init is None or not config.backbone.pretrained,
            f"init={config.init}, backbone.pretrained={config.backbone.pretrained}: both say where the "
            "backbone starts; leave one of them out",
        ),
        *federation_relations(f),
        (
            0 < d.val_fraction + d.test_fraction < 1,
            "data.val_fraction + data.test_fraction: must be in (0, 1)",
        ),
    ]


def federation_relations(f: FederationConfig) -> Relations:
    """What the federation's keys must be to each other, whatever it trains."""
    return [
        (
            f.min_sites <= f.sites,
            f"federation.min_sites={f.min_sites}: must be in 1..federation.sites={f.sites}",
        ),
        (
            f.update_norm in ("auto", "none") if isinstance(f.update_norm, str) else f.update_norm > 0,
            f"federation.update_norm={f.update_norm}: must be auto, none or a positive number",
        ),
    ]


def _privacy_relations(config: Config) -> Relations:
    """A number under ``none`` would look like privacy; without one, ``dp_sgd`` would promise nothing."""
    p = config.privacy
    told = [f"privacy.{key}={v}" for key, v in vars(p).items() if key != "name" and v is not None]
    if p.name == "none":
        return [(not told, f"{', '.join(told)}: means nothing under privacy=none; choose privacy=dp_sgd")]
    missing = [f"privacy.{key}" for key, v in vars(p).items() if v is None and key not in CHOSEN]
    steps = (p.planned_rounds or 0) * (p.steps_per_round or 0)
    trained = sorted(set(config.evaluation.baselines) & {"local_only", "centralised"})
    return [
        (not missing, f"{', '.join(missing)}: must not be null under privacy={p.name}"),
        (
            steps <= MAX_STEPS,
            f"privacy.planned_rounds x privacy.steps_per_round = {steps}: must be at most {MAX_STEPS}",
        ),
        (
            (p.images_per_patient or 1) <= config.train.batch_size,
            f"privacy.images_per_patient={p.images_per_patient}: must fit into train.batch_size="
            f"{config.train.batch_size}, for a patient's images are clipped together",
        ),
        (
            not config.train.compile,
            "train.compile=true: gradients of single patients come from hooks, which compiling removes; "
            f"set it to false under privacy={p.name}",
        ),
        (
            not trained,
            f"evaluation.baselines: {', '.join(trained)} train on the same patients without privacy; leave "
            "them out, or run them with privacy=none",
        ),
    ]


def _evaluation_relations(config: Config) -> Relations:
    """What would otherwise be found after all training."""
    e, least = config.evaluation, _least_keep(config)
    unknown = sorted(set(e.baselines) - set(BASELINES))
    kept = e.keep in ("dense", "sparse", "auto") if isinstance(e.keep, str) else least <= e.keep <= 1
    return [
        (not unknown, f"evaluation.baselines: unknown {unknown}; known: {', '.join(BASELINES)}"),
        (
            kept,
            f"evaluation.keep={e.keep}: must be dense, sparse or a number in [{least:g}, 1], "
            "coarsest to dense, or auto",
        ),
        (
            e.keep != "auto" or e.precision != "int8",
            "evaluation.keep=auto: int8 scales by whole batches, so no image stands for itself; use bf16",
        ),
        (len(e.label_fractions) > 0, "evaluation.label_fractions=[]: must name at least one, such as [1.0]"),
    ]
