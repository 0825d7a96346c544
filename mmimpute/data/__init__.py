"""Records in storage: shards, their schema, and the way between Arrow and arrays. No torch but in tensors.py."""
