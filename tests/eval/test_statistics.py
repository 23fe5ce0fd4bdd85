import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from genkit.eval.statistics import FeatureStats, is_statistics, own_rows


def rows(n, d, seed=0, mean=0.0, std=1.0):
    g = torch.Generator().manual_seed(seed)
    return mean + std * torch.randn(n, d, generator=g, dtype=torch.float64)


def test_streaming_equals_one_pass():
    x = rows(500, 16) @ rows(16, 16, 1)
    stats = FeatureStats(16)
    for batch in x.split([1, 7, 92, 400]):
        stats.update(batch)
    assert stats.n == 500
    torch.testing.assert_close(stats.mean, x.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(stats.covariance, torch.cov(x.T), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_merge_of_random_shards_equals_one_pass(seed):
    x = rows(301, 12, seed)
    cuts = torch.randint(0, 301, (6,), generator=torch.Generator().manual_seed(seed)).sort().values
    merged = FeatureStats(12)
    for shard in x.tensor_split(cuts):  # some shards may be empty
        merged = merged.merge(FeatureStats(12).update(shard))
    assert merged.n == 301
    torch.testing.assert_close(merged.covariance, torch.cov(x.T), rtol=1e-12, atol=1e-12)


def test_merge_is_a_new_object():
    a, b = FeatureStats(4).update(rows(9, 4)), FeatureStats(4).update(rows(5, 4, 1))
    before = a.mean.clone(), a.scatter.clone()
    assert a.merge(b).n == 14 and (a.n, b.n) == (9, 5)
    assert torch.equal(a.mean, before[0]) and torch.equal(a.scatter, before[1])


def test_no_cancellation_when_the_mean_is_large():
    x = rows(2000, 3, mean=1e6, std=1e-3)
    stats = FeatureStats(3)
    for batch in x.split(100):
        stats.update(batch)
    torch.testing.assert_close(stats.covariance, torch.cov(x.T), rtol=1e-6, atol=0)
    naive = (x.T @ x - 2000 * torch.outer(x.mean(0), x.mean(0))) / 1999
    assert (naive.diagonal() - torch.cov(x.T).diagonal()).abs().min() > 1e-7  # what the shortcut would give


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_features_are_summed_in_float64(dtype):
    x = rows(400, 5, mean=3.0).to(dtype)
    torch.testing.assert_close(FeatureStats(5).update(x).covariance, torch.cov(x.double().T), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_is_named_by_its_place_in_the_stream(bad):
    stats = FeatureStats(4).update(rows(10, 4))
    x = rows(5, 4)
    x[3, 1] = bad
    with pytest.raises(ValueError, match="feature row 13 is not finite"):
        stats.update(x)
    assert stats.n == 10


def test_many_rows_at_once_are_those_of_batches():
    x = rows(10_000, 3)
    whole, parts = FeatureStats(3).update(x), FeatureStats(3)
    for batch in x.split(777):
        parts.update(batch)
    torch.testing.assert_close(whole.covariance, parts.covariance, rtol=1e-12, atol=1e-12)
    bad = x.clone()
    bad[9_000, 1] = float("nan")
    fresh = FeatureStats(3)
    with pytest.raises(ValueError, match="feature row 9000 is not finite"):
        fresh.update(bad)
    assert fresh.n == 0  # nothing of the batch was counted


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
@pytest.mark.parametrize("n", [0, 1, 5, 20])
def test_own_rows_are_every_row_once(n, processes):
    parts = [own_rows(n, i, processes) for i in range(processes)]
    assert torch.equal(torch.cat(parts), torch.arange(n))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def _gathered(rank, file, x, results):
    """Of three processes all, the first two, and the last alone take the statistics of the same rows."""
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=3)
    groups = [(dist.new_group([0, 1]), [0, 1]), (dist.new_group([2]), [2]), (None, [0, 1, 2])]
    for group, ranks in groups:
        if rank in ranks:
            own = FeatureStats(x.shape[1])
            for batch in x[own_rows(len(x), ranks.index(rank), len(ranks))].split(13):
                own.update(batch)
            whole = own.gather(group)
            results[len(ranks), rank] = (whole.n, whole.mean.tolist(), whole.covariance.tolist())
    try:
        FeatureStats(4 if rank < 2 else 5).gather()
    except ValueError as error:
        results["refused", rank] = str(error)
    dist.destroy_process_group()


def test_one_two_and_three_processes_agree(tmp_path):
    x = rows(101, 6, mean=5.0) @ rows(6, 6, 1)  # 101 rows: no number of processes divides them
    with mp.Manager() as manager:
        results = manager.dict()
        mp.start_processes(_gathered, (tmp_path / "sync", x, results), nprocs=3, start_method="fork")
        results = dict(results)
    assert results[2, 0] == results[2, 1] and results[3, 0] == results[3, 1] == results[3, 2]
    for n, mean, covariance in (results[1, 2], results[2, 0], results[3, 0]):
        assert n == 101
        torch.testing.assert_close(torch.tensor(mean, dtype=torch.float64), x.mean(0), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            torch.tensor(covariance, dtype=torch.float64), torch.cov(x.T), rtol=1e-12, atol=1e-12
        )
    assert {results["refused", rank] for rank in range(3)} == {"process 2 has statistics of 5 dimensions, n=0"}


def test_alone_gather_is_a_copy():
    stats = FeatureStats(4).update(rows(9, 4))
    again = stats.gather()
    assert again is not stats and again.n == 9 and torch.equal(again.covariance, stats.covariance)


def test_dimensions_must_agree():
    with pytest.raises(ValueError, match=r"\(B, 4\), got \(3, 5\)"):
        FeatureStats(4).update(rows(3, 5))
    with pytest.raises(ValueError, match="4 and 5"):
        FeatureStats(4).merge(FeatureStats(5))


@pytest.mark.parametrize("n", [0, 1])
def test_covariance_needs_two_samples(n):
    with pytest.raises(ValueError, match=f"n={n}"):
        _ = FeatureStats(3).update(rows(n, 3)).covariance


def test_save_and_load(tmp_path):
    stats = FeatureStats(6).update(rows(50, 6))
    stats.save(tmp_path / "s.npz", {"extractor": "mine"})
    assert is_statistics(tmp_path / "s.npz")
    loaded = FeatureStats.load(tmp_path / "s.npz")
    assert loaded.n == 50 and loaded.meta == {"extractor": "mine"}
    torch.testing.assert_close(loaded.covariance, stats.covariance, rtol=1e-14, atol=0)
    more = rows(20, 6, 3)  # a loaded file can be continued
    torch.testing.assert_close(loaded.update(more).covariance, stats.update(more).covariance, rtol=1e-12, atol=1e-12)


def test_files_of_other_libraries(tmp_path):
    x = rows(50, 6)
    path = tmp_path / "other.npz"
    np.savez(path, mu=x.mean(0).numpy(), sigma=torch.cov(x.T).numpy())
    stats = FeatureStats.load(path)
    assert stats.n is None
    torch.testing.assert_close(stats.covariance, torch.cov(x.T))
    with pytest.raises(ValueError, match="load them with n="):
        stats.update(x)
    with pytest.raises(ValueError, match="load them with n="):
        FeatureStats(6).merge(stats)
    known = FeatureStats.load(path, n=50)
    assert known.merge(FeatureStats(6).update(x)).n == 100
    stats.save(tmp_path / "again.npz")
    assert FeatureStats.load(tmp_path / "again.npz").n is None


def test_what_the_features_were_made_with(tmp_path):
    x = rows(50, 6)
    path, ours = tmp_path / "other.npz", tmp_path / "ours.npz"
    np.savez(path, mu=x.mean(0).numpy(), sigma=torch.cov(x.T).numpy())
    assert "extractor" not in FeatureStats.load(path).meta
    named = FeatureStats.load(path, n=50, extractor="inception")
    assert named.meta == {"extractor": "inception"}
    named.save(ours)
    assert FeatureStats.load(ours, extractor="inception").meta == {"extractor": "inception"}
    with pytest.raises(ValueError, match="extractor='clip' was given, but the file says 'inception'"):
        FeatureStats.load(ours, extractor="clip")
    other = FeatureStats(6).update(x)
    other.meta = {"extractor": "clip"}
    with pytest.raises(ValueError, match="cannot merge statistics of extractors 'inception' and 'clip'"):
        named.merge(other)
    other.meta = {"extractor": "inception", "source": "here"}
    assert named.merge(other).meta == {"extractor": "inception"}


def test_reference_batches_of_adm(tmp_path):
    # Images, pool features' statistics and those of spatial features in one file.
    x, path = rows(50, 6), tmp_path / "adm.npz"
    spatial = {"mu_s": np.zeros(3), "sigma_s": np.eye(3)}
    images = np.zeros((2, 8, 8, 3), dtype=np.uint8)
    np.savez(path, arr_0=images, mu=x.mean(0).numpy(), sigma=torch.cov(x.T).numpy(), **spatial)
    assert is_statistics(path)
    stats = FeatureStats.load(path)
    assert stats.n is None and stats.dim == 6
    torch.testing.assert_close(stats.covariance, torch.cov(x.T))


def test_files_as_clean_fid_writes_them(tmp_path, monkeypatch):
    fid = pytest.importorskip("cleanfid.fid")
    x = rows(50, 6).float().numpy()
    monkeypatch.setattr(fid.cleanfid, "__file__", str(tmp_path / "__init__.py"))  # it writes beside this
    monkeypatch.setattr(fid, "get_folder_features", lambda *a, **k: x)
    monkeypatch.setattr(fid, "build_feature_extractor", lambda *a, **k: None)
    fid.make_custom_stats("mine", str(tmp_path), device="cpu")
    (path,) = (p for p in (tmp_path / "stats").glob("*.npz") if is_statistics(p))
    stats = FeatureStats.load(path, n=50)
    torch.testing.assert_close(stats.covariance, torch.cov(torch.from_numpy(x).double().T), rtol=1e-6, atol=1e-6)


def test_broken_files(tmp_path):
    path = tmp_path / "s.npz"
    path.write_bytes(b"not a zip")
    assert not is_statistics(path)
    with pytest.raises(ValueError, match="not a readable"):
        FeatureStats.load(path)
    np.savez(path, mu=np.zeros(3))
    with pytest.raises(ValueError, match="'mu' and 'sigma'"):
        FeatureStats.load(path)
    np.savez(path, mu=np.zeros(3), sigma=np.eye(4))
    with pytest.raises(ValueError, match="do not fit"):
        FeatureStats.load(path)
    for sigma in (np.triu(np.ones((3, 3))), -np.eye(3)):
        np.savez(path, mu=np.zeros(3), sigma=sigma)
        with pytest.raises(ValueError, match="no covariance"):
            FeatureStats.load(path)
    np.savez(path, mu=np.zeros(3), sigma=np.eye(3), n=10)
    with pytest.raises(ValueError, match="n=20 was given, but the file says n=10"):
        FeatureStats.load(path, n=20)
    np.savez(path, mu=np.array([{}], dtype=object), sigma=np.eye(1))  # would need pickle
    with pytest.raises(ValueError, match="not a readable"):
        FeatureStats.load(path)
