"""Language-model problems: a policy, a reward model and text, of the book or of the user's own."""
