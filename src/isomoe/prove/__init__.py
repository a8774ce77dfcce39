"""The proof: real models, streams and plans on simulated ranks, with provenance for numbers."""

from isomoe.prove.campaign import Report, expressible, prove_models
from isomoe.prove.finding import Finding, Stats
from isomoe.prove.mutants import MUTANTS, Mutant, find_mutant

__all__ = [
    "MUTANTS",
    "Finding",
    "Mutant",
    "Report",
    "Stats",
    "expressible",
    "find_mutant",
    "prove_models",
]
