"""What a run will take, and the pictures of what was measured."""
