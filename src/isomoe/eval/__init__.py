"""Tasks with a right answer, and how they are scored."""

from isomoe.eval.scoring import Share
from isomoe.eval.tasks import TASKS, Problem, Task, find_task, read_problems

__all__ = ["TASKS", "Problem", "Share", "Task", "find_task", "read_problems"]
