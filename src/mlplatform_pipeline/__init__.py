"""The batch and the retraining as Kubeflow pipelines: here with KFP's local runner, on a cluster as compiled YAML."""
