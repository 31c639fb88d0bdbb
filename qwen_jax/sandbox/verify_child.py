"""A verifier inside the sandbox: what its `evaluate` says of each response, as the last line of output."""

import io
import json
import sys

given = json.load(sys.stdin)
stdout, sys.stdout = sys.stdout, io.StringIO()  # what it prints is not ours
sys.stdin = io.StringIO()
namespace: dict = {"__name__": "verifier"}
exec(compile(given["verifier"], "verifier", "exec", dont_inherit=True), namespace)
function = namespace["evaluate"]
said = []
for response in given["responses"]:
    try:
        value = function(response)
    except Exception:
        value = None
    said.append(value if isinstance(value, bool) else None)
print(json.dumps(said), file=stdout)
