"""The server: HTTP in front, the engine core in a process behind it."""
