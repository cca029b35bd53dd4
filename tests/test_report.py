"""The closing table and the pictures of the masks."""

import pytest
import torch

from elsa_lightning.report import Zeros, mask_mosaic, perplexity_table, shares_line, shares_map


def rows(table: str) -> dict[str, list[str]]:
    return {line.split()[0]: line.split() for line in table.splitlines()[2:]}


def test_the_table_sets_the_final_perplexity_and_zeros_beside_the_first() -> None:
    table = perplexity_table(
        model="opt-125m", start=(27.5, Zeros(1, 200, 3, 400)), final=(55.0, Zeros(180, 200, 180, 400)),
        protocol="wikitext2 test, 166 segments of 2048 tokens",
    )  # fmt: skip
    assert table.splitlines()[0] == "opt-125m: perplexity on wikitext2 test, 166 segments of 2048 tokens"
    assert table.splitlines()[1].split() == ["zeros", "of", "constrained", "all", "perplexity", "weights", "left"]
    assert table.splitlines()[2].split() == ["dense", "0.50", "%", "0.75", "%", "27.500", "397"]
    assert rows(table)["final"] == ["final", "90.00", "%", "45.00", "%", "55.000", "220"]
    assert "(200 constrained weights of 400 parameters)" in table and "dense → 2.00× perplexity" in table
    assert "sparse" not in table


@pytest.mark.parametrize("distilled", [True, False])
def test_a_start_with_zeros_is_not_called_dense(distilled: bool) -> None:
    table = perplexity_table(
        model="m", start=(20.0, Zeros(100, 200, 100, 400)), final=(30.0, Zeros(180, 200, 180, 400)), protocol="text",
        distilled=distilled,
    )  # fmt: skip
    assert "dense" not in table and "start → 1.50× perplexity" in table and "the start was already sparse" in table
    assert ("distillation learnt from that start" in table) == distilled


def test_without_a_first_measurement_there_is_nothing_to_compare() -> None:
    table = perplexity_table(model="m", start=None, final=(55.0, Zeros(0, 1, 0, 1)), protocol="text")
    assert "final" in table
    assert "dense" not in table and "start" not in table


@pytest.mark.parametrize("final", [1e300, float("inf"), float("nan")])
def test_a_collapsed_model_still_gets_its_table(final: float) -> None:
    zeros = Zeros(99, 100, 99, 100)
    assert f"{final:.3f}" in perplexity_table(model="m", start=(2.0, zeros), final=(final, zeros), protocol="text")


def test_a_tile_is_bright_where_weights_survive() -> None:
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[:4, 4:] = True
    tile = mask_mosaic([mask], tile=4, columns=1)[:4, :4]
    assert torch.equal(tile, torch.tensor([[0.0, 0, 1, 1]] * 2 + [[0.0] * 4] * 2))


@pytest.mark.parametrize("shape", [(3, 5), (100, 70), (4, 6, 9), (1, 1), (8, 4, 3, 3)])
def test_any_matrix_stack_of_experts_or_kernel_fills_one_tile(shape: tuple[int, ...]) -> None:
    picture = mask_mosaic([torch.rand(shape) > 0.5], tile=6, columns=1)
    assert picture.shape == (7, 7)
    assert picture.dtype == torch.float32
    assert 0 <= float(picture.min()) <= float(picture.max()) <= 1


def test_tiles_go_in_rows_of_a_transformer_block() -> None:
    masks = [torch.ones(4, 4, dtype=torch.bool) for _ in range(9)]
    assert mask_mosaic(masks, tile=4, columns=7).shape == (10, 35)


def test_a_tensor_of_which_nothing_is_left_is_black() -> None:
    assert mask_mosaic([torch.zeros(4, 4, dtype=torch.bool)], tile=4, columns=1)[:4, :4].sum() == 0


def test_the_map_has_a_row_a_kind_and_a_column_a_block() -> None:
    shares = {"layers.2.up": 0.1, "layers.10.up": 0.4, "layers.2.down": 0.2, "head": 0.0}
    picture = shares_map(shares, tile=5)
    assert picture.shape == (3 * 6, 3 * 6)  # up, down and the head; no number, 2 and 10
    middles = picture[2::6, 2::6]
    nothing = 0.0
    assert torch.equal(middles, torch.tensor([[nothing, 0.25, 1.0], [nothing, 0.5, nothing], [0.0, nothing, nothing]]))
    corners = picture[::6, ::6]
    assert torch.equal(corners, torch.tensor([[0.5, 0.25, 1.0], [0.5, 0.5, 0.5], [0.0, 0.5, 0.5]]))  # grey without one


def test_unequal_shares_are_told_in_a_line() -> None:
    told = shares_line({"a": 0.5, "b": 0.02, "c": 0.3})
    assert told == "tensors keep from 0.02 (b) to 0.5 (a) of their entries, half of them up to 0.3"
    assert shares_line({"a": 0.1, "b": 0.1001}) is None and shares_line({}) is None
