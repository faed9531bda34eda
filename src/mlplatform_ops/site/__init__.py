"""The site: what a run of the notebooks shows, as pages that load nothing from the internet."""
