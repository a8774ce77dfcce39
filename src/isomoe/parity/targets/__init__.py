"""What can be compared: one file a sort of target."""
