"""The classes that `feature_store.yaml` names: what Feast calls in place of its own stores and engine."""
