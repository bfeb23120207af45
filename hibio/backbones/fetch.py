"""Weights of a backbone on the Hugging Face hub: in the local cache, or fetched.

Only the functions named ``fetch_`` touch the network.
"""

from __future__ import annotations

from pathlib import Path

from hibio.backbones.registry import Backbone
from hibio.config import ConfigError

#: Names of a weights file on the hub, the first that exists is taken; safetensors runs no code.
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


def find_weights(backbone: Backbone, weights: Path | None) -> Path:
    """The weights file: the given one, that in the hub's cache, or a fetched one.

    Raises:
        ConfigError: the file is missing, nobody publishes weights, or they are gated and nobody is
            logged in (then the network is not touched); the message says how to get them.
    """
    if weights is not None:
        if not weights.is_file():
            raise ConfigError(f"{weights}: no such weights file; check --weights")
        return weights
    if not backbone.hub:
        raise ConfigError(
            f"encoder {backbone.encoder!r}: timm knows no published weights on the hub; give a "
            "local file with --weights FILE"
        )
    cached = cached_weights(backbone.hub)
    if cached is not None:
        return cached
    if backbone.gated and not _logged_in():
        raise ConfigError(how_to_get(backbone))
    return fetch_weights(backbone)


def cached_weights(hub: str) -> Path | None:
    """The weights file of a hub repository in the local cache, without any network."""
    from huggingface_hub import try_to_load_from_cache

    for name in WEIGHT_FILES:
        found = try_to_load_from_cache(hub, name)
        if isinstance(found, str):
            return Path(found)
    return None


def how_to_get(backbone: Backbone) -> str:
    """How to get the weights of a gated encoder."""
    return (
        f"encoder {backbone.encoder!r}: the weights are gated ({backbone.licence}); accept the "
        f"licence on the page {backbone.hub} of huggingface.co, then either download "
        f"{' or '.join(WEIGHT_FILES)} there and pass --weights FILE, or log in with `hf auth "
        "login` and run this again"
    )


def _logged_in() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None


def fetch_weights(backbone: Backbone) -> Path:
    """Download the weights of a backbone into the hub's cache.

    Raises:
        ConfigError: no access, no such repository or file, or no network.
    """
    for name in WEIGHT_FILES:
        found = fetch_hub_file(backbone.hub, name, backbone)
        if found is not None:
            return found
    raise ConfigError(
        f"{backbone.hub} on the hub has neither {' nor '.join(WEIGHT_FILES)}; download its weights "
        "yourself and pass --weights FILE"
    )


def fetch_hub_file(hub: str, name: str, backbone: Backbone | None = None) -> Path | None:
    """Download one file of a hub repository into the hub's cache; None when it has no such file.

    Raises:
        ConfigError: no access, no such repository, or no network.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(hf_hub_download(hub, name))
    except GatedRepoError as error:
        known = backbone or Backbone("hf-hub:" + hub, "", hub=hub, licence="see its page")
        raise ConfigError(how_to_get(known)) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ConfigError(
            f"the hub has no repository {hub!r} that you may read; check the name ORG/NAME, or "
            "log in with `hf auth login`"
        ) from error
    except LocalEntryNotFoundError as error:
        raise ConfigError(_no_network(hub, name)) from error
    except EntryNotFoundError:
        return None
    except (HfHubHTTPError, OSError) as error:
        raise ConfigError(_no_network(hub, name)) from error


def _no_network(hub: str, name: str) -> str:
    return (
        f"{name} of {hub} cannot be fetched from the hub (no network?); fetch the weights on "
        "another machine and pass --weights FILE, with a timm name or a known encoder as --encoder"
    )
