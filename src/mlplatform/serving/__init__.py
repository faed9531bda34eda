"""What an endpoint needs: a compiled model, fast reads of online features, a watch on the alias, releases, a log.

Nothing here knows a web framework; `mlplatform_serving` puts a BentoML service in front of it.
"""

from mlplatform import later

__getattr__ = later.stand_ins(__name__, "predictor", "releases", "served_model")
