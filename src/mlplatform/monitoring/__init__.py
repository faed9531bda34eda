"""Does the world still look like the training data? The alarm is in `drift`, what surrounds it in `drift_watch`."""

from mlplatform import later

__getattr__ = later.stand_ins(__name__, "drift_watch")
