"""`python -m infer serve`: OpenAI's API over HTTP, and the only folder that imports web libraries.

run         from the options to a server, and to its end
connection  the patience of a socket
guard       what every request passes: hosts, keys, limits
app         the routes
protocol    requests as clients send them
prepare     requests as the engine takes them
service     the thread of the engine, and the way to it
choices     completions as clients read them
logprobs    probabilities of their tokens
answers     responses, in chunks or whole
errors      refusals, in OpenAI's shape
metrics     counters for Prometheus
page        files of the chat page
"""
