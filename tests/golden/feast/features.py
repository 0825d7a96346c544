"""Written by `mmimpute features apply`, which writes it anew for every version of the table: put definitions of your own in another file.

Where a value was observed `__imputed` is that value and `__std` is 0; elsewhere they are the prediction and its standard deviation.
The event time of a record is its "index_date".
"""

from datetime import timedelta

from feast import Entity, FeatureView, Field, FileSource, ValueType
from feast.types import Array, Float32, Float64, String

NEVER = timedelta(0)  # values do not expire

subject = Entity(name="subject_id", join_keys=["subject_id"], value_type=ValueType.STRING)

enriched = FileSource(
    name="enriched",  # version 12 of the table
    path="s3://bucket/enriched/_features/v000012-73301352",
    timestamp_field="event_timestamp",
    created_timestamp_column="created_timestamp",
)

labs_imputed = FeatureView(
    name="labs_imputed",
    entities=[subject],
    ttl=NEVER,
    source=enriched,
    schema=[
        Field(name="subject_id", dtype=String),
        Field(name="labs__imputed", dtype=Array(Float32)),
    ],
)

labs_std = FeatureView(
    name="labs_std",
    entities=[subject],
    ttl=NEVER,
    source=enriched,
    schema=[
        Field(name="subject_id", dtype=String),
        Field(name="labs__std", dtype=Array(Float32)),
    ],
)

rna_imputed = FeatureView(
    name="rna_imputed",
    entities=[subject],
    ttl=NEVER,
    source=enriched,
    schema=[
        Field(name="subject_id", dtype=String),
        Field(name="rna__imputed", dtype=Array(Float32)),
    ],
)

rna_std = FeatureView(
    name="rna_std",
    entities=[subject],
    ttl=NEVER,
    source=enriched,
    schema=[
        Field(name="subject_id", dtype=String),
        Field(name="rna__std", dtype=Array(Float32)),
    ],
)

dx_imputed = FeatureView(
    name="dx_imputed",
    entities=[subject],
    ttl=NEVER,
    source=enriched,
    schema=[
        Field(name="subject_id", dtype=String),
        Field(name="dx__code__imputed", dtype=Float64),
        Field(name="dx__stage__imputed", dtype=Float64),
        Field(name="dx__site__imputed", dtype=String),
    ],
)

dx_std = FeatureView(
    name="dx_std",
    entities=[subject],
    ttl=NEVER,
    source=enriched,
    schema=[
        Field(name="subject_id", dtype=String),
        Field(name="dx__code__std", dtype=Float64),
        Field(name="dx__stage__std", dtype=Float64),
        Field(name="dx__site__std", dtype=Float32),
    ],
)

z0 = FeatureView(
    name="z0",
    entities=[subject],
    ttl=NEVER,
    source=enriched,
    schema=[
        Field(name="subject_id", dtype=String),
        Field(name="z0", dtype=Array(Float32)),
    ],
)
