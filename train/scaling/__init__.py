"""Which learning rate and batch size train best, as laws of the model's size and the number of tokens."""
