"""Batch normalisation, in steps: where features lie, moments, statistics, y, and the rules."""
