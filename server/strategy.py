"""Flower's own strategies by name, fed with what was verified.

The strategies do the aggregation; what is here chooses one, checks what it needs up front, bounds
the weights, keeps fp32 and carries the optimizer state of the adaptive ones into the checkpoint.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower
from flwr.serverapp.exception import AggregationError

from sparsecontrast.errors import ConfigError, FederationError, QuorumError
from sparsecontrast.settings import FederationConfig

_ADAPTIVE = ("eta", "eta_l", "beta_1", "beta_2", "tau")
# name -> (Flower's class, the options that federation.options may set)
STRATEGIES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "fedavg": (flower.FedAvg, ()),
    "fedprox": (flower.FedProx, ()),
    "fedadam": (flower.FedAdam, _ADAPTIVE),
    "fedyogi": (flower.FedYogi, _ADAPTIVE),
    "fedavgm": (flower.FedAvgM, ("server_learning_rate", "server_momentum")),
    "median": (flower.FedMedian, ()),
    "trimmed_mean": (flower.FedTrimmedAvg, ("beta",)),
    "krum": (flower.Krum, ("num_malicious_nodes",)),
    "multikrum": (flower.MultiKrum, ("num_malicious_nodes", "num_nodes_to_select")),
    "bulyan": (flower.Bulyan, ("num_malicious_nodes",)),
}
# take a mean of the replies and go on from it: they need one reply in memory at a time, and would do with the
# sum alone, which is all that secure aggregation gives; the others compare single replies
OF_THE_MEAN = ("fedavg", "fedprox", "fedadam", "fedyogi", "fedavgm")
_COUNTS = ("num_malicious_nodes", "num_nodes_to_select")
# Flower takes distances as |x|^2 + |y|^2 - 2xy, which cancels in fp32: near replies look equal
_BY_DISTANCE = ("krum", "multikrum", "bulyan")
_KEY = "flat"


@dataclass(frozen=True)
class Contribution:
    """A verified reply.

    Attributes:
        site: its name.
        source: [n] fp32 weights in the canonical layout, or the ``.npy`` file that they wait in.
        examples: images it trained on, positive.
        metrics: finite scalars.
        update_norm: 2-norm of the weights less those that the round sent out, as they arrived.
        clipped: whether the update was shortened, see ``server.norms``.
    """

    site: str
    source: np.ndarray | Path
    examples: int
    metrics: dict[str, int | float]
    update_norm: float = 0.0
    clipped: bool = False

    @property
    def flat(self) -> np.ndarray:
        """The weights [n]; read anew each time where they wait in a file."""
        return np.load(self.source) if isinstance(self.source, Path) else self.source


class Aggregator:
    """One of Flower's strategies, with its state.

    Args:
        config: ``strategy``, ``options``, ``proximal_mu``, ``min_sites``, ``weighting``, ``max_weight``.

    Attributes:
        quorum: valid replies that a round needs, see ``quorum``.

    Raises:
        ConfigError: an unknown strategy or option, a value it refuses, or fewer sites than the strategy
            needs.
    """

    def __init__(self, config: FederationConfig):
        self.config = config
        self.strategy = _build(config)
        self.quorum = quorum(config)

    @property
    def proximal_mu(self) -> float:
        """FedProx's weight, which the sites apply; 0 for every other strategy."""
        return self.config.proximal_mu if self.config.strategy == "fedprox" else 0.0

    def aggregate(self, number: int, current: np.ndarray, replies: Sequence[Contribution]) -> np.ndarray:
        """Join replies into the next global weights.

        Args:
            number: 1-based server round; FedAdam's bias correction needs it.
            current: [n] fp32 global weights of this round.
            replies: in any order; they are sorted by site, so the result does not depend on arrival.

        Returns:
            fp32 [n].

        Raises:
            QuorumError: fewer replies than the strategy needs.
            FederationError: the strategy failed, or its result is not finite.
        """
        replies = sorted(replies, key=lambda reply: reply.site)
        self._remember(current)
        weights = bounded_weights(
            [r.examples for r in replies], self.config.weighting, self.config.max_weight
        )
        try:
            with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is found below
                arrays, _ = self.strategy.aggregate_train(number, self._messages(replies, weights))
        except AggregationError as error:
            raise FederationError(f"round {number}: {self.config.strategy}: {error}") from error
        if arrays is None:
            raise QuorumError(
                f"round {number}: {len(replies)} replies are too few for {self.config.strategy}"
            )
        with np.errstate(over="ignore"):
            result = arrays[_KEY].numpy().astype(np.float32)
        if result.shape != current.shape or not np.isfinite(result).all():
            raise FederationError(
                f"round {number}: {self.config.strategy} gave weights that are not finite; "
                "lower its learning rate in federation.options"
            )
        return result

    def state(self) -> dict[str, torch.Tensor]:
        """Return the tensors that the strategy carries from round to round, by name."""
        found = {name: getattr(self.strategy, name, None) for name in ("m_t", "v_t", "momentum_vector")}
        # FedOpt keeps {key: array}, FedAvgM a list in the order of the keys: here one array either way
        arrays = {n: v[_KEY] if isinstance(v, dict) else v[0] for n, v in found.items() if v}
        return {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Set what ``state`` returned."""
        for name, tensor in state.items():
            array = tensor.numpy().copy()
            setattr(self.strategy, name, [array] if name == "momentum_vector" else {_KEY: array})

    def _remember(self, current: np.ndarray) -> None:
        """Set the weights that the round started from, as ``configure_train`` of the strategy would."""
        if isinstance(self.strategy, flower.FedAvgM):
            self.strategy.current_arrays = ArrayRecord({_KEY: Array(current)})
        elif hasattr(self.strategy, "current_arrays"):
            self.strategy.current_arrays = {_KEY: current}

    def _messages(self, replies: Sequence[Contribution], weights: Sequence[float]) -> list[Message]:
        if self.config.strategy in OF_THE_MEAN and replies:
            return [self._message(weighted_mean(replies, weights), 1.0)]
        return [self._message(r.flat, w) for r, w in zip(replies, weights, strict=True)]

    def _message(self, flat: np.ndarray, weight: float) -> Message:
        """Wrap a reply for the strategy: two records with the same keys, whatever the site sent."""
        array = flat.astype(np.float64) if self.config.strategy in _BY_DISTANCE else flat
        content = RecordDict(
            {"arrays": ArrayRecord({_KEY: Array(array)}), "metrics": MetricRecord({"num-examples": weight})}
        )
        return Message(content, dst_node_id=0, message_type="train")


def weighted_mean(replies: Sequence[Contribution], weights: Sequence[float]) -> np.ndarray:
    """Average replies to [n] fp32, one in memory at a time; bit for bit what Flower makes of all at once."""
    total = sum(weights)
    mean: np.ndarray | None = None
    for reply, weight in zip(replies, weights, strict=True):
        part = reply.flat * (weight / total)
        mean = part if mean is None else np.add(mean, part, out=mean)
    assert mean is not None
    return mean


def bounded_weights(examples: Sequence[int], weighting: str, max_weight: float) -> list[float]:
    """Weigh sites by their images, with no site's share above ``max_weight``.

    What a site loses by the cap goes to the others in proportion. A cap that cannot hold
    (``max_weight`` < 1 / sites) gives equal weights.

    Returns:
        Positive weights that sum to 1.
    """
    n = len(examples)
    if weighting == "uniform" or max_weight * n <= 1:
        return [1.0 / n] * n
    weights = [float(count) for count in examples]
    capped: set[int] = set()
    while True:
        free = sum(w for i, w in enumerate(weights) if i not in capped)
        scale = (1 - max_weight * len(capped)) / free if free else 0.0
        shares = [max_weight if i in capped else w * scale for i, w in enumerate(weights)]
        over = {i for i, share in enumerate(shares) if share > max_weight * (1 + 1e-12)}
        if not over:
            return shares
        capped |= over


def _build(config: FederationConfig) -> Any:
    if config.strategy not in STRATEGIES:
        raise ConfigError(f"federation.strategy={config.strategy}: must be one of {', '.join(STRATEGIES)}")
    kind, known = STRATEGIES[config.strategy]
    unknown = sorted(set(config.options) - set(known))
    if unknown:
        raise ConfigError(
            f"federation.options: {config.strategy} knows no {unknown}; known: {sorted(known) or 'none'}"
        )
    for name, value in config.options.items():
        whole = name in _COUNTS
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or value < 0:
            kind_of = "integer" if whole else "number"
            raise ConfigError(f"federation.options.{name}={value!r}: must be a non-negative {kind_of}")
    options = dict(config.options)
    if config.strategy == "fedprox":
        options["proximal_mu"] = config.proximal_mu
    try:
        return kind(**options)
    except ValueError as error:
        raise ConfigError(f"federation.options of {config.strategy}: {error}") from error


def quorum(config: FederationConfig) -> int:
    """Return how many valid replies a round needs: ``min_sites``, or more where the strategy's proof does.

    Raises:
        ConfigError: the federation has fewer sites, or multikrum would average more than can be honest.
    """
    f = config.options.get("num_malicious_nodes", 0)
    needs = {
        "krum": (2 * f + 3, "2f + 3 (Blanchard et al. 2017)"),
        "multikrum": (2 * f + 3, "2f + 3 (Blanchard et al. 2017)"),
        "bulyan": (4 * f + 3, "4f + 3 (El Mhamdi et al. 2018)"),
    }
    least, rule = needs.get(config.strategy, (1, ""))
    if config.sites < least:
        raise ConfigError(
            f"federation.sites={config.sites}: {config.strategy} with num_malicious_nodes={f} needs at "
            f"least {least} replies, {rule}"
        )
    least = max(least, config.min_sites)
    chosen = config.options.get("num_nodes_to_select", 1)
    if config.strategy == "multikrum" and not 1 <= chosen <= least - f:
        raise ConfigError(
            f"federation.options.num_nodes_to_select={chosen}: must be in 1..{least - f}, the replies of a "
            "smallest round that can be honest; raise federation.min_sites"
        )
    return least
