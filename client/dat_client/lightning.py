"""The name under which `dat_client.integrations.lightning` was published first."""

from dat_client.integrations.lightning import DiscreteAdversarialTraining

__all__ = ["DiscreteAdversarialTraining"]
