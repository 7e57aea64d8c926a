import numpy as np
import pytest

from fanformer.data.packing import rows_at, rows_of_run


def epoch_order(seed, epoch, length):
    return rows_at(seed, epoch, np.arange(length), length)


@pytest.mark.parametrize("length", [1, 2, 3, 5, 64, 65, 1000, 4096, 65537])
def test_epoch_order_is_a_permutation(length):
    order = epoch_order(7, 3, length)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(length))


def test_the_rows_of_a_huge_epoch_need_no_order_of_its_length():
    length = 10**15
    indices = np.array([*range(50), length - 1])
    rows = rows_at(0, 0, indices, length)
    assert len(set(rows.tolist())) == 51
    assert rows.max() > length // 2
    assert rows_at(0, 0, indices[7:8], length) == rows[7]


def test_order_is_a_pure_function_of_seed_and_epoch():
    assert np.array_equal(epoch_order(1, 2, 100), epoch_order(1, 2, 100))
    # fixed for ever: a resumed run must find the order it began with
    assert epoch_order(1, 2, 8).tolist() == [5, 4, 2, 3, 0, 1, 7, 6]


def test_epochs_and_seeds_give_different_orders():
    orders = [epoch_order(seed, epoch, 1000) for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1), (10, 0), (-1, 0))]
    for i, first in enumerate(orders):
        for second in orders[:i]:
            # two random permutations agree in 1 place on average; 12 or more has a probability below 1e-9
            assert np.count_nonzero(first == second) < 12


@pytest.mark.parametrize("length", [7, 30])
def test_every_row_is_as_likely_at_every_index(length):
    epochs = 400
    counts = np.zeros((length, length))
    for epoch in range(epochs):
        counts[np.arange(length), epoch_order(11, epoch, length)] += 1
    expected = epochs / length
    chi_square = ((counts - expected) ** 2 / expected).sum()
    freedom = (length - 1) ** 2
    # a sum of many chi-square terms is nearly normal, with mean `freedom` and variance twice that
    assert abs(chi_square - freedom) < 5 * np.sqrt(2 * freedom)


def test_neighbouring_indices_are_not_correlated():
    order = epoch_order(3, 0, 20000) / 20000
    # the correlation of 20000 independent pairs has a standard deviation of 0.007
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.035
    assert abs(np.corrcoef(order, np.arange(20000))[0, 1]) < 0.035


def test_a_run_takes_epoch_after_epoch_and_any_place_can_be_asked_for():
    rows = rows_of_run(2, np.arange(250), 100).tolist()
    assert rows == [row for epoch in range(3) for row in epoch_order(2, epoch, 100).tolist()][:250]
    for places in ([0], [99, 100], [249, 3, 150], []):
        assert rows_of_run(2, np.array(places), 100).tolist() == [rows[place] for place in places]


def test_a_place_far_into_a_run_costs_no_more_than_the_first():
    far = 10**15
    assert rows_of_run(0, np.array([far]), 7).tolist() == rows_at(0, far // 7, np.array([far % 7]), 7).tolist()


def test_impossible_lengths_and_places_are_refused():
    with pytest.raises(ValueError, match=r"`length` must be positive and `places` not negative, got 0 and 5"):
        rows_of_run(0, np.array([5]), 0)
    with pytest.raises(ValueError, match=r"`places` not negative, got 3 and -1"):
        rows_of_run(0, np.array([2, -1]), 3)
