"""What is done with a trained adapter: merge, chat, serve, publish."""
