"""isomoe: Mixture-of-Experts serving in which the parallel layout can never change the answer."""

__version__ = "0.1.0"
