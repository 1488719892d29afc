"""A server of one tool over stdio that knows the protocol as it is written, without the SDK."""

import json
import sys

calls = 0
for line in sys.stdin:
    request = json.loads(line)
    if "id" not in request:
        continue
    answer = {"error": {"code": -32601, "message": "Method not found"}}
    if request["method"] == "initialize":
        version = request["params"]["protocolVersion"]
        info = {"name": "plain", "version": "1"}
        answer = {"result": {"protocolVersion": version, "capabilities": {"tools": {}}, "serverInfo": info}}
    elif request["method"] == "tools/list":
        # two pages
        number = 1 + bool((request.get("params") or {}).get("cursor"))
        tool = {"name": f"count{number}", "inputSchema": {"type": "object"}}
        answer = {"result": {"tools": [tool], **({"nextCursor": "more"} if number == 1 else {})}}
    elif request["method"] == "tools/call":
        if request["params"]["name"] == "count2":
            sys.exit("out of numbers")
        calls += 1
        answer = {"result": {"content": [{"type": "text", "text": str(calls)}]}}
    print(json.dumps({"jsonrpc": "2.0", "id": request["id"], **answer}), flush=True)
