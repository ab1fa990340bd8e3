"""The toy world behind the built-in tiny model: its words, its stories, its lore and the questions about it."""
