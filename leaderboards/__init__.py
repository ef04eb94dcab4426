"""Leaderboards: records -> tables. Pure functions: the same records give the same bytes."""
