"""How much one call may ask for. More is refused in one line, before it costs anything."""

MAX_N = 128
"""The most outputs of one prompt."""
MAX_CHOICES = 1024
"""The most outputs of one call, and texts to tokenize."""
MAX_STOP = 128
"""The most stop texts: each is sought in the output after every token."""
MAX_STOP_TOKENS = 4096
"""The most stop tokens."""
MAX_BIASES = 4096
"""The most tokens with a bias."""
