"""Files, layouts, tokens, symmetries and tasks for learning in weight space."""
