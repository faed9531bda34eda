"""The champion behind HTTP: a BentoML service over `mlplatform.serving`."""
