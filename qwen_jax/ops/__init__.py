"""The mathematics: pure functions on arrays, no modules, no state.

norm        RMSNorm
rope        positions to rotations
linear      matrix products named by their letters
quantized   weights of four or eight bits, and products with them
embedding   token ids to vectors
mask        which keys a query may see, as a specification
attention   softmax attention, dispatched over implementations
loss        cross-entropy without the logits of a whole batch
sampling    logits to tokens
draw        a distribution cut off below, and a draw from it
"""
