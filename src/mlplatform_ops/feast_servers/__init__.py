"""Feast's feature server and UI, behind a list of what is open."""
