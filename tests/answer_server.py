"""A small server process that speaks OpenAI's protocol, with prompts that say what it is to do.

`fail 503 2` is answered with status 503 twice, and then with an answer; `fail 400 9` practically always;
`say ["a", "b"]` with these answers one after the other; `cut` with one that does not end; `drop` by closing
the connection once; `moved` with a redirect. Two answers to be judged get a verdict: for the longer one, or
as the question says (`judge_of`); one answer to be rated gets a rating. Anything else is repeated.
`python answer_server.py [KEY]` prints its port.
"""

import contextlib
import json
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

KEY = sys.argv[1] if __name__ == "__main__" and len(sys.argv) > 1 else None
LOCK = threading.Lock()
SEEN: Counter = Counter()
STATE = {"now": 0, "most": 0, "requests": []}


def judge_of(text):
    """A verdict on two answers, or None where nothing is to be judged."""
    parts = re.search(
        r"\[User Question\]\n(.*?)\n\n.*A's Answer\]\n(.*)\n\[The End.*B's Answer\]\n(.*)\n\[The End",
        text,
        re.S,
    )
    if parts is None:
        return None
    question, first, second = parts.groups()
    said = {
        "first": "Assistant A is better: [[A]]",
        "even": "Both are fine. [[C]]",
        "mumble": "It depends. [A]",
        "both": "[[A]] for style, [[B]] for facts",
    }
    longer = "B" if len(second) > len(first) else "A"
    return said.get(question.split()[0], f"The longer one, [[{longer}]], I say [[{longer}]].")


def rating_of(messages):
    """A rating from 1 to 10 of the last answer, by its length; None where nothing is to be rated."""
    if not any("[[rating]]" in turn["content"] for turn in messages):
        return None
    last = re.split(r"Assistant(?:'s Answer\]| A:)\n", messages[-1]["content"])[-1]
    answer = re.split(r"\n(?:\[The End|\n<\|The End)", last)[0]
    if "unrated" in answer:
        return "I will not rate that."
    return f"Rating: [[{min(1 + len(answer) % 10, 10)}]]"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/stats":
            self._send(200, STATE)
        elif self._allowed():
            self._send(200, {"data": [{"id": "parrot"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._allowed():
            return
        if body.get("model") != "parrot":
            self._send(404, {"error": {"message": f"there is no {body.get('model')}"}})
            return
        chats = self.path.endswith("/chat/completions")
        text = body["messages"][-1]["content"] if chats else body["prompt"]
        with LOCK:
            number = SEEN[text]
            SEEN[text] += 1
            STATE["now"] += 1
            STATE["most"] = max(STATE["most"], STATE["now"])
            STATE["requests"].append(body)
        time.sleep(0.02)
        with LOCK:
            STATE["now"] -= 1
        verdict = judge_of(text) or (rating_of(body["messages"]) if chats else None)
        self._answer(text, number, chats, verdict)

    def _answer(self, text, number, chats, verdict):
        word, _, rest = text.partition(" ")
        if word == "fail" and number < int(rest.split()[1]):
            self._send(int(rest.split()[0]), {"error": {"message": f"not now, Bearer {KEY}"}})
            return
        if word == "drop" and number == 0:
            self.close_connection = True
            self.connection.close()
            return
        if word == "moved":
            self.send_response(302)
            self.send_header("Location", "/stats")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        said = json.loads(rest)[number % len(json.loads(rest))] if word == "say" else f"You said: {text}"
        said = verdict or said
        message = {"message": {"role": "assistant", "content": said}} if chats else {"text": said}
        choice = message | {"finish_reason": "length" if word == "cut" else "stop"}
        self._send(200, {"choices": [choice], "usage": {"completion_tokens": len(said.split())}})

    def _allowed(self):
        if KEY is None or self.headers.get("Authorization") == f"Bearer {KEY}":
            return True
        self._send(401, {"error": {"message": f"wrong key {self.headers.get('Authorization')}"}})
        return False

    def _send(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def answer_server(key=None):
    """Run the server; gives its address."""
    words = [sys.executable, str(Path(__file__)), *([key] if key else [])]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}/v1"
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()
