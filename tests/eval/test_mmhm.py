import numpy as np
import pytest

from genkit.eval.mmhm import METRICS, mmhm, pareto_front, ranking, stability

FOUR = [(3, 300, 28, 20), (5, 250, 30, 21), (10, 150, 31, 21.5), (20, 100, 29, 20.5)]
CLOSE = [
    (5.3, 197.17, 29.29, 20.59),
    (15.27, 277.9, 28.29, 21.34),
    (11.93, 286.81, 29.38, 20.34),
    (8.27, 171.56, 28.35, 20.93),
]
OUTLIER = (60, 20, 22, 18.5)
UNIT = {name: {"min": 0.0, "max": 1.0} for name in METRICS}


def table(rows):
    return dict(zip(METRICS, np.array(rows, dtype=np.float64).T, strict=True))


def scores(rows, **settings):
    return mmhm(table(rows), **settings).scores


def many(m=12, seed=0):
    return np.random.default_rng(seed).normal([20, 150, 29, 21], [6, 40, 2, 0.7], (m, 4))


def test_worked_example():
    assert scores(FOUR) == pytest.approx([0.0019980, 0.7327195, 0.5208889, 0.0019940], abs=1e-7)


def test_a_row_that_does_not_compete_changes_the_winner():
    assert scores(CLOSE) == pytest.approx([0.3791, 0.0020, 0.0040, 0.0039], abs=6e-5)
    assert scores([*CLOSE, OUTLIER])[:4] == pytest.approx([0.8212, 0.9038, 0.8555, 0.7779], abs=6e-5)


def test_best_and_worst_everywhere():
    assert scores([(1, 9, 9, 9), (2, 5, 5, 5), (9, 1, 1, 1)])[[0, 2]] == pytest.approx([1.001, 0.001], rel=1e-12)
    assert scores([(2, 5, 5, 5), (1, 5, 5, 5)])[1] == pytest.approx(1.001, rel=1e-12)


def test_two_rows():
    assert scores([(3, 100, 28, 20), (5, 200, 29, 21)]) == pytest.approx([0.00133289, 0.00398805], abs=1e-8)


def test_one_row_and_equal_rows_are_neutral():
    assert scores([FOUR[0]]) == pytest.approx([1.001], rel=1e-12)
    assert scores([FOUR[0]] * 3) == pytest.approx([1.001] * 3, rel=1e-12)


def test_the_worst_of_one_metric_has_at_most_four_eps():
    rows = [(1, 9, 9, 1), (9, 1, 1, 9), (5, 5, 5, 5)]
    assert 0.001 < scores(rows)[0] < 0.004


@pytest.mark.parametrize("seed", range(5))
def test_units_and_order_do_not_matter(seed):
    rows = many(seed=seed)
    rng = np.random.default_rng(seed)
    expected = scores(rows)
    assert scores(rows * rng.uniform(0.1, 10, 4) + rng.normal(0, 5, 4)) == pytest.approx(expected, rel=1e-9)
    order = rng.permutation(len(rows))
    assert scores(rows[order]) == pytest.approx(expected[order], rel=1e-12)
    turned = rows * [1, -1, 1, 1]
    assert scores(turned, metrics=METRICS | {"inception_score": "min"}) == pytest.approx(expected, rel=1e-12)


def test_better_in_one_metric_never_lowers_the_score():
    rows = many()
    bounds = mmhm(table(rows)).bounds
    for k, (name, direction) in enumerate(METRICS.items()):
        goal = bounds[name]["min" if direction == "min" else "max"]
        for i in range(len(rows)):
            better = rows.copy()
            better[i, k] += 0.3 * (goal - better[i, k])
            change = scores(better, bounds=bounds) - scores(rows, bounds=bounds)
            assert change[i] >= 0 and np.delete(change, i) == pytest.approx(0, abs=0)
            assert change[i] > 0 or rows[i, k] == goal


def test_bounds_round_trip_to_the_bit():
    first = mmhm(table(many()))
    again = mmhm(table(many()), bounds=first.bounds)
    assert again.scores.tolist() == first.scores.tolist() and again.bounds == first.bounds
    assert not first.outside.any() and not again.outside.any()
    assert mmhm(table(many()), bounds=first.bounds, clip=False).scores.tolist() == first.scores.tolist()


def test_outside_of_bounds_is_clipped_and_flagged():
    rows = [(0.5, 0.5, 0.5, 0.5), (2.0, 0.5, 0.5, 0.5), (-1.0, 0.5, 0.5, 0.5), (0.0, 1.0, 0.5, 0.5)]
    got = mmhm(table(rows), bounds=UNIT)
    assert got.outside.tolist() == [False, True, True, False]
    assert got.normalised[:, 0].tolist() == [0.5, 0.0, 1.0, 1.0]
    assert got.scores[1] == pytest.approx(4 / (1000 + 3 / 0.501), rel=1e-12)


def test_without_clipping_it_is_as_published():
    """FID a thousandth of the range beyond its bound scores 0; at u = -.168 it explodes; a range beyond: .802."""
    bounds = UNIT | {"fid": {"min": 0.0, "max": 16.0}}
    beyond = lambda fid: scores([(fid, 0.5, 0.5, 0.5)], bounds=bounds, clip=False)[0]  # noqa: E731
    assert beyond(16.016) == pytest.approx(0, abs=1e-9)
    assert beyond(16 * 1.1) < 0
    assert abs(beyond(16 * 1.168)) > 1e6
    assert beyond(32) == pytest.approx(0.802, abs=5e-4)


def test_weights():
    rows = many()
    assert scores(rows, weights=dict.fromkeys(METRICS, 3.0)) == pytest.approx(scores(rows), rel=1e-12)
    u = mmhm(table(rows)).normalised
    w = np.array([2.0, 1, 0.5, 1])
    got = scores(rows, weights={"fid": 2, "clip_score": 0.5})
    assert got == pytest.approx(w.sum() / (w / (1e-3 + u)).sum(axis=1), rel=1e-12)
    heavy = scores(rows, weights={"fid": 1e9})
    assert heavy == pytest.approx(1e-3 + u[:, 0], rel=1e-4)


def test_other_metrics_and_eps():
    columns = {"lpips": [0.1, 0.3, 0.2], "psnr": [20.0, 30.0, 28.0], "unread": [float("nan")] * 3}
    got = mmhm(columns, metrics={"lpips": "min", "psnr": "max"}, eps=0.1)
    assert got.scores == pytest.approx([2 / (1 / 1.1 + 10), 2 / (10 + 1 / 1.1), 2 / (1 / 0.6 + 1 / 0.9)], rel=1e-9)
    assert list(got.bounds) == ["lpips", "psnr"]


def test_pareto_front():
    rows = [*FOUR, (5, 250, 30, 21), (6, 250, 30, 21), (5, 250, 30, 20.9)]
    assert pareto_front(table(rows)).tolist() == [True, True, True, False, True, False, False]
    rows = many(30)
    front = pareto_front(table(rows))
    good = rows * [-1, 1, 1, 1]
    for i, kept in enumerate(front):
        assert kept == (not any((g >= good[i]).all() and (g > good[i]).any() for g in good))
    assert front[np.argmax(scores(rows))]


def test_ties_go_to_fewer_calls_then_to_less_guidance():
    equal = np.array([0.5, 0.5, 0.5, 0.7, 0.5])
    assert ranking(equal) == [3, 0, 1, 2, 4]
    assert ranking(equal, [9, 4, 4, 50, 9], [1, 7, 3, 1, 0.5]) == [3, 2, 1, 4, 0]
    assert ranking(np.array([0.5, 0.5 * (1 + 1e-15)]), [1, 2]) == [0, 1]
    assert ranking(np.array([0.5, 0.5 * (1 + 1e-9)]), [1, 2]) == [1, 0]


def test_stability_finds_the_row_that_decides():
    got = stability(table([*CLOSE, OUTLIER]))
    assert got.changes == {4: 0} and got.share == 0.75
    bounds = mmhm(table([*CLOSE, OUTLIER])).bounds
    assert stability(table([*CLOSE, OUTLIER]), bounds=bounds).share == 1
    assert stability(table([FOUR[0]])).share is None
    same = table([FOUR[0]] * 3)
    assert stability(same, [3, 1, 2]).share == 1  # the tie-break holds without a row, too


def test_the_same_settings_reach_the_leave_one_out():
    rows, settings = many(8, seed=3), {"weights": {"fid": 5.0}, "eps": 0.05}
    winner = int(np.argmax(scores(rows, **settings)))
    changes = {}
    for i in set(range(8)) - {winner}:
        kept = [j for j in range(8) if j != i]
        new = kept[int(np.argmax(scores(rows[kept], **settings)))]
        if new != winner:
            changes[i] = new
    assert stability(table(rows), **settings).changes == changes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eps": 0}, "eps=0"),
        ({"eps": float("nan")}, "eps=nan"),
        ({"clip": False}, "without bounds"),
        ({"metrics": {}}, "none is named"),
        ({"metrics": {"fid": "low"}}, "fid='low'"),
        ({"metrics": {"fid": "min", "lpips": "min"}}, "missing columns: lpips. There are: fid, inception_score"),
        ({"weights": {"fid": 0}}, "fid=0"),
        ({"weights": {"fid": float("inf")}}, "fid=inf"),
        ({"weights": {"kid": 1}}, "'kid' is not among"),
        ({"bounds": {"fid": {"min": 0, "max": 1}}}, "bounds of fid: expected clip_score, fid"),
        ({"bounds": UNIT | {"lpips": {"min": 0, "max": 1}}}, "lpips"),
        ({"bounds": UNIT | {"fid": {"min": 2, "max": 1}}}, "min at most max"),
        ({"bounds": UNIT | {"fid": {"min": 0, "max": float("nan")}}}, "finite"),
        ({"bounds": UNIT | {"fid": {"min": 0, "max": "1"}}}, "finite"),
        ({"bounds": UNIT | {"fid": [0, 1]}}, "expected {'min': number, 'max': number}"),
    ],
)
def test_refuses_settings(settings, message):
    with pytest.raises(ValueError) as error:
        mmhm(table(FOUR), **settings)
    assert message in str(error.value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("function", [mmhm, pareto_front, stability])
def test_a_value_that_is_not_finite_is_named(function, bad):
    rows = np.array(FOUR, dtype=np.float64)
    rows[2, 3] = bad
    with pytest.raises(ValueError, match=f"row 3, column 'pick_score': {bad}"):
        function(table(rows))


def test_refuses_ragged_empty_and_too_wide_columns():
    with pytest.raises(ValueError, match="'clip_score': 3"):
        mmhm(table(FOUR) | {"clip_score": [1.0, 2.0, 3.0]})
    with pytest.raises(ValueError, match="at least 1"):
        mmhm({name: [] for name in METRICS})
    with pytest.raises(ValueError, match="range of 'fid' exceeds"):
        mmhm(table([(-1.7e308, 1, 1, 1), (1.7e308, 1, 1, 1)]))
