"""The proof: real models, streams and plans on simulated ranks, with provenance for numbers."""

from isomoe.prove.campaign import Report, expressible, known_configs, prove_models
from isomoe.prove.mutants import MUTANTS, Mutant, find_mutant
from isomoe.prove.runner import Finding, Stats

__all__ = [
    "MUTANTS",
    "Finding",
    "Mutant",
    "Report",
    "Stats",
    "expressible",
    "find_mutant",
    "known_configs",
    "prove_models",
]
