#!/usr/bin/env python3
"""A small MCP server (streamable HTTP, without sessions) with one tool, on 127.0.0.1:8931."""

import datetime
import http.server
import json

TOOL = {"name": "time", "description": "The host's time.", "inputSchema": {"type": "object", "properties": {}}}


def result(method, version):
    if method == "initialize":
        info = {"name": "host", "version": "1"}
        return {"protocolVersion": version, "capabilities": {"tools": {}}, "serverInfo": info}
    if method == "tools/list":
        return {"tools": [TOOL]}
    if method == "tools/call":
        now = datetime.datetime.now().astimezone().isoformat()
        return {"content": [{"type": "text", "text": now}]}
    return {}


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))))
        answer = b""
        if "id" in request:
            version = request.get("params", {}).get("protocolVersion", "2025-06-18")
            reply = {"jsonrpc": "2.0", "id": request["id"], "result": result(request["method"], version)}
            answer = json.dumps(reply).encode()
        self.send_response(200 if answer else 202)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)


http.server.ThreadingHTTPServer(("127.0.0.1", 8931), Handler).serve_forever()
