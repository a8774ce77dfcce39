"""Known defects, planted on purpose: each must make the proof fail.

Each mutant is an attribute too (`double_reduce`), which an `EngineConfig.instrument` can name.
"""

from isomoe.prove.mutants.base import Mutant, Needs, When
from isomoe.prove.mutants.catalogue import MUTANTS, find_mutant, mutant_attribute

__getattr__ = mutant_attribute

__all__ = ["MUTANTS", "Mutant", "Needs", "When", "find_mutant", "mutant_attribute"]
