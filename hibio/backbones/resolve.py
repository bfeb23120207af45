"""From the name that a user gives: to a backbone of the registry, timm or the hub, and its weights.

Only the functions named ``fetch_`` touch the network.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hibio.backbones.networks import ensure_torchvision
from hibio.backbones.registry import BACKBONES, Backbone, Triple, known_backbone
from hibio.config.files import ConfigError
from preprocessing.errors import did_you_mean

#: Names of a weights file on the hub, the first that exists is taken; safetensors runs no code.
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
_HUB = ("hf-hub:", "hf_hub:")
_INTERPOLATIONS = ("bicubic", "bilinear")
#: Arguments of timm.create_model that name files or places; its loader may unpickle what is there.
_LOADING = {
    "cache_dir",
    "checkpoint_path",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "pretrained_model_args",
}


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
    ensure_torchvision()
    from huggingface_hub import get_token

    cached = cached_weights(backbone.hub)
    if cached is not None:
        return cached
    if backbone.gated and get_token() is None:
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


def resolve_backbone(name: str) -> Backbone:
    """What the name of an encoder means.

    Args:
        name: an id of the registry (``uni2-h``), a timm name (``resnet50``,
            ``vit_small_patch16_224.augreg_in1k``), or ``hf-hub:ORG/NAME`` of a timm model.

    Raises:
        ConfigError: unknown name (lists the choices and the nearest), an encoder that timm cannot
            build, or a hub repository that cannot be read.
    """
    known = known_backbone(name)
    if known is not None:
        return known
    if name.startswith(_HUB):
        return fetch_hub_backbone(name.partition(":")[2])
    return _timm_backbone(name)


def _timm_backbone(name: str) -> Backbone:
    ensure_torchvision()
    import timm

    try:
        found = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    except RuntimeError:  # the tag behind the dot is unknown
        found = None
    if found is None:
        known = [*BACKBONES, *timm.list_models(), *timm.list_pretrained()]
        raise ConfigError(
            f"unknown encoder {name!r}{did_you_mean(name, known, n=3)} (choices: "
            f"{', '.join(BACKBONES)}; a timm name such as resnet50; hf-hub:ORG/NAME)"
        )
    return _derived(name, name, found.to_dict(), {}, found.hf_hub_id or "")


def fetch_hub_backbone(hub: str) -> Backbone:
    """Read what a timm model on the hub is from its ``config.json``, fetched if not in the cache.

    Raises:
        ConfigError: no access, no such repository, or not a timm model.
    """
    from huggingface_hub import try_to_load_from_cache

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", hub):
        raise ConfigError(f"hf-hub:{hub} is not a repository name; expected hf-hub:ORG/NAME")
    cached = try_to_load_from_cache(hub, "config.json")
    path = Path(cached) if isinstance(cached, str) else fetch_hub_file(hub, "config.json")
    if path is None:
        raise ConfigError(f"hf-hub:{hub} has no config.json, so it is not a model of timm")
    return hub_backbone(hub, path)


def hub_backbone(hub: str, config: Path) -> Backbone:
    """A backbone from a ``config.json`` in timm's form.

    Raises:
        ConfigError: not in timm's form.
    """
    try:
        described = json.loads(config.read_text(encoding="utf-8"))
        architecture, data = described["architecture"], described.get("pretrained_cfg", described)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"hf-hub:{hub}: its config.json names no timm architecture; give the architecture's "
            "timm name as --encoder and its weights in timm's names as --weights FILE"
        ) from error
    arguments = dict(described.get("model_args") or {})
    _refuse_loading(hub, str(architecture), arguments)
    arguments.pop("num_classes", None)
    if "global_pool" in described:
        arguments.setdefault("global_pool", described["global_pool"])
    return _derived(hub.replace("/", "--"), str(architecture), data, arguments, hub)


def _refuse_loading(hub: str, architecture: str, arguments: Mapping[str, Any]) -> None:
    """A model's description gives sizes; it must not make timm read other files or places."""
    loads = sorted(_LOADING & arguments.keys())
    if not re.fullmatch(r"[\w.]+", architecture):
        loads.append(f"architecture {architecture!r}")
    if loads:
        raise ConfigError(
            f"hf-hub:{hub}: its config.json has {', '.join(loads)}, which would load something "
            "else; give the architecture's timm name as --encoder and its weights as --weights FILE"
        )


def _derived(
    encoder: str, timm_name: str, data: Mapping[str, Any], arguments: dict[str, Any], hub: str
) -> Backbone:
    """A backbone from timm's description of its input."""
    pooling = arguments.pop("global_pool", None)
    if pooling is not None and pooling != "":
        arguments["global_pool"] = pooling
    interpolation = str(data.get("interpolation", "bicubic"))
    return Backbone(
        encoder=encoder,
        timm_name=timm_name,
        arguments=arguments,
        pooling="cls" if pooling == "" else "none",  # tokens without pooling: the class token
        input_px=int(data.get("input_size", (3, 224, 224))[-1]),
        mpp=(),
        mean=_triple(data.get("mean"), encoder, "mean"),
        std=_triple(data.get("std"), encoder, "std"),
        interpolation=interpolation if interpolation in _INTERPOLATIONS else "bicubic",
        hub=hub,
        gated=False,
        licence=str(data.get("license") or "see its page"),
        fixed_px=bool(data.get("fixed_input_size", False)),
    )


def _triple(values: Any, encoder: str, what: str) -> Triple:
    try:
        first, second, third = (float(value) for value in values)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"encoder {encoder!r}: its normalisation {what} is {values!r}; expected one number for "
            "each of red, green and blue"
        ) from error
    return first, second, third
