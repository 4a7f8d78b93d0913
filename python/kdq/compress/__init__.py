"""The whole road in one call; see `kdq.compress.road`."""
