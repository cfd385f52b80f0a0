"""An alias of `dat_client.integrations.lightning`, under its first published name."""

from dat_client.integrations.lightning import DiscreteAdversarialTraining

__all__ = ["DiscreteAdversarialTraining"]
