"""A stand-in for W&B's server on the loopback: what its unmodified client, sweep agent and public
API ask for, kept in dicts.

server.login    environment variables that bring a client here
server.runs     run id -> Run          server.sweeps   sweep id -> Sweep
server.views    workspaces, as sent    server.unknown  operations that were asked for and are not here
server.fault    what is wrong with its answers, one of FAULTS or None; `vanish()` and `appear()` end and begin it
"""

import contextlib
import gzip
import http.server
import itertools
import json
import math
import re
import secrets
import socket
import threading
import time
import urllib.parse
from dataclasses import dataclass, field
from types import MappingProxyType

import pytest
import yaml

ENTITY = "me"
MADE = "2026-01-01T00:00:00Z"
ENDED = ("finished", "failed", "crashed", "preempted", "killed")


@dataclass
class Run:
    """A run as the server knows it: pending, running, then one of ENDED; one that was stopped is
    not handed out again.
    """

    id: str
    project: str
    sweep: str | None = None
    point: dict = field(default_factory=dict)  # what the sweep has chosen
    name: str = ""  # for people
    state: str = "pending"
    exit_code: int | None = None
    preempting: bool = False
    stopped: bool = False  # by a person, or early: its client and its agent are told so
    group: str = ""
    notes: str = ""
    tags: list = field(default_factory=list)
    # the config as sent, {"config.seed": {"value": 1}, "_wandb": ...}
    columns: dict = field(default_factory=dict)
    summary: dict = field(default_factory=dict)
    lines: list = field(default_factory=list)  # of the history, JSON
    files: dict = field(default_factory=dict)  # name -> bytes

    @property
    def history(self):
        """The rows as W&B has them, each with its `_step`."""
        return [json.loads(line) for line in self.lines]

    @property
    def config(self):
        """The columns that a person sees: name -> value."""
        return {key: column["value"] for key, column in self.columns.items() if key != "_wandb"}


@dataclass
class Sweep:
    """The points of a sweep and what is left of them: a grid, or `run_cap` points evenly along
    ranges from min to max.
    """

    id: str
    project: str
    text: str
    state: str = "RUNNING"

    def __post_init__(self):
        self.config = yaml.safe_load(self.text)
        given = self.config["parameters"]
        shares = range(self.config.get("run_cap", 0))
        if self.config["method"] == "grid":
            axes = {name: one.get("values", [one.get("value")]) for name, one in given.items()}
            self.expected = [
                dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values())
            ]
        else:
            self.expected = [
                {
                    name: one["min"] + (one["max"] - one["min"]) * share / max(len(shares) - 1, 1)
                    if "min" in one
                    else one["value"]
                    for name, one in given.items()
                }
                for share in shares
            ]
        self.points = iter(self.expected)


@dataclass
class Agent:
    """A `wandb agent`, and the runs that it was given and has not ended."""

    sweep: str
    given: set = field(default_factory=set)


class Server(http.server.ThreadingHTTPServer):
    """Answers GraphQL operations by the method of their name, file streams and uploads."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler, bind_and_activate=False)
        self.fault = None
        self.connections = set()
        self.lock = threading.RLock()
        self.appear()
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.login = {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": "k" * 40}
        self.runs = {}
        self.sweeps = {}
        self.agents = {}
        self.views = {}
        self.unknown = []

    def appear(self):
        """Listen, again on the same port, with all that was known before."""
        self.socket.close()
        self.socket = socket.socket(self.address_family, self.socket_type)
        self.server_bind()
        self.server_activate()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def vanish(self):
        """Be gone: nobody listens any more, and who was connected is cut off."""
        self.shutdown()
        self.server_close()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def get_request(self):
        connection, address = super().get_request()
        self.connections.add(connection)
        return connection, address

    def shutdown_request(self, request):
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request, client_address):
        """A client that was killed hangs up in the middle of a sentence."""

    def graphql(self, query, variables):
        """The answer to an operation, an error to one that is not known here."""
        operation = re.search(r"(?:query|mutation)\s+(\w+)", query)[1]
        answer = getattr(self, operation, None if "project(" not in query else self.project)
        if answer is None:
            self.unknown.append(operation)
            return {"errors": [{"message": f"unknown operation {operation}"}]}
        with self.lock:
            return {"data": answer(variables)}

    # who is asking, and what the server can do

    def Viewer(self, v):
        user = {
            "id": ENTITY,
            "name": ENTITY,
            "username": ENTITY,
            "entity": ENTITY,
            "email": "",
            "admin": False,
            "flags": "{}",
        }
        return {"viewer": user | {"teams": {"edges": []}, "apiKeys": {"edges": []}}}

    GetViewer = GetDefaultEntity = Viewer

    def ServerFeaturesQuery(self, v):
        return {"serverInfo": {"features": []}}

    def OrganizationCoreWeaveOrganizationID(self, v):
        return {"entity": {"organization": None}}

    # runs, written

    def UpsertBucket(self, v):
        new = v["name"] not in self.runs
        run = self.runs.setdefault(v["name"], Run(v["name"], v["project"]))
        if run.state != "running":  # a run that goes on tells of itself again and again
            run.state = "running"
            run.exit_code = None
            run.preempting = False
        run.name, run.group = (
            v.get("displayName") or run.name or run.id,
            v.get("groupName") or run.group,
        )
        run.notes, run.tags, run.sweep = (
            v.get("notes") or run.notes,
            v.get("tags") or run.tags,
            v.get("sweep") or run.sweep,
        )
        run.columns = json.loads(v.get("config") or "{}") or run.columns
        run.summary |= json.loads(v.get("summaryMetrics") or "{}")
        return {"upsertBucket": {"bucket": self.as_run(run), "inserted": new}}

    def RunResumeStatus(self, v):
        run = self.runs.get(v["name"])
        return {"model": as_project(v["project"]) | {"bucket": run and self.as_run(run)}}

    def RewindRun(self, v):
        run = self.runs[v["runName"]]
        run.lines = [line for line in run.lines if json.loads(line)["_step"] <= v["metricValue"]]
        return {"rewindRun": {"rewoundRun": self.as_run(run)}}

    def CreateRunFiles(self, v):
        files = [
            {"name": name, "uploadUrl": f"{self.url}/upload/{v['run']}/{urllib.parse.quote(name)}"}
            for name in v["files"]
        ]
        return {"createRunFiles": {"runID": v["run"], "uploadHeaders": [], "files": files}}

    def stream(self, run, sent):
        """Take what a run streams: lines at an offset, its summary, and how it ended."""
        files = sent.get("files") or {}
        if rows := files.get("wandb-history.jsonl"):
            run.lines[rows["offset"] : rows["offset"] + len(rows["content"])] = rows["content"]
        if summary := files.get("wandb-summary.json"):
            run.summary = json.loads(summary["content"][-1])
        run.preempting = run.preempting or sent.get("preempting", False)
        if sent.get("complete"):
            run.exit_code = sent["exitcode"]
            waits = run.preempting and not run.stopped
            run.state = (
                "finished"
                if run.exit_code == 0
                else "preempted"
                if waits
                else "killed"
                if run.stopped
                else "failed"
            )

    # sweeps

    def UpsertSweep(self, v):
        sweep = self.sweeps.get(v.get("id"))
        if sweep is None:
            sweep = Sweep(new_id(), v["projectName"], v["config"])
            self.sweeps[sweep.id] = sweep
        sweep.state = v.get("state") or sweep.state
        return {"upsertSweep": {"sweep": self.as_sweep(sweep), "configValidationWarnings": []}}

    def CreateAgent(self, v):
        agent = new_id()
        self.agents[agent] = Agent(v["sweep"])
        return {"createAgent": {"agent": {"id": agent}}}

    def Heartbeat(self, v):
        agent = self.agents[v["id"]]
        alive = json.loads(v["runState"])
        for run in [self.runs[run_id] for run_id in agent.given - alive.keys()]:
            agent.given.remove(run.id)
            # without a last word; the real server believes it after minutes of silence
            if run.state not in ENDED:
                run.state = "crashed"
        stops = [
            {"id": new_id(), "type": "stop", "run_id": run_id}
            for run_id in alive
            if self.runs[run_id].stopped
        ]
        commands = stops or ([] if alive else [self.next_command(agent, self.sweeps[agent.sweep])])
        return {"agentHeartbeat": {"agent": {"id": v["id"]}, "commands": json.dumps(commands)}}

    def next_command(self, agent, sweep):
        """As W&B does: first the runs that were preempted, with their id and point, then new
        points, then an end.
        """
        waiting = [
            run for run in self.runs.values() if run.sweep == sweep.id and run.state == "preempted"
        ]
        point = None if waiting or sweep.state != "RUNNING" else next(sweep.points, None)
        if not waiting and point is None:
            sweep.state = "FINISHED"
            return {"id": new_id(), "type": "exit"}
        run = waiting[0] if waiting else Run(new_id(), sweep.project, sweep.id, point)
        run.state = "pending"
        self.runs[run.id] = run
        agent.given.add(run.id)
        arguments = {name: {"value": value} for name, value in run.point.items()}
        return {
            "id": new_id(),
            "type": "resume" if waiting else "run",
            "run_id": run.id,
            "args": arguments,
            "program": sweep.config.get("program"),
        }

    # everything that is read back, and views

    def project(self, v):
        """A project with all that the client's many queries of it look for."""
        project = v.get("project") or v.get("projectName") or v.get("name")
        runs = [run for run in self.runs.values() if run.project == project]
        chosen = [run for run in runs if matches(run, json.loads(v.get("filters") or "{}"))]
        run = self.runs.get(v.get("runName") or v.get("run") or v.get("name"))
        sweep = self.sweeps.get(v.get("sweep") or v.get("name"))
        if not runs and project not in [sweep.project for sweep in self.sweeps.values()]:
            return {"project": None}
        return {
            "project": as_project(project)
            | {
                "run": run and self.as_run(run, v),
                "sweep": sweep and self.as_sweep(sweep),
                "runCount": len(chosen),
                "runs": edges(self.as_run(run) for run in chosen),
            }
        }

    def UpsertView2(self, v):
        self.views[v["name"]] = v
        return {"upsertView": {"view": {"id": v["name"], "name": v["name"]}, "inserted": True}}

    def as_run(self, run, v=MappingProxyType({})):
        low = v.get("minStep", 0)
        high = v.get("maxStep", math.inf)
        specs = [json.loads(spec) for spec in v.get("specs", [v["spec"]] if "spec" in v else [])]
        return {
            "id": run.id,
            "name": run.id,
            "displayName": run.name,
            "project": as_project(run.project),
            "projectId": "1",
            "state": run.state,
            "exitcode": run.exit_code,
            "sweepName": run.sweep,
            "group": run.group,
            "jobType": "",
            "config": json.dumps(run.columns),
            "wandbConfig": json.dumps({"t": 1}),
            "summaryMetrics": json.dumps(run.summary),
            "systemMetrics": "{}",
            "tags": run.tags,
            "notes": run.notes,
            "description": "",
            "commit": "",
            "readOnly": False,
            "createdAt": MADE,
            "heartbeatAt": MADE,
            "user": {"name": ENTITY, "username": ENTITY},
            "historyLineCount": len(run.lines),
            "historyTail": json.dumps(run.lines[-1:]),
            "eventsLineCount": 0,
            "eventsTail": "[]",
            "logLineCount": 0,
            "historyKeys": {"lastStep": run.history[-1]["_step"] if run.lines else -1},
            "parquetHistory": {"parquetUrls": []},
            "fileCount": len(run.files),
            "files": edges(
                self.as_file(run, name)
                for name in v.get("fileNames", run.files)
                if name in run.files
            ),
            "history": [line for line in run.lines if low <= json.loads(line)["_step"] < high],
            "sampledHistory": [sampled(run.history, **spec) for spec in specs],
        }

    def as_file(self, run, name):
        return {
            "id": name,
            "name": name,
            "url": f"{self.url}/upload/{run.id}/{urllib.parse.quote(name)}",
            "directUrl": "",
            "sizeBytes": len(run.files[name]),
            "mimetype": "",
            "updatedAt": MADE,
            "md5": "",
        }

    def as_sweep(self, sweep):
        runs = [run for run in self.runs.values() if run.sweep == sweep.id]
        return {
            "__typename": "Sweep",
            "id": sweep.id,
            "name": sweep.id,
            "displayName": sweep.config.get("name"),
            "method": sweep.config["method"],
            "state": sweep.state,
            "description": sweep.config.get("description"),
            "bestLoss": None,
            "config": sweep.text,
            "createdAt": MADE,
            "updatedAt": MADE,
            "heartbeatAt": MADE,
            "runCount": len(runs),
            "runCountExpected": len(sweep.expected),
            "project": as_project(sweep.project),
            "controller": None,
            "scheduler": None,
            "earlyStopJobRunning": False,
            "runs": edges(self.as_run(run) for run in runs),
        }


class Handler(http.server.BaseHTTPRequestHandler):
    """HTTP around the server's answers."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        """The console belongs to the tests."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
        answer = {}
        if self.server.fault and self.server.fault(self):
            return None
        if self.path.endswith("/graphql"):
            said = json.loads(body)
            answer = self.server.graphql(said["query"], said.get("variables") or {})
        elif self.path.endswith("/file_stream"):
            with self.server.lock:
                run = self.server.runs.get(self.path.split("/")[-2])
                if run is None:  # deleted
                    return self.answer(b'{"error": "run not found"}', 404)
                self.server.stream(run, json.loads(body))
            answer = {"stopped": run.stopped}
        elif self.path.startswith("/upload/"):
            run, name = self.path.removeprefix("/upload/").split("/", 1)
            self.server.runs[run].files[urllib.parse.unquote(name)] = body
        self.answer(json.dumps(answer).encode())

    do_PUT = do_POST

    def do_GET(self):
        if self.server.fault and self.server.fault(self):
            return
        run, name = self.path.removeprefix("/upload/").split("/", 1)
        self.answer(self.server.runs[run].files[urllib.parse.unquote(name)])

    def answer(self, content, status=200, length=None, **headers):
        self.send_response(status)
        for name, value in {
            "Content-Length": len(content) if length is None else length,
            **headers,
        }.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(content)


def silent(handler):
    """Takes what is sent, and never answers."""
    time.sleep(3600)


def slow(handler):
    """Answers after five seconds."""
    time.sleep(5)


def refusing(status, **headers):
    """Answers an HTTP status."""

    def fault(handler):
        handler.answer(json.dumps({"error": f"status {status}"}).encode(), status, **headers)
        return True

    return fault


def garbled(handler):
    """Answers what is no JSON."""
    handler.answer(b"<html>{not json")
    return True


def cut_off(handler):
    """Hangs up in the middle of an answer."""
    handler.answer(b'{"data": ', length=1000)
    handler.close_connection = True
    return True


FAULTS = {  # f(handler) is asked first, and returns True where it has answered
    "silent": silent,
    "slow": slow,
    "500": refusing(500),
    "429": refusing(429, Retry_After=1),
    "401": refusing(401),
    "403": refusing(403),
    "409": refusing(409),
    "garbled": garbled,
    "cut off": cut_off,
}


def as_project(name):
    return {
        "id": name,
        "name": name,
        "internalId": "1",
        "readOnly": False,
        "entity": {"id": ENTITY, "name": ENTITY},
    }


def edges(nodes):
    """GraphQL's list; there is only ever one page."""
    return {
        "edges": [{"node": node, "cursor": node["id"]} for node in nodes],
        "pageInfo": {"endCursor": None, "hasNextPage": False},
    }


def sampled(rows, keys, samples, minStep=0, maxStep=math.inf):
    """The rows that have all of `keys`, cut to these; none is left out, however few are asked
    for.
    """
    whole = [row for row in rows if row.keys() >= set(keys) and minStep <= row["_step"] <= maxStep]
    return [{key: row[key] for key in keys} for row in whole]


def matches(run, filters):
    """Whether a run meets the filters of `Api.runs`, as far as they are equalities."""
    if "$and" in filters:
        return all(matches(run, each) for each in filters["$and"])
    known = {
        "sweep": run.sweep,
        "state": run.state,
        "name": run.id,
        "display_name": run.name,
        "group": run.group,
    }
    return all(known[key] == value for key, value in filters.items())


def new_id():
    return secrets.token_hex(4)


@pytest.fixture
def server():
    """A server as W&B's client sees it."""
    started = Server()
    yield started
    started.vanish()
