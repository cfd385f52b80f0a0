"""Provides `dat_client.integrations.lightning` under the name under which it was first published."""

from dat_client.integrations.lightning import DiscreteAdversarialTraining

__all__ = ["DiscreteAdversarialTraining"]
