"""A recipe at many points."""
