"""SlideBatch: axes must agree, moving keeps everything; names of levels and terms."""

import dataclasses

import pytest
import torch

from hibio import keys
from hibio.batch import SlideBatch
from hibio.keys import level_name


def make_batch(n_spots: int = 3, **changes) -> SlideBatch:
    fields = {
        "gene_SK": torch.zeros(n_spots, 4, dtype=torch.long),
        "value_SK": torch.ones(n_spots, 4),
        "vector_SV": torch.zeros(n_spots, 2),
        "vector_scale_SV": torch.ones(n_spots, 2),
        "neighbour_SN": torch.full((n_spots, 6), -1),
        "distance_um_SN": torch.full((n_spots, 6), float("inf")),
        "xy_um_S2": torch.zeros(n_spots, 2),
        "slide_of_spot_S": torch.zeros(n_spots, dtype=torch.long),
        "spot_group_S": torch.zeros(n_spots, dtype=torch.long),
        "core_S": torch.ones(n_spots, dtype=torch.bool),
        "region_of_spot_LS": torch.zeros(2, n_spots, dtype=torch.long),
        "slide_ids": ("a",),
    }
    return SlideBatch(**{**fields, **changes})


TENSORS = [f.name for f in dataclasses.fields(SlideBatch) if f.name not in ("slide_ids", "stain")]
WIDTH = {"region_of_spot_LS": (2, 4), "core_S": (4,), "slide_of_spot_S": (4,), "spot_group_S": (4,)}


@pytest.mark.parametrize("name", [name for name in TENSORS if name != "gene_SK"])
def test_a_field_of_another_length_is_refused_by_name(name):
    wrong = torch.zeros(WIDTH.get(name, (4, 4)))
    with pytest.raises(ValueError, match=rf"SlideBatch\.{name} has 4 spots, gene_SK has 3"):
        make_batch(**{name: wrong})


def test_genes_and_values_must_pair_up():
    with pytest.raises(ValueError, match="one shape"):
        make_batch(value_SK=torch.ones(3, 5))
    wrong = {"query_gene_SQ": torch.zeros(3, 2), "query_value_SQ": torch.zeros(3, 4)}
    with pytest.raises(ValueError, match=r"query_gene_SQ and query_value_SQ .*3, 2.*3, 4"):
        make_batch(**wrong)
    with pytest.raises(ValueError, match=r"thinned_value_SK must have one shape.*None"):
        make_batch(thinned_gene_SK=torch.zeros(3, 4))


def test_to_moves_every_tensor_and_changes_nothing_else():
    batch = make_batch(features_SF=torch.ones(3, 5), target_SM=torch.ones(3, 2))
    moved = batch.to("meta")
    for name in TENSORS:
        before, after = getattr(batch, name), getattr(moved, name)
        if before is None:
            assert after is None
        else:
            assert after.device.type == "meta"
            assert after.shape == before.shape
            assert after.dtype == before.dtype
    assert moved.slide_ids == batch.slide_ids
    assert batch.gene_SK.device.type == "cpu"


def test_image_is_features_or_patches():
    assert not make_batch().has_image
    assert make_batch(features_SF=torch.zeros(3, 5)).has_image
    assert make_batch(patches_SCHW=torch.zeros(3, 3, 8, 8, dtype=torch.uint8)).has_image


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_batch().gene_SK = torch.zeros(1, 1)


@pytest.mark.parametrize(("um", "name"), [(300.0, "300um"), (1200, "1200um"), (62.5, "62.5um")])
def test_level_names(um, name):
    assert level_name(um) == name


def test_every_term_is_described_once():
    named = [value for name, value in vars(keys).items() if name.startswith("TERM_")]
    assert sorted(named) == sorted(keys.TERMS)
    assert len(set(named)) == len(named)
    assert keys.TERMS.keys() >= keys.IMAGE_TERMS | keys.MASKED_TERMS
    assert not keys.IMAGE_TERMS & keys.MASKED_TERMS
