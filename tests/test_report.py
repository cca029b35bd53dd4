"""The closing table and the pictures of the masks."""

import pytest
import torch

from elsa_lightning.report import mask_mosaic, perplexity_table


def test_the_table_sets_the_final_perplexity_beside_the_dense_one() -> None:
    table = perplexity_table(
        model="opt-125m", dense=27.5, final=55.0, sparsity=0.9, protocol="wikitext2 test, 166 segments of 2048 tokens"
    )
    head, _, dense, final, _, ratio = (line.split() for line in table.splitlines())
    assert " ".join(head) == "opt-125m: perplexity on wikitext2 test, 166 segments of 2048 tokens"
    assert dense == ["dense", "0.00", "%", "27.500"]
    assert final == ["final", "90.00", "%", "55.000"]
    assert " ".join(ratio) == "dense → 2.00× perplexity"


def test_without_a_dense_measurement_there_is_nothing_to_compare() -> None:
    table = perplexity_table(model="m", dense=None, final=55.0, sparsity=0, protocol="text")
    assert "final" in table
    assert "dense" not in table


@pytest.mark.parametrize("final", [1e300, float("inf"), float("nan")])
def test_a_collapsed_model_still_gets_its_table(final: float) -> None:
    assert f"{final:.3f}" in perplexity_table(model="m", dense=2.0, final=final, sparsity=0.99, protocol="text")


def test_a_tile_is_bright_where_weights_survive() -> None:
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[:4, 4:] = True
    tile = mask_mosaic([mask], tile=4, columns=1)[:4, :4]
    assert torch.equal(tile, torch.tensor([[0.0, 0, 1, 1]] * 2 + [[0.0] * 4] * 2))


@pytest.mark.parametrize("shape", [(3, 5), (100, 70), (4, 6, 9), (1, 1)])
def test_any_matrix_or_stack_of_experts_fills_one_tile(shape: tuple[int, ...]) -> None:
    picture = mask_mosaic([torch.rand(shape) > 0.5], tile=6, columns=1)
    assert picture.shape == (7, 7)
    assert picture.dtype == torch.float32
    assert 0 <= float(picture.min()) <= float(picture.max()) <= 1


def test_tiles_go_in_rows_of_a_transformer_block() -> None:
    masks = [torch.ones(4, 4, dtype=torch.bool) for _ in range(9)]
    assert mask_mosaic(masks, tile=4, columns=7).shape == (10, 35)


def test_a_tensor_of_which_nothing_is_left_is_black() -> None:
    assert mask_mosaic([torch.zeros(4, 4, dtype=torch.bool)], tile=4, columns=1)[:4, :4].sum() == 0
