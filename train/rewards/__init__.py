"""What judges completions: verifiers, functions of a user's file, reward models. None of them can spoil a batch."""
