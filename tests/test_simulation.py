"""The simulated population: its oracle against direct conditioning and against its own draws, and its shards."""

import numpy as np
import pyarrow as pa
import pytest
from scipy.stats import multivariate_normal
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score

from mmimpute import planning, simulating
from mmimpute.data.arrow import decode
from mmimpute.data.shards import fetch_table, read_table
from mmimpute.errors import UserError
from mmimpute.simulation import Population
from mmimpute.spec import read_spec

TINY = Population(seed=3, width=16, states=3, shared=2, private=1, missing=0.4, gaps=0.2)
DEFAULT = Population()
REAL = [m.name for m in DEFAULT.modalities if m.kind == "real"]


def side_by_side(population: Population, values: dict, kind: str) -> np.ndarray:
    return np.concatenate([values[m.name] for m in population.modalities if m.kind == kind], axis=1)


def conditioned(population: Population, x: np.ndarray, seen: np.ndarray, ones: np.ndarray, seen_codes: np.ndarray):
    """(log p(observed), mean, variance of the real values, chances of the binary ones) of one record, from whole covariance matrices."""
    truth = population.truth
    log_joint, means, variances = np.log(truth.weight_C), [], []
    for c, (mean, w) in enumerate(zip(truth.mean_CR, truth.loading_CRH, strict=True)):
        cov = w @ w.T + np.diag(truth.noise_R**2)
        gain = cov[:, seen] @ np.linalg.inv(cov[np.ix_(seen, seen)])
        means.append(mean + gain @ (x - mean)[seen])
        variances.append(np.diag(cov - gain @ cov[seen]))
        if seen.any():
            log_joint[c] += multivariate_normal.logpdf(x[seen], mean[seen], cov[np.ix_(seen, seen)])
        log_joint[c] += np.log(np.where(ones, truth.chance_CB[c], 1 - truth.chance_CB[c])[seen_codes]).sum()
    evidence = np.logaddexp.reduce(log_joint)
    share = np.exp(log_joint - evidence)
    spread = np.array(variances) + (np.array(means) - share @ means) ** 2
    return evidence, share @ means, share @ spread, share @ truth.chance_CB


def test_the_oracle_is_direct_conditioning():
    x, observed = TINY.sample(60, seed=1)
    for name in observed:  # nothing observed; only codes; everything
        observed[name][:3] = [[False], [name == "codes"], [True]]
    mean, std = TINY.oracle({k: np.where(observed[k], v, np.nan) for k, v in x.items()}, observed)
    found = TINY.posterior(x, observed)
    parts = [side_by_side(TINY, v, kind) for kind in ("real", "binary") for v in (x, observed)]
    for n, (real, seen, codes, seen_codes) in enumerate(zip(*parts, strict=True)):
        evidence, mean_R, variance_R, chance_B = conditioned(TINY, real.astype(float), seen, codes == 1, seen_codes)
        np.testing.assert_allclose(found.log_likelihood_N[n], evidence, atol=1e-8)
        np.testing.assert_allclose(side_by_side(TINY, mean, "real")[n], np.where(seen, real, mean_R), rtol=1e-8)
        np.testing.assert_allclose(side_by_side(TINY, std, "real")[n] ** 2, np.where(seen, 0, variance_R), rtol=1e-8)
        np.testing.assert_allclose(side_by_side(TINY, mean, "binary")[n], np.where(seen_codes, codes, chance_B), rtol=1e-8)


def test_a_record_with_nothing_observed_has_the_populations_moments():
    x, _ = DEFAULT.sample(40_000, seed=2)
    record, nothing = {k: np.full_like(v[:1], np.nan) for k, v in x.items()}, {k: np.zeros_like(v[:1], bool) for k, v in x.items()}
    mean, std = DEFAULT.oracle(record, nothing)
    for name, values in x.items():
        np.testing.assert_allclose((values.mean(0) - mean[name][0]) / std[name][0], 0, atol=0.025)
        np.testing.assert_allclose(values.std(0) / std[name][0], 1, atol=0.06)
    assert DEFAULT.posterior(record, nothing).log_likelihood_N == pytest.approx(0, abs=1e-12)


def test_the_oracle_is_calibrated():
    """Where it says that it errs by this much, it does: overall, and among small and large deviations."""
    x, observed = DEFAULT.sample(6000, seed=4)
    mean, std = DEFAULT.oracle(x, observed)
    missing = ~side_by_side(DEFAULT, observed, "real")
    values, guessed, said = (side_by_side(DEFAULT, v, "real") for v in (x, mean, std))
    z = ((values - guessed)[missing]) / said[missing]
    for part in np.array_split(np.argsort((said / DEFAULT.truth.noise_R)[missing]), 5):
        assert np.mean(z[part] ** 2) == pytest.approx(1, abs=0.06)
    assert np.mean(np.abs(z) < 1.645) == pytest.approx(0.9, abs=0.01)
    hidden = ~observed["codes"]
    codes, chance = x["codes"][hidden], mean["codes"][hidden]
    for part in np.array_split(np.argsort(chance), 5):
        assert codes[part].mean() == pytest.approx(chance[part].mean(), abs=0.015)


def test_the_oracle_beats_ridge():
    """One modality hidden, the rest observed: ridge on 20,000 complete records is behind by more than 0.10, in every modality."""
    x, _ = DEFAULT.sample(22_000, seed=5)
    train, test = slice(20_000), slice(20_000, None)
    ridge, oracle = [], []
    for name in REAL:
        inputs = np.concatenate([(v - v[train].mean(0)) / v[train].std(0) for k, v in x.items() if k != name], axis=1)
        guess = Ridge(alpha=10).fit(inputs[train], x[name][train]).predict(inputs[test])
        held_out = {k: v[test] for k, v in x.items()}
        mean, _ = DEFAULT.oracle(held_out, {k: np.full(v.shape, k != name) for k, v in held_out.items()})
        ridge.append(r2_score(x[name][test], guess, multioutput="raw_values"))
        oracle.append(r2_score(x[name][test], mean[name], multioutput="raw_values"))
    assert np.concatenate(oracle).mean() > np.concatenate(ridge).mean() + 0.15
    assert all(o.mean() > r.mean() + 0.10 for o, r in zip(oracle, ridge, strict=True))


def test_values_follow_from_the_latents():
    x, _ = DEFAULT.sample(5000, seed=6)
    state, latent = DEFAULT.latents(5000, seed=6)
    truth = DEFAULT.truth
    explained = truth.mean_CR[state] + np.einsum("nh,nrh->nr", latent, truth.loading_CRH[state])
    noise = (side_by_side(DEFAULT, x, "real") - explained) / truth.noise_R
    np.testing.assert_allclose([noise.mean(), noise.std()], [0, 1], atol=0.01)
    np.testing.assert_allclose(np.bincount(state) / len(state), truth.weight_C, atol=0.03)


def test_what_is_missing():
    _, observed = DEFAULT.sample(20_000, seed=7)
    present = np.stack([v.any(1) for v in observed.values()], axis=1)
    assert present.any(1).all()
    np.testing.assert_allclose(1 - present.mean(0), [0.15, 0.25, 0.35, 0.45], atol=0.015)
    np.testing.assert_allclose([1 - v[v.any(1)].mean() for v in observed.values()], 0.02, atol=0.003)
    _, observed = Population(missing=0, gaps=0).sample(100, seed=0)
    assert all(v.all() for v in observed.values())


def test_missing_not_at_random_depends_on_the_state():
    population = Population(not_at_random=1)
    _, observed = population.sample(20_000, seed=8)
    state, _ = population.latents(20_000, seed=8)
    rates = np.array([[1 - v.any(1)[state == c].mean() for v in observed.values()] for c in range(population.states)])
    assert rates.std(0).min() > 0.05
    np.testing.assert_allclose(rates, population.truth.missing_CK, atol=0.06)  # below it where all would be missing


def test_shards_follow_from_their_number():
    whole = list(TINY.shards(25, 10))
    assert [len(x["rna"]) for x, _ in whole] == [10, 10, 5]
    for longer, (x, observed) in zip(TINY.shards(100, 10, start=1), whole[1:], strict=False):
        for name in x:
            np.testing.assert_array_equal(longer[0][name][: len(x[name])], x[name])
            np.testing.assert_array_equal(longer[1][name][: len(x[name])], observed[name])
    assert not np.array_equal(whole[0][0]["rna"], whole[1][0]["rna"])


def test_a_written_cohort_is_a_cohort(place, tmp_path):
    told = []
    done = simulating.write_cohort(TINY, place, 250, 100, truth=True, on_shard=told.append)
    assert done == {"shards": 3, "done_before": 0, "rows": 250}
    assert [t["rows"] for t in told] == [100, 200, 250]
    (tmp_path / "spec.toml").write_text(simulating.spec_toml(TINY, 250, 100))
    found = planning.survey(f"{place}/shards", read_spec(tmp_path / "spec.toml"))
    assert found.rows == 250 and not found.set_aside
    for number, (shard, (x, observed)) in enumerate(zip(found.shards, TINY.shards(250, 100), strict=True)):
        table = read_table(f"{place}/shards", shard, found.schema)
        truth = fetch_table(f"{place}/truth", shard.key)
        assert table.column_names[0] == "subject_id" and table["subject_id"] == truth["subject_id"]
        for name, values in decode(table, found.schema, shard.key).items():
            np.testing.assert_array_equal(values, np.where(observed[name], x[name], np.nan))
            np.testing.assert_array_equal(table[name].is_null().to_numpy(), ~observed[name].any(1))
            np.testing.assert_array_equal(truth[name].combine_chunks().flatten().to_numpy().reshape(x[name].shape), x[name])
        state, _ = TINY.latents(100, TINY.shard_seed(number))
        np.testing.assert_array_equal(truth["z0__state"].to_numpy(), state[: len(truth)])


def test_a_run_that_is_taken_up_again_writes_what_is_missing(tmp_path):
    url = str(tmp_path / "cohort")
    simulating.write_cohort(TINY, url, 30, 10, truth=False)
    parts = sorted((tmp_path / "cohort" / "shards").iterdir())
    before = [p.read_bytes() for p in parts]
    parts[1].unlink()
    assert simulating.write_cohort(TINY, url, 30, 10, truth=False)["done_before"] == 2
    assert [p.read_bytes() for p in parts] == before
    assert simulating.write_cohort(TINY, url, 30, 10, truth=True)["done_before"] == 0
    with pytest.raises(UserError, match=r"give an empty place, or the settings that cohort\.toml there names"):
        simulating.write_cohort(TINY, url, 40, 10, truth=False)


def test_other_peoples_shards_are_left_alone(tmp_path):
    simulating.publish_table(str(tmp_path), "shards/part-00000.parquet", pa.table({"subject_id": [1]}))
    with pytest.raises(UserError, match="holds something else"):
        simulating.write_cohort(TINY, str(tmp_path), 10, 10, truth=False)
    assert not (tmp_path / "cohort.toml").exists()
