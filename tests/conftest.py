"""For all tests."""

from hypothesis import settings

# Machines are noisy, and nothing is timed in a test: without a deadline no pause can fail one.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")
