"""The description of the table that everything is about."""
