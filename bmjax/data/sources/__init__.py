"""Where images come from: each source lists them, none of them read yet."""
