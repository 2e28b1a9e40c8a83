"""Which site this node is, and what it may be told.

A hospital's node is started with ``site-config="/abs/site.yaml"``, the hospital's own file:

    name: st-elsewhere
    state_dir: /var/lib/sparsecontrast      # ledger, optimizer, projector, client.log
    overrides: [data=csv, data.root=/images]   # of data, cells, privacy, backbone

What that file decides, the server cannot: overrides of data, privacy and paths that arrive in a message
are dropped unread, and ``client.log`` names the key of each. So is a file of pretrained weights: weights
come from the server, and how its reading ends would tell which files lie here. What of a message is heard,
and what makes it refused, stands in ``client/heard.py``. A simulated node has only a partition number and
takes the site of that rank from the configured data.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client.heard import heard, hold_to, unheard
from sparsecontrast.config import anchored, shared_state_dir, site_state_dir, split_overrides
from sparsecontrast.errors import ConfigError
from sparsecontrast.federated import RunConfig, compose_run, kind_of
from sparsecontrast.overrides import key_of
from sparsecontrast.settings import SiteConfig
from sparsecontrast.site_file import EgressPolicy, checked_name, parse_site_file, read_site_file

_composed = functools.lru_cache(maxsize=4)(compose_run)


@dataclass(frozen=True)
class Site:
    """One site, resolved.

    Attributes:
        name: as the server will know it.
        config: of the run, with what the site owns put in its place.
        state_dir: durable files of this site.
        simulated: whether the data hold other sites too.
        unheard: keys of which the server spoke in vain, for the site's own file decides.
        egress: how answers leave.
    """

    name: str
    config: RunConfig
    state_dir: Path
    simulated: bool
    unheard: tuple[str, ...] = ()
    egress: EgressPolicy = EgressPolicy()

    @property
    def key_dir(self) -> Path:
        """Where the key of its patients' pseudonyms lies."""
        return shared_state_dir(self.config) if self.simulated else self.state_dir


def resolve(node_config: Mapping[str, Any], overrides: str) -> list[Site]:
    """Find out which sites this node serves: one, or in a simulation with few nodes several.

    Args:
        node_config: Flower's, with ``site-config``, or ``partition-id`` and ``num-partitions``.
        overrides: from the server.

    Returns:
        Sites; none when a simulation has more nodes than ``federation.sites``.

    Raises:
        ConfigError: neither key, a site file that is not in order, or fewer sites in the data than
            the federation wants.
    """
    if "site-config" in node_config:
        return [_own_site(Path(str(node_config["site-config"])), overrides)]
    if "partition-id" not in node_config:
        raise ConfigError(
            "node config: start the SuperNode with --node-config 'site-config=\"/abs/site.yaml\"'"
        )
    partition, nodes = int(node_config["partition-id"]), int(node_config.get("num-partitions", 1))
    return _simulated_sites(partition, nodes, _composed(overrides))


def addressed(sites: Sequence[Any], config: Mapping[str, Any]) -> Sequence[Any]:
    """Keep the site that the message names; a message without a name is for all of the node."""
    if "site" not in config:
        return sites
    meant = [site for site in sites if site.name == config["site"]]
    if not meant:
        raise ConfigError("the message is for a site that this node does not serve")
    return meant


def house(node_config: Mapping[str, Any], overrides: str) -> tuple[str, Path | None]:
    """Find the site's name and its folder where a run is in no order: of its file alone, if that can be read.

    Returns:
        The name, "" where no file tells it; the folder, beside a file that cannot be read, None for nowhere.
    """
    if "site-config" in node_config:
        path = Path(str(node_config["site-config"]))
        try:
            told = read_site_file(path)
            return told.name, anchored(told.state_dir)
        except ConfigError:
            return "", path.parent
    try:
        return "", site_state_dir(_composed(overrides), f"node_{node_config.get('partition-id', 'unknown')}")
    except ConfigError:
        return "", None


def _own_site(path: Path, overrides: str) -> Site:
    try:
        return _told_site(path, path.read_text(encoding="utf-8"), overrides)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"site-config={path}: cannot be read ({error})") from error


@functools.lru_cache(maxsize=4)  # the app and the guard ask for the same site
def _told_site(path: Path, text: str, overrides: str) -> Site:
    told = parse_site_file(path, text)
    words = split_overrides(overrides)
    asked = compose_run(heard(words))
    state_dir = anchored(told.state_dir)
    config = dataclasses.replace(
        kind_of(asked).at_site(asked, told.overrides),
        site=SiteConfig(told.name, str(state_dir)),
        output_dir=str(state_dir),
    )
    hold_to(told.limits, config)
    pinned = any(key_of(word).split(".")[0] == "backbone" for word in told.overrides)
    return Site(told.name, config, state_dir, False, unheard(words, asked, pinned), told.egress)


def _simulated_sites(partition: int, nodes: int, config: RunConfig) -> list[Site]:
    """Deal the sites of the data, sorted by name, to the nodes in turn."""
    wanted = config.federation.sites
    names = kind_of(config).site_names(config)
    ranks = range(partition, wanted, nodes)
    if ranks and ranks[-1] >= len(names):
        raise ConfigError(
            f"federation.sites={wanted}, partition-id {partition}: the data hold {len(names)} site(s): "
            f"{', '.join(names)}; set federation.sites={len(names)}"
        )
    chosen = [checked_name(names[rank]) for rank in ranks]
    # one site.state_dir for all would mix their optimizers: each site has its own folder in it
    shared = anchored(config.site.state_dir) if config.site.state_dir else None
    folders = [shared / name if shared else site_state_dir(config, name) for name in chosen]
    return [Site(n, config, f, simulated=True) for n, f in zip(chosen, folders, strict=True)]
