"""What `objectstore` stands on: frames as parquet files, and the store's refusals as errors of ours."""
