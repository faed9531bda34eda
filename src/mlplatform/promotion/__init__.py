"""What stands between a registered version and the alias `champion`."""
