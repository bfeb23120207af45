"""Towers and losses on a GPU, without one: tensors of the kind CUDA that hold nothing.

A tensor that a forward pass leaves on the CPU meets one of the GPU there and raises. In bfloat16
the numbers are compared with float32 on the CPU. Tests of the mark `gpu` need a real one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from hibio.batch import SlideBatch
from hibio.config.model import OmicsConfig, VisionConfig
from hibio.encoders.omics import build_omics_encoder
from hibio.encoders.vision import build_vision_encoder
from hibio.losses import (
    NearDuplicates,
    decorrelation,
    info_nce,
    masked_mse,
    pathway_kl,
    rows_mse,
    spatial_contrast,
    spot_to_region,
)
from hibio.losses.contrastive import soft_info_nce
from tests.hibio.test_heist import PUBLISHED, S, context, make_batch

N, D = 9, 8
needs_fakes = pytest.mark.skipif(
    torch.__version__ < "2.7", reason="torch 2.6 asks the driver where a tensor holds nothing"
)
INDEX = torch.ops.aten.index.Tensor


def picked(value: Tensor, key: Any) -> Tensor:
    """``value[key]`` by operators that need no device; a mask selects everything."""
    parts = list(key) if isinstance(key, tuple) else [key]
    n_axes = sum(part.ndim if _is_mask(part) else part is not None for part in parts)
    if Ellipsis in [part for part in parts if not isinstance(part, Tensor)]:
        at = next(i for i, part in enumerate(parts) if part is Ellipsis)
        parts[at : at + 1] = [slice(None)] * (value.ndim - n_axes + 1)
    axis, lists = 0, dict[int, Tensor]()
    for part in parts:
        if part is None:
            value = value.unsqueeze(axis)
        elif isinstance(part, slice):
            value = torch.ops.aten.slice(value, axis, part.start, part.stop, part.step or 1)
        elif isinstance(part, Tensor) and _is_mask(part):
            same_device(value, part)
            value = value.flatten(axis, axis + part.ndim - 1)
        elif isinstance(part, Tensor):
            lists[axis] = part
        else:
            value = value.select(axis, part)
            continue
        axis += 1
    if not lists:
        return value
    return INDEX(value, [lists.get(i) for i in range(max(lists) + 1)])


def _is_mask(part: Any) -> bool:
    return isinstance(part, Tensor) and part.dtype == torch.bool


def same_device(*tensors: Tensor) -> None:
    kinds = {tensor.device.type for tensor in tensors}
    assert kinds == {"cuda"}, f"tensors on {kinds}"


class WithoutValues(TorchFunctionMode):
    """Stands in for what asks a tensor for its values; a condition is what it was told to be."""

    def __init__(self, truth: bool) -> None:
        super().__init__()
        self.instead: dict[Any, Callable[..., Any]] = {
            Tensor.__getitem__: picked,
            Tensor.__setitem__: lambda *given: same_device(
                *(one for one in given if isinstance(one, Tensor) and one.ndim)
            ),
            Tensor.__invert__: torch.bitwise_not,  # the operator asks for a real device
            Tensor.__bool__: lambda _: truth,
            Tensor.item: lambda _: 1,
            Tensor.__int__: lambda _: 1,
            Tensor.__index__: lambda _: 1,
            Tensor.__float__: lambda _: 1.0,
            torch.unique: lambda value, **_: (value, torch.zeros_like(value)),  # of each its own
        }

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return self.instead.get(function, function)(*args, **(kwargs or {}))


def on_gpu(value: Tensor) -> Tensor:
    return torch.empty(value.shape, dtype=value.dtype, device="cuda")


def moved(batch: SlideBatch) -> SlideBatch:
    values = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    found = {name: on_gpu(one) for name, one in values.items() if isinstance(one, Tensor)}
    return dataclasses.replace(batch, **found)


def tower(name: str) -> nn.Module:
    if name == "features":
        return build_vision_encoder(VisionConfig(name="features", feature_dim=6, width=8)).eval()
    if name.startswith("timm"):
        torch.manual_seed(0)
        how: dict[str, Any] = {"standardise": "pretrained", "context": "patch"}
        own = VisionConfig(name="timm", timm_name="test_vit", pretrained=False)
        return build_vision_encoder(
            dataclasses.replace(own, **how if name != "timm" else {})
        ).eval()
    changes: dict[str, dict[str, Any]] = {
        "graph_hierarchy": {},
        "heist": {"variant": "heist", **PUBLISHED},
        "mlp": {"name": "mlp"},
    }
    config = OmicsConfig(width=8, layers=2, heads=2, **changes[name])
    return build_omics_encoder(config, context()).eval()


def batch_of() -> SlideBatch:
    torch.manual_seed(0)
    patches = torch.randint(0, 256, (2, S, 3, 32, 32), dtype=torch.uint8)
    return dataclasses.replace(
        make_batch(),
        features_SF=torch.randn(S, 6),
        patches_SCHW=patches[0],
        context_SCHW=patches[1],
        stain_S6=torch.rand(S, 6),
    )


TOWERS = ("graph_hierarchy", "heist", "mlp", "features", "timm", "timm, its own colours")
Make = Callable[..., Tensor]
LOSSES: dict[str, Callable[[Make, Make], Tensor]] = {
    "info_nce": lambda e, i: info_nce(e(N, D), e(N, D), e(1)[0], None, i(N), "mixed"),
    "near duplicates": lambda e, i: info_nce(
        e(N, D), e(N, D), e(1)[0], NearDuplicates(e(N, 3), e(N, 2), i(N), 100.0, 0.9), i(N), "all"
    ),
    "soft": lambda e, i: soft_info_nce(e(N, D), e(N, D), e(1)[0], 0.1, i(N)),
    "region": lambda e, i: spot_to_region(e(N, D), e(N, D), i(N), e(1)[0]),
    "masked": lambda e, i: masked_mse(e(N, D), e(N, D), i(N, D) > 0),
    "rows": lambda e, i: rows_mse(e(N, D), e(N, D), i(N) > 0),
    "decorrelation": lambda e, i: decorrelation(e(N, D)),
    "pathway": lambda e, i: pathway_kl(e(N, D), e(5, D), e(N, 5), e(1)[0]),
    "spatial": lambda e, i: spatial_contrast(
        e(N, D), e(N, D), e(N, 2), i(N), e(N, 3), e(1)[0], radius_um=100.0, correlation=0.5
    ),
}


@pytest.fixture
def overwrite(monkeypatch: pytest.MonkeyPatch) -> Any:
    old = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    yield
    torch.__future__.set_overwrite_module_params_on_conversion(old)


@needs_fakes
@pytest.mark.parametrize("truth", [False, True])
@pytest.mark.parametrize("name", TOWERS)
def test_a_tower_stays_on_its_device(name: str, truth: bool, overwrite: None) -> None:
    model, batch = tower(name), batch_of()
    with FakeTensorMode(), torch.no_grad(), WithoutValues(truth):
        out = model._apply(on_gpu)(moved(batch))
    assert (out.device.type, len(out)) == ("cuda", S)


@pytest.mark.parametrize("truth", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_stays_on_its_device(name: str, truth: bool) -> None:
    with FakeTensorMode(), torch.no_grad(), WithoutValues(truth):
        out = LOSSES[name](
            lambda *shape: torch.empty(*shape, device="cuda"),
            lambda *shape: torch.empty(*shape, device="cuda", dtype=torch.long),
        )
    assert (out.device.type, out.ndim) == ("cuda", 0)


@needs_fakes
def test_a_tensor_left_on_the_cpu_is_noticed() -> None:
    with FakeTensorMode(), WithoutValues(True):
        value = torch.empty(3, 2, device="cuda")
        for wrong in (
            lambda: value + torch.zeros(3, 2),
            lambda: value[torch.zeros(3, dtype=torch.bool)],
            lambda: value.index_add(0, torch.zeros(3, dtype=torch.long), value),
        ):
            with pytest.raises((RuntimeError, AssertionError)):
                wrong()


@pytest.mark.parametrize("name", TOWERS)
def test_a_tower_in_bfloat16_is_near_float32(name: str) -> None:
    model, batch = tower(name), batch_of()
    with torch.no_grad():
        wanted = model(batch)
        with torch.autocast("cpu", torch.bfloat16):
            found = model(batch).float()
    assert float((found - wanted).norm() / wanted.norm()) < 0.05


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_of_bfloat16_is_a_float32(name: str) -> None:
    def value(dtype: torch.dtype) -> Tensor:
        generator = torch.Generator().manual_seed(0)

        def floats(*shape: int) -> Tensor:
            drawn = torch.rand(*shape, generator=generator) + 0.1
            return drawn.to(torch.bfloat16).to(dtype) if len(shape) > 1 else drawn

        return LOSSES[name](floats, lambda *shape: torch.randint(0, 3, shape, generator=generator))

    with torch.autocast("cpu", torch.bfloat16):
        found = value(torch.bfloat16)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, value(torch.float32), rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", TOWERS)
def test_a_tower_on_a_gpu_is_that_on_the_cpu(name: str) -> None:
    model, batch = tower(name), batch_of()
    with torch.no_grad():
        wanted = model(batch)
        found = model.to("cuda")(batch.to("cuda")).cpu()
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
