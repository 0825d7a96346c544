"""Imputation in memory, as a scikit-learn transformer: the same model and the same model file as on a cluster, without Ray."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import narwhals as nw
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils import Tags
from sklearn.utils.validation import check_is_fitted, validate_data

from mmimpute import registry
from mmimpute.data import profile, storage
from mmimpute.data.arrow import Imputation, decode, enrich, enriched_schema, flat
from mmimpute.data.completing import filled_in, storage_of
from mmimpute.data.schema import CohortSchema, draft_schema
from mmimpute.data.split import fold, position
from mmimpute.data.tensors import to_model
from mmimpute.errors import UserError
from mmimpute.evaluation import evaluate
from mmimpute.imputing import predict
from mmimpute.model.standardise import FeatureStatistics
from mmimpute.model.vae import MultiModalVAE
from mmimpute.sizing import model_config
from mmimpute.spec import CohortSpec, FitSettings, ImputeSettings, ModalitySpec, read_spec
from mmimpute.stacking import assemble
from mmimpute.training import fit_in_memory, optimiser, schedule

ROW = "row number"  # stands for the subject id where a table has none
TABLE = "the table"
Modalities = Mapping[str, Sequence[str | int]] | CohortSpec | str | Path | None


class MultiModalImputer(TransformerMixin, BaseEstimator):
    """Fills in what is missing in a table of several modalities.

    X is a pandas or Polars data frame, an Arrow table or an array of N rows; missing is null or NaN. What is observed comes back
    as it is, also columns of no modality. Missing numbers become their predictive mean, binary ones a probability, categories the
    most probable level. The answer is of the kind of X, or of that which `set_output` names.

    modalities: {"labs": ["sodium", "glucose"], ...} by the names of columns (of an array: x0, x1, ... or their numbers), a `CohortSpec`, or
    the path of one in TOML. None: every column is a modality of its own.
    epochs: at most; default by the number of rows. random_state: seed of training and of `sample`.

    Attributes after fit: model_ (`registry.Model`), history_ (one record per epoch), n_features_in_, feature_names_in_.
    """

    def __init__(self, modalities: Modalities = None, *, epochs: int | None = None, random_state: int = 0) -> None:
        self.modalities = modalities
        self.epochs = epochs
        self.random_state = random_state

    def fit(self, X: Any, y: None = None) -> Self:
        """Learns from the rows of X. Raises UserError or DataError where modalities and columns do not fit, as the command line does."""
        native = self._table(X, reset=True)
        self.spec_, self.columns_ = _spec(self.modalities, native.column_names)
        table = self._renamed(native)
        lists = [m.column for m in self.spec_.modalities.values() if m.column and m.form != "text"]
        widths = {c: pc.max(pc.list_value_length(storage_of(table[c]))).as_py() for c in lists}
        draft = draft_schema(self.spec_, table.schema, widths)
        schema, seen = profile.settle(draft, profile.observe(table, draft, TABLE, 1.0))
        settings = FitSettings(epochs=self.epochs, seed=self.random_state)
        self.marginals_ = profile.marginals(schema, seen)
        self.model_, self.history_ = fit_table(table, schema, profile.feature_statistics(schema, seen), settings)
        return self

    def transform(self, X: Any, return_std: bool = False) -> Any:
        """X completed. With return_std also the predictive standard deviations, a float array of X's shape: 0 where a value was observed,
        NaN in columns of no modality."""
        check_is_fitted(self)
        native = self._table(X, reset=False)
        table = self._renamed(native)
        records, imputed = self._imputed(table, ImputeSettings())
        enriched = self._enriched(table, records, imputed)
        completed = self._completed(native, enriched, X)
        return (completed, self._std(native, enriched)) if return_std else completed

    def sample(self, X: Any, draws: int) -> list[Any]:
        """That many completed tables for multiple imputation, each a joint draw of all that is missing; pool by Rubin's rules."""
        check_is_fitted(self)
        native = self._table(X, reset=False)
        table = self._renamed(native)
        records, imputed = self._imputed(table, ImputeSettings(draws=draws, seed=self.random_state))
        drawn = {name: i.draws for name, i in imputed.items() if i.draws is not None}
        sets = [{name: imputed[name]._replace(mean=d[s], draws=None) for name, d in drawn.items()} for s in range(draws)]
        return [self._completed(native, self._enriched(table, records, one), X) for one in sets]

    def embed(self, X: Any) -> np.ndarray:
        """The mean of the shared latent z0 of each row, N x L: what its observed values tell together."""
        _, z0_NL = predict(self.model_, self.records(X), ImputeSettings(latent=True), torch.Generator())
        return np.asarray(z0_NL)

    def evaluate(self, X: Any) -> dict[str, Any]:
        """How good the imputations are: every modality of X hidden in turn, scored as by `mmimpute evaluate` (see `evaluation.evaluate`).

        X: the table that was fitted, its rows in the same order, so that each is judged by the member that did not learn from it; or new
        rows. Where fitted rows come in another order, the figures are too good, unless a spec names a column of subject ids.
        """
        check_is_fitted(self)
        table = self._renamed(self._table(X, reset=False))
        folds = fold(position(table[self.spec_.subject_id]), self.model_.module.config.members)
        x = flat(decode(table, self.model_.schema, TABLE))
        return evaluate(self.model_, x[folds >= 0], folds[folds >= 0], self.marginals_)

    def records(self, X: Any) -> dict[str, np.ndarray]:
        """X as the model reads it: modality -> N x D, NaN where a value is not observed."""
        check_is_fitted(self)
        return decode(self._renamed(self._table(X, reset=False)), self.model_.schema, TABLE)

    def get_feature_names_out(self, input_features: Sequence[str] | None = None) -> np.ndarray:
        """The names of X's columns."""
        check_is_fitted(self)
        return np.asarray(list(self.columns_), dtype=object)

    def save(self, home: str) -> str:
        """Writes the model as `mmimpute fit` does, also to s3://, and makes it the champion if there is none. Returns its URL.

        Columns are called `<modality>__<column>` there, unless `modalities` was a spec.
        """
        check_is_fitted(self)
        name = registry.save(home, self.model_.module, self.model_.schema, self.model_.file.fitted_on)
        if registry.champion(home) is None:
            registry.promote(home, name)
        return storage.join(home, name)

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = tags.input_tags.categorical = tags.input_tags.string = True
        return tags

    # -- tables ---------------------------------------------------------------------------------------------------

    def _table(self, X: Any, reset: bool) -> pa.Table:
        """X as Arrow, its columns named as X's own."""
        if nw.dependencies.is_into_dataframe(X):
            validate_data(self, X, reset=reset, skip_check_array=True)
            table = nw.maybe_reset_index(nw.from_native(X, eager_only=True)).to_arrow()
            return table.rename_columns([str(c) for c in table.column_names])
        least = 2 if reset else 1
        x = validate_data(self, X, reset=reset, dtype=np.float64, ensure_all_finite="allow-nan", ensure_min_samples=least)
        return pa.table({f"x{d}": pa.array(column, from_pandas=True) for d, column in enumerate(x.T)})

    def _renamed(self, table: pa.Table) -> pa.Table:
        """With the columns that the model reads, under its names."""
        table = table.rename_columns([self.columns_[c] for c in table.column_names])
        if self.spec_.subject_id in table.column_names:
            return table
        return table.append_column(self.spec_.subject_id, pa.array(np.arange(len(table))))

    def _imputed(self, table: pa.Table, settings: ImputeSettings) -> tuple[dict[str, np.ndarray], dict[str, Imputation]]:
        records = decode(table, self.model_.schema, TABLE)
        generator = torch.Generator().manual_seed(settings.seed)
        return records, predict(self.model_, records, settings, generator)[0]

    def _enriched(self, table: pa.Table, records: Mapping[str, np.ndarray], imputed: Mapping[str, Imputation]) -> pa.Table:
        out = enriched_schema(self.model_.schema, table.schema, interval=False, draws=0, latent=False)
        batches = table.combine_chunks().to_batches()
        return pa.Table.from_batches([enrich(b, out, self.model_.schema, records, imputed, None) for b in batches], out)

    def _completed(self, native: pa.Table, enriched: pa.Table, X: Any) -> Any:
        """The columns of X, completed, in a container like X."""
        arrays = []
        for name in native.column_names:
            column, imputed = enriched[self.columns_[name]], self._beside(enriched, name, "__imputed")
            if imputed is not None:
                column = filled_in(column, imputed)
            arrays.append(column)
        return _like(pa.table(arrays, native.column_names), X)

    def _std(self, native: pa.Table, enriched: pa.Table) -> np.ndarray:
        columns = []
        for name in native.column_names:
            std = self._beside(enriched, name, "__std")
            columns.append(np.full(len(native), np.nan) if std is None else pc.fill_null(std, 0).to_numpy())
        return np.column_stack(columns)

    def _beside(self, enriched: pa.Table, name: str, suffix: str) -> pa.ChunkedArray | None:
        column = self.columns_[name] + suffix
        return enriched[column] if column in enriched.column_names else None


def fit_table(
    table: pa.Table, schema: CohortSchema, statistics: Mapping[str, Mapping[str, np.ndarray]], settings: FitSettings
) -> tuple[registry.Model, list[dict[str, float]]]:
    """The model of a table in memory, and one record per epoch."""
    config = model_config(schema, len(table), settings)
    x = flat(decode(table, schema, TABLE))
    data = to_model(x, [len(m.features) for m in schema.modalities])
    folds = torch.from_numpy(fold(position(table[schema.subject_id]), config.members))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        vae = MultiModalVAE(config, {name: FeatureStatistics(**arrays) for name, arrays in statistics.items()})
        plan = schedule(len(x), settings.batch_size, settings.epochs, config.structured)
        holders = sum(int(seen.any(1).sum()) for seen in data[1]) / len(data[1])
        fitted = fit_in_memory(vae, data, folds, optimiser(config, plan, holders, settings.seed), plan)
        module = assemble(fitted.model, *data, folds)
    return registry.Model("", "", registry.file_of(module, schema, "a table in memory"), module), fitted.history


def _spec(modalities: Modalities, names: Sequence[str]) -> tuple[CohortSpec, dict[str, str]]:
    """The spec, and what each of X's columns is called in it."""
    if isinstance(modalities, CohortSpec):
        return modalities, {n: n for n in names}
    if isinstance(modalities, str | Path):
        return read_spec(modalities), {n: n for n in names}
    groups = modalities or _each_alone(names)
    named = {m: [f"x{c}" if isinstance(c, int) else c for c in columns] for m, columns in groups.items()}
    specs = {m: ModalitySpec(prefix=f"{m}__", features=tuple(columns)) for m, columns in named.items()}
    inside = {c: f"{m}__{c}" for m, columns in named.items() for c in columns}
    return CohortSpec(subject_id=ROW, modalities=specs), {n: inside.get(n, n) for n in names}


def _each_alone(names: Sequence[str]) -> dict[str, list[str]]:
    """Every column as a modality of its own. A modality's name has no '__' in it. Raises UserError where two columns get one name."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub("__+", "_", name), []).append(name)
    if alike := [columns for columns in groups.values() if len(columns) > 1]:
        told = " and ".join(map(repr, alike[0]))
        raise UserError(f"columns {told} have one name once '__' is written '_', as for modalities; rename one, or give `modalities`")
    return groups


def _like(table: pa.Table, X: Any) -> Any:
    """An Arrow table as what X is: a data frame with X's index, an Arrow table or an array."""
    if not nw.dependencies.is_into_dataframe(X):
        return np.column_stack([column.to_numpy() for column in table.columns])
    frame = nw.from_native(X, eager_only=True)
    made = nw.from_arrow(table, backend=frame.implementation).to_native()
    return made.set_axis(X.index) if frame.implementation.is_pandas() else made
