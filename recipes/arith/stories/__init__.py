"""The stories, by subject. Importing this package registers all of them."""

from recipes.arith.stories import measures, money, things
from recipes.arith.stories.draw import STORIES, Draw, Story

__all__ = ["STORIES", "Draw", "Story", "measures", "money", "things"]
