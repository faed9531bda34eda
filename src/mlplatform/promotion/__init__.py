"""What stands between a registered version and the alias `champion`."""

from mlplatform import later

__getattr__ = later.stand_ins(__name__, "alias", "evaluation", "gate", "signing")
