"""What a user of the feature store does, in Feast's own environment: python feast_client.py REPO ROWS.parquet FOLDER.

Writes to FOLDER historical.parquet (training features of the rows) and online.parquet (the newest ones of every subject in them).
"""

import sys
from pathlib import Path

import pandas as pd
from feast import FeatureStore

repo, rows, folder = map(Path, sys.argv[1:])
sys.path.append(str(repo))
store = FeatureStore(repo)
features = [f"{view.name}:{f.name}" for view in store.list_feature_views() for f in view.features]
asked = pd.read_parquet(rows)
store.get_historical_features(asked, features).to_df().to_parquet(folder / "historical.parquet")
subjects = [{"subject_id": s} for s in sorted(set(asked["subject_id"]))]
pd.DataFrame(store.get_online_features(features, subjects).to_dict()).to_parquet(folder / "online.parquet")
